"""The hidden layer of a trained network, of which the units run that an input needs."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly.nn import _rows
from sparingly.nn._int8 import Bank, row_bytes
from sparingly.nn.sample import Option, Sample
from sparingly.nn.selective import (
    GRADIENTS,
    LEARNS,
    MANY,
    MOST_TOKENS,
    Activation,
    Selective,
    lost,
    needs_gradient,
    threshold_options,
)
from sparingly.ops import gated_rows, gather_accumulate, gather_dot, threshold_accumulate
from sparingly.selectors import Selector
from sparingly.selectors.lowrank import LowRank
from sparingly.selectors.threshold import Threshold

WRAPPED = "a layer inside was replaced by another kind: the layers themselves run, with their own weights"


class SelectiveMLP(Selective):
    """Stands in for ``down(act(up(x)))`` or ``down(act(gate(x)) * up(x))``; the layers inside stay under their names.

    With a :class:`Threshold` every unit's activation is computed (the gate's, where there is one) and only the units
    that pass run in the other matrices. With a selector that looks at the input (``LowRank``, ``Random``) only its
    units run in any of them. Many tokens, or gradients, take dense products of the same selection.

    With ``rows = "int8"``, which needs a Threshold, the matrices that skip run from int8 rows, for one token and for
    many. A first matrix that computes every activation stays as it is, unless it is a selective layer of its own with
    such rows. Gradients are those of the weights as they are.

    Args:
        original: the module to stand in for; its child modules become this one's.
        up, down, gate: the layers' names within it; gate None for a plain MLP. ``gate == up``: one fused matrix.
        activation: elementwise.
        selector: over the hidden units.
        gate_first: of a fused matrix, whether the gate's half comes first.
    """

    def __init__(
        self,
        original: nn.Module,
        up: str,
        down: str,
        activation: Activation,
        selector: Selector,
        gate: str | None = None,
        gate_first: bool = True,
    ):
        super().__init__()
        for name, child in original._modules.items():
            self.add_module(name, child)
        self._names = (up, gate, down)
        self._gate_first = gate_first
        self._input = next(iter(inspect.signature(original.forward).parameters), "x")
        self._begin(original, selector)
        # A module that is not one of the children (shared, or ours) must not become one.
        self._activation = (activation,)
        self._down_features, self._out_features = _rows.sizes(self.get_submodule(down))
        self._in_features = _rows.sizes(self.get_submodule(up))[0]
        if isinstance(selector, Threshold):
            selector.prepare(self.num_units, self.get_submodule(down).weight.device)  # pyright: ignore
        elif isinstance(selector, LowRank):
            selector.rank_by(activation)
        self._columns = {name: _rows.by_columns(layer.weight) for name, layer in self._matrices()}
        self._lay_out(True)
        _rows.share_hooks(original, self)
        self.register_load_state_dict_post_hook(_turn)
        # Its own mode alone: a child may have another one.
        self.training = selector.training = original.training

    def _matrices(self) -> list[tuple[str, Any]]:
        """The layers inside, but for those that look after their own memory."""
        named = [(name, self.get_submodule(name)) for name in dict.fromkeys(self._names) if name is not None]
        return [(name, layer) for name, layer in named if not isinstance(layer, Selective)]

    def _lay_out(self, selective: bool) -> None:
        for name, layer in self._matrices():
            wanted = (name == self._names[2]) != _rows.transposed(layer)
            _rows.lay_out(layer.weight, columns=wanted if selective else self._columns.get(name, False))

    def dense(self) -> nn.Module:
        """The original module with the layers that stand here now."""
        self._lay_out(False)
        (original,) = self._original
        for name in original._modules:
            original._modules[name] = self._modules[name]
        original.training = self.training
        _rows.share_hooks(self, original)
        return original

    @property
    def num_units(self) -> int:
        """Hidden units."""
        return self._down_features

    @property
    def gated(self) -> bool:
        """True for ``down(act(gate(x)) * up(x))``."""
        return self._names[1] is not None

    @property
    def first(self) -> str | None:
        """Name of the layer that computes every activation, None where it is fused or computes only some."""
        up, gate, _ = self._names
        return None if gate == up or not self.on_activation else gate or up

    @property
    def on_activation(self) -> bool:
        """True if the selector looks at the activation of every unit, False if at the input."""
        return isinstance(self.selector, Threshold)

    def operators(self) -> tuple[str, ...]:
        """See :meth:`Selective.operators`."""
        if not self.on_activation:
            return ("gather_dot", "gather_accumulate")
        return ("gated_rows",) if self.gated else ("threshold_accumulate",)

    @property
    def takes_int8(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See :class:`Selective`."""
        return self.on_activation

    def _unit_bytes(self, kind: str | None) -> tuple[int, int]:
        """In the matrices that skip."""
        weight: Any = self.get_submodule(self._names[2]).weight
        ups = int(self.gated) if self.on_activation else 1 + int(self.gated)
        return ups * row_bytes(self._in_features, weight, kind), row_bytes(self._out_features, weight, kind)

    def fixed_bytes(self) -> int:
        """Bytes that every token reads: the matrix that computes every activation, unless it is a selective layer of
        its own, and what finds the units or stands for those that do not run."""
        up, gate, down = self._names
        if isinstance(self.selector, LowRank):
            return self.selector.rank * (self._in_features + self.num_units) * 4
        first = self.get_submodule(gate or up)
        size = self.get_submodule(down).weight.element_size()  # pyright: ignore
        read = (
            0 if not self.on_activation or isinstance(first, Selective) else self._in_features * self.num_units * size
        )
        if self.gated and isinstance(self.selector, Threshold) and self.selector.centre.numel():
            read += self._in_features * (self._out_features + 4)
        return read

    def bytes_read(self, first: float, second: float) -> float:
        """See :meth:`Selective.bytes_read`."""
        before, after = self._unit_bytes(self.rows)
        # Without a second cut all that run do so to the end.
        return self.fixed_bytes() + before * first + after * (second if self.gated and self.on_activation else first)

    def _fitted_to(self) -> tuple[Tensor, Tensor | None]:
        up, gate, _ = self._names
        first: Any = self._layer(gate or up)
        return first.weight, first.bias

    def _bank(self) -> tuple[Tensor, Tensor | None]:
        gate, up = self._rows(self._layers())
        return up if gate is None else gate

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        """x [..., in_features], by position or under the name that the original gives it -> [..., out_features]."""
        if x is None and named.keys() == {self._input}:
            (x,) = named.values()
        elif x is None or named:
            raise TypeError(f"forward takes one input, {self._input}, got {', '.join(named) or 'none'}")
        tokens = x.numel() // self._in_features
        idle = self._idle()
        if idle is not None:
            self._note(idle, tokens)
            return self._product(x, None)
        layers = self._layers()
        learns = torch.is_grad_enabled() and needs_gradient(x, *self.parameters())
        if not all(_plain(layer) for layer in self._read(layers)):
            reason = WRAPPED
        elif learns and self._kind is not None:
            reason = LEARNS
        elif tokens > MOST_TOKENS:
            reason = MANY
        elif learns:
            reason = GRADIENTS
        elif torch.float16 in (x.dtype, layers.down.weight.dtype):
            reason = _rows.HALF
        else:
            run = self._run_activated if self.on_activation else self._run_named
            out = run(layers, x.reshape(tokens, self._in_features)).to(x.dtype)
            return out.view(*x.shape[:-1], self._out_features)
        self._note(reason, tokens)
        if self._kind is None or reason in (WRAPPED, LEARNS):
            return self._product(x, self.selector)
        return self._rounded_product(layers, x)

    def _layer(self, name: str) -> nn.Module | None:
        child = self._modules.get(name)
        return self.get_submodule(name) if child is None else child

    def _layers(self) -> _Layers:
        up, gate, down = [None if name is None else self._layer(name) for name in self._names]
        assert up is not None and down is not None
        return _Layers(up, None if gate is up else gate, down, fused=gate is up)

    def _read(self, layers: _Layers) -> tuple[Any, ...]:
        """The layers whose weights are read past their own ``forward``."""
        if not self.on_activation:
            return (layers.up, layers.down) if layers.gate is None else layers[:3]
        return (layers.up, layers.down) if self.gated else (layers.down,)

    def _halves(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """What a fused matrix holds or gave, split along its last axis -> (gate, up)."""
        first, second = both.chunk(2, dim=-1)
        return (first, second) if self._gate_first else (second, first)

    def _rows(self, layers: _Layers) -> tuple[_Rows | None, _Rows]:
        """(gate's, up's) weights and biases, one unit a row."""
        up = _Rows(_rows.by_output(layers.up), layers.up.bias)  # pyright: ignore[reportArgumentType]
        if layers.fused:
            biases = (None, None) if up.bias is None else self._halves(up.bias)
            weights = self._halves(up.weight.t())
            gate, up = (_Rows(weight.t(), bias) for weight, bias in zip(weights, biases, strict=True))
            return gate, up
        if layers.gate is None:
            return None, up
        return _Rows(_rows.by_output(layers.gate), layers.gate.bias), up  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def fit(self, sample: Sample) -> list[Option]:
        """See :meth:`Selective.fit`."""
        layers = self._layers()
        x = sample.inputs.to(layers.down.weight.dtype)
        values, factor = (None if part is None else part.float() for part in self._hidden(layers, x))
        assert values is not None
        spread = sample.gradients @ _rows.by_input(layers.down).float().t()
        moved = spread if factor is None else spread * factor
        importance, out = (part.square().mean(dim=0).sqrt() for part in (moved, spread))
        if isinstance(self.selector, Threshold):
            down = _rows.by_input(layers.down)
            self.selector.fit(down, None, values, importance, None if factor is None else out)
            return threshold_options(self, values, factor, moved)
        return self._fit_named(layers, sample.inputs, values * moved, importance)

    def _fit_named(self, layers: _Layers, x: Tensor, contributions: Tensor, importance: Tensor) -> list[Option]:
        gate, up = self._rows(layers)
        first = up if gate is None else gate
        if isinstance(self.selector, LowRank):
            (activation,) = self._activation
            self.selector.fit(first.weight, first.bias, x, importance, activation)
        else:
            self.selector.fit(first.weight, first.bias, x)

        def cost(_setting: int) -> tuple[float, float, float]:
            kept = self._named(x)
            count = float(kept.sum(dim=1).float().mean())
            return lost(contributions, kept), count, count

        return self._options(cost)

    def _named(self, x: Tensor) -> Tensor:
        """x [tokens, in_features] -> bool [tokens, num_units], those that the selector names."""
        ids = self.selector.select(x).per_token(x.shape[0])
        mask = torch.zeros(ids.shape[0], self.num_units + 1, dtype=torch.bool, device=x.device)
        return mask.scatter_(1, torch.where(ids < 0, self.num_units, ids), True)[:, :-1]

    def _hidden(self, layers: _Layers, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [..., in_features] -> every unit's activation and its factor; the layers run as modules."""
        (activation,) = self._activation
        if layers.fused:
            gate, up = self._halves(layers.up(x))
            return activation(gate), up
        if layers.gate is None:
            return activation(layers.up(x)), None
        return activation(layers.gate(x)), layers.up(x)

    def _values(self, layers: _Layers, rows: tuple[_Rows | None, _Rows], x: Tensor) -> Tensor:
        (activation,) = self._activation
        if layers.fused:
            assert rows[0] is not None
            return activation(F.linear(x, *rows[0]))
        return activation((layers.up if layers.gate is None else layers.gate)(x))

    def _product(self, x: Tensor, selector: Selector | None) -> Tensor:
        """Dense products, units that were not selected counting as zero; the layers run as modules."""
        layers = self._layers()
        values, factor = self._hidden(layers, x)
        if isinstance(selector, Threshold):
            values = selector.masked(values, factor)
        hidden = values if factor is None else values * factor
        if selector is not None and not isinstance(selector, Threshold):
            kept = self._named(x.reshape(-1, self._in_features))
            hidden = torch.where(kept.view(hidden.shape), hidden, 0.0)
        return layers.down(hidden)

    def _rounded_product(self, layers: _Layers, x: Tensor) -> Tensor:
        """:meth:`_product` of what int8 rows stand for."""
        assert isinstance(self.selector, Threshold)
        rows, dtype = self._rows(layers), layers.down.weight.dtype
        hidden, factor = self._values(layers, rows, x), None
        if self.gated:
            weight, bias = rows[1]
            factor = F.linear(x, self._served_up(weight).values(dtype), bias)
        hidden = self.selector.masked(hidden, factor)
        hidden = hidden if factor is None else hidden * factor
        return F.linear(hidden, self._served_down(layers).values(dtype).t(), layers.down.bias)

    def _served_up(self, up: Tensor) -> Bank:
        """The rows [units, in_features] that run of the weight ``up`` of a gated layer."""
        return Bank(up) if self._kind is None else self._kept("int8 up", lambda: Bank.int8(up), up)

    def _served_down(self, layers: _Layers) -> Bank:
        """The rows [units, out_features] that run of ``down``."""
        down = _rows.by_input(layers.down)
        if self._kind is None:
            return Bank(down)
        return self._kept("int8 down", lambda: Bank.int8_of_inputs(down), layers.down.weight)

    def _run_activated(self, layers: _Layers, x: Tensor) -> Tensor:
        """Every activation, then the units that pass: x [tokens, in_features] -> [tokens, out_features]."""
        assert isinstance(self.selector, Threshold)
        selector, rows = self.selector, self._rows(layers)
        down = self._served_down(layers)
        values = selector.centred(self._values(layers, rows, x))
        start = self._rest(layers, rows[1].bias if self.gated else None)
        if not self.gated:
            sums = threshold_accumulate(values, down.rows, selector.cut, down.scale, down.begin(start), self.ran)
            return down.end(sums, start)
        weight, bias = rows[1]
        up = self._served_up(weight)
        cut_out = selector.cut_out if selector.cut_out.numel() else None
        cuts, scales = (selector.cut, cut_out, _float(bias)), (up.scale, down.scale, down.begin(start))
        out = down.end(gated_rows(values, x, up.rows, down.rows, *cuts, *scales, self.ran), start)
        if not selector.centre.numel():
            return out
        resting = self._resting(layers, weight)
        every = resting.rows.new_zeros(resting.rows.shape[0], dtype=torch.float32)
        return out + threshold_accumulate(x, resting.rows, every, resting.scale, None, torch.zeros_like(self.ran))

    def _rest(self, layers: _Layers, bias: Tensor | None) -> Tensor | None:
        """What a token starts from, float32 [out_features]: the bias, and all that units at their centre add to it.

        bias: that of ``up`` in a gated layer, where only this is the same for every token.
        """
        assert isinstance(self.selector, Threshold)
        centre, down = self.selector.centre, layers.down
        if not centre.numel() or (self.gated and bias is None):
            return _float(down.bias)

        def make() -> Tensor:
            constant = centre * bias if self.gated and bias is not None else centre
            rest = constant.float() @ self._served_down(layers).values(torch.float32)
            return rest if down.bias is None else rest + down.bias.float()

        return self._kept("rest", make, down.weight, down.bias, bias, centre)

    def _resting(self, layers: _Layers, up: Tensor) -> Bank:
        """What units at their centre add to a token, a linear map of its input: int8 [in_features, out_features] and
        a scale float32 for each input. In int8 it loses nothing that shows, and every token reads all of it."""
        assert isinstance(self.selector, Threshold)
        centre = self.selector.centre

        def make() -> Bank:
            first, last = (bank.values(torch.float32) for bank in (self._served_up(up), self._served_down(layers)))
            return Bank.int8((first * centre[:, None]).t() @ last)

        return self._kept("resting", make, up, layers.down.weight, centre)

    def _run_named(self, layers: _Layers, x: Tensor) -> Tensor:
        """Only the units that the selector names: x [tokens, in_features] -> [tokens, out_features]."""
        (activation,) = self._activation
        ids = self.selector.select(x).per_token(x.shape[0]).contiguous()
        gate, up = self._rows(layers)
        values = gather_dot(x, up.weight, ids, None, _float(up.bias))
        if gate is None:
            values = activation(values)
        else:
            values = values * activation(gather_dot(x, gate.weight, ids, None, _float(gate.bias)))
        values = values.masked_fill(ids < 0, 0.0)
        out = gather_accumulate(values, _rows.by_input(layers.down), ids)
        self.ran[0] += x.shape[0]
        self.ran[1] += (ids >= 0).sum()
        bias = _float(layers.down.bias)
        return out if bias is None else out + bias


class _Layers(NamedTuple):
    up: Any
    gate: Any
    down: Any
    fused: bool


class _Rows(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def _turn(layer: SelectiveMLP, _keys: Any) -> None:
    """Another weight may have been put in, as ``load_state_dict(assign=True)`` does."""
    layer._lay_out(True)


def _plain(layer: Any) -> bool:
    """True if the layer's parameters are all there is to it."""
    if _rows.overridden(layer):
        return False
    return type(layer) is nn.Linear or (type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"))


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()
