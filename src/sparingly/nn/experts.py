"""Experts of a trained mixture that keep all their weights in one parameter, of which the units run that matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from sparingly.nn import _rows
from sparingly.nn._expert_form import (
    CALLS,
    LAYOUTS,
    ExpertForm,
    Halves,
    Routed,
    activated,
    combine,
    dense_hidden,
    each,
    factors,
    halves,
    mixture,
    normed,
    weights_of,
)
from sparingly.nn.sample import Option, Sample
from sparingly.nn.selective import (
    GRADIENTS,
    MANY,
    MOST_TOKENS,
    Selective,
    level_options,
    needs_gradient,
)
from sparingly.ops import gather_accumulate, gather_dot
from sparingly.selectors.threshold import Threshold

WRAPPED = "a parameter is computed from others (an adapter): one product for each expert of the selected values"

PRIOR_PAIRS = 8
"""How many tokens of an expert the guess of its units' importance from the weights alone counts for."""


class SelectiveExperts(Selective):
    """Stands in for a module that holds the weights of all experts of a mixture, and shares its parameters.

    The router goes on choosing experts. Of the experts of a token, the activation of every unit is computed (the
    gate's, where there is one), and only the units that pass run in the other weights. Parameters keep their names and
    shapes; in their memory each unit is one contiguous row, so that all experts together are one bank.

    One set of quantiles serves all experts of a layer, each unit counting with its importance, which for experts that
    had few tokens leans on the norms of their rows. Units that do not run count as zero: what they are near to instead
    (see :class:`Threshold`) would need a matrix for each expert.

    Many tokens, or gradients, take one product for each expert of the same selection.

    Args:
        original: the module to stand in for.
        form: where its weights are and how they are put together.
        selector: a :class:`Threshold` over the units of all experts, [experts * units].
        per_token: how many experts a token has, known better after the first forward.
    """

    selector: Threshold
    takes_int8 = False

    def __init__(self, original: nn.Module, form: ExpertForm, selector: Threshold, per_token: int = 1):
        super().__init__()
        for name, parameter in original._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in original._buffers.items():
            self.register_buffer(name, buffer, name not in original._non_persistent_buffers_set)
        for name, child in original._modules.items():
            self.add_module(name, child)
        self._begin(original, selector)
        self.form, self.per_token = form, per_token
        weights = weights_of(form, original)
        self._experts, self._out_features, self._units = weights.down.shape
        self._in_features = weights.first.shape[2]
        selector.prepare(self.bank_units, weights.down.device)
        self._columns = {name: _rows.by_columns(weight) for name, weight in self._cubes()}
        self._lay_out(True)
        _rows.share_hooks(original, self)
        self.register_load_state_dict_post_hook(_turn)
        self.training = selector.training = original.training

    def _cubes(self) -> list[tuple[str, Tensor]]:
        names = dict.fromkeys((self.form.gate, self.form.up, self.form.down))
        return [(name, weight) for name in names if name and (weight := self._parameters.get(name)) is not None]

    def _lay_out(self, selective: bool) -> None:
        for name, weight in self._cubes():
            down = name == self.form.down
            wanted = down != self.form.transposed[down]
            _rows.lay_out(weight, columns=wanted if selective else self._columns[name])

    def dense(self) -> nn.Module:
        """The original module with the parameters that stand here now."""
        self._lay_out(False)
        original = self._current()
        original.training = self.training
        _rows.share_hooks(self, original)
        return original

    def _current(self) -> nn.Module:
        """The original module with today's parameters, in the memory that stands here."""
        (original,) = self._original
        for part in ("_parameters", "_buffers", "_modules"):
            today = self.__dict__[part]
            for name in original.__dict__[part]:
                original.__dict__[part][name] = today[name]
        return original

    @property
    def _down(self) -> Tensor:
        return attrgetter(self.form.down)(self)

    @property
    def num_units(self) -> int:
        """Hidden units of the experts of one token."""
        return self.per_token * self._units

    @property
    def gated(self) -> bool:
        """True for experts ``down(act(gate(x)) * up(x))``."""
        return self.form.gate is not None

    def operators(self) -> tuple[str, ...]:
        """See :meth:`Selective.operators`."""
        return ("gather_dot", "gather_accumulate")

    def _unit_bytes(self, kind: str | None) -> tuple[int, int]:
        """In the matrices that skip; there are no int8 rows."""
        size = self._down.element_size()
        return size * self._in_features * int(self.gated), size * self._out_features

    def fixed_bytes(self) -> int:
        """Bytes of the matrices that compute every activation of a token's experts."""
        return self.num_units * self._in_features * self._down.element_size()

    def bytes_read(self, first: float, second: float) -> float:
        """See :meth:`Selective.bytes_read`."""
        before, after = self._unit_bytes(None)
        return self.fixed_bytes() + before * first + after * second

    @property
    def bank_units(self) -> int:
        """Units of all experts: what the selector is fitted to."""
        return self._experts * self._units

    @torch.no_grad()
    def observed(self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """A call's arguments -> float32 [tokens, in + 2 k], what :meth:`fit` needs of each token in one row: its
        hidden state, the ids of its experts, and their weights; and which tokens have an expert at all."""
        x, ids, weights = CALLS[self.form.call](self._experts, *self._arguments(inputs, named))
        weights = torch.ones_like(ids, dtype=torch.float32) if weights is None else weights.float()
        return torch.cat((x.float(), ids.float(), weights), dim=1), (ids < self._experts).any(dim=1).nonzero()[:, 0]

    def _arguments(self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> list[Tensor]:
        return [*inputs, *(named[name] for name in self.form.arguments[len(inputs) :] if name in named)]

    @torch.no_grad()
    def fit(self, sample: Sample) -> list[Option]:
        """See :meth:`Selective.fit`."""
        selector = self.selector
        packed = sample.inputs[:, self._in_features :]
        self.per_token = packed.shape[1] // 2
        ids, scale = packed[:, : self.per_token].reshape(-1).long(), packed[:, self.per_token :].reshape(-1)
        live = ids < self._experts
        values, factor, spread = self._spread(sample, ids, scale)
        moved = spread if factor is None else spread * factor
        experts = ids.clamp_max(self._experts - 1)
        if selector.threshold is None:
            importance = self._importance(moved, experts, live)
            out = importance[:0] if factor is None else self._importance(spread, experts, live)
            sizes = values.abs() * importance[experts]
            selector.settle(sizes[live], importance.flatten(), out.flatten(), out.new_empty(0))
            both = sizes if factor is None else torch.minimum(sizes, (values * factor).abs() * out[experts])
            # What no expert has is never run, whatever the level.
            sizes, both = (part.masked_fill(~live[:, None], -1.0) for part in (sizes, both))
        else:
            selector.prepare(self.bank_units, values.device)
            sizes = both = values
        by_token = (-1, self.num_units)

        def kept() -> Tensor:
            return (self._keeps(values, experts) & live[:, None]).reshape(by_token)

        return level_options(self, (sizes.view(by_token), both.view(by_token)), (values * moved).view(by_token), kept)

    def _spread(self, sample: Sample, ids: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of each (token, expert) pair: activations [pairs, units], what they are multiplied with, and how much the
        loss moves with the product; zeros for what is no expert's."""
        weights = each(weights_of(self.form, self))
        (owner,) = self._original
        values = torch.zeros(ids.shape[0], self._units, device=ids.device)
        spread, factor = torch.zeros_like(values), torch.zeros_like(values) if self.gated else None
        for expert in ids.unique().tolist():
            if expert >= self._experts:
                continue
            mine, pairs = weights[expert], (ids == expert).nonzero()[:, 0]
            tokens = pairs.div(self.per_token, rounding_mode="floor")
            x = sample.inputs[tokens, : self._in_features].to(mine.down.dtype)
            gate, up = halves(self.form, mine, x)
            values[pairs] = activated(self.form, owner, gate).float()
            hidden = values[pairs]
            if up is not None and factor is not None:
                factor[pairs] = factors(self.form, owner, up).float()
                hidden = combine(self.form, owner, gate, up).float()
            gradient = sample.gradients[tokens] * scale[pairs, None]
            spread[pairs] = self._before_norm(mine, hidden, gradient) @ mine.down.float()
        return values, factor, spread

    def _before_norm(self, mine: Any, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Gradients [pairs, out] of what comes out of the norm -> of what goes into it."""
        if self.form.norm is None:
            return gradient
        (owner,) = self._original
        out = hidden @ mine.down.float().t()
        with torch.enable_grad():
            leaf = (out if mine.down_bias is None else out + mine.down_bias.float()).requires_grad_()
            (back,) = torch.autograd.grad(normed(self.form, owner, leaf), leaf, gradient)
        return back

    def _importance(self, moved: Tensor, experts: Tensor, live: Tensor) -> Tensor:
        """moved [pairs, units] -> its root mean square for each unit, [experts, units].

        Experts with few tokens lean on a guess from the norms of their rows, scaled to what was seen of all others.
        """
        shape = (self._experts, self._units)
        sums = torch.zeros(shape, device=moved.device).index_add_(0, experts, moved.square() * live[:, None])
        counts = torch.zeros(self._experts, device=moved.device).index_add_(0, experts, live.float())[:, None]
        weights = weights_of(self.form, self)
        guess = weights.down.float().square().sum(dim=1)
        guess = guess * (float(sums.sum()) / max(float((guess * counts).sum()), 1e-30))
        found = ((sums + PRIOR_PAIRS * guess) / (counts + PRIOR_PAIRS)).sqrt()
        return found.clamp_min(float(found.max()) * 1e-6 + 1e-12)

    def _keeps(self, values: Tensor, experts: Tensor, product: Tensor | None = None) -> Tensor:
        """values [pairs, units] of these experts [pairs] -> bool, which run; product: with the factor, for the second
        cut. NaN always does, so that it shows."""
        shape, selector = (self._experts, self._units), self.selector
        kept = ~(values.abs() < selector.cut.view(shape)[experts])
        if product is not None and selector.cut_out.numel():
            kept &= ~(product.abs() < selector.cut_out.view(shape)[experts])
        return kept

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Arguments and answer as of the original module."""
        arguments = self._arguments(inputs, named)
        routed = CALLS[self.form.call](self._experts, *arguments)
        if not torch.compiler.is_compiling():
            self.per_token = routed.ids.shape[1]
        x, rows = routed.x, None
        if self.form.call == "sorted":
            rows = (routed.ids[:, 0] < self._experts).nonzero()[:, 0]
        tokens = x.shape[0] if rows is None else rows.shape[0]
        idle = self._idle()
        reason = idle or self._why_many(routed, tokens)
        if reason is None:
            out = self._run(routed) if rows is None else self._run_rows(routed, rows)
            return out.to(x.dtype).view(arguments[0].shape)
        self._note(reason, tokens)
        if idle is not None and not self._wrapped:
            return self._current().forward(*inputs, **named)
        (owner,) = self._original
        hidden = self._masked if idle is None else dense_hidden(self.form, owner)
        return mixture(self.form, self, owner, routed, hidden).view(arguments[0].shape)

    @property
    def _wrapped(self) -> bool:
        # As PEFT does with parameters.
        return "parametrizations" in self._modules

    def _why_many(self, routed: Routed, tokens: int) -> str | None:
        """Why the selected units are run as products of whole experts, or None."""
        if tokens > MOST_TOKENS:
            return MANY
        if torch.is_grad_enabled() and needs_gradient(routed.x, routed.weights, *self.parameters()):
            return GRADIENTS
        if self._wrapped:
            return WRAPPED
        return _rows.HALF if torch.float16 in (routed.x.dtype, self._down.dtype) else None

    def _masked(self, expert: int, _pairs: Tensor, given: Halves) -> Tensor:
        """What ``down`` reads of the tokens of one expert, what the selector leaves out counting as zero."""
        (owner,) = self._original
        values = activated(self.form, owner, given.gate)
        hidden = values if given.up is None else combine(self.form, owner, given.gate, given.up)
        experts = torch.full(values.shape[:1], expert, device=values.device)
        return hidden.masked_fill(~self._keeps(values, experts, hidden if self.gated else None), 0.0)

    def _run_rows(self, routed: Routed, rows: Tensor) -> Tensor:
        """:meth:`_run` of some rows alone; the others get nothing."""
        part = self._run(Routed(routed.x[rows], routed.ids[rows], None))
        return part.new_zeros(routed.x.shape[0], part.shape[1]).index_copy_(0, rows, part)

    def _run(self, routed: Routed) -> Tensor:
        """Only the units that pass: -> [tokens, out] float32."""
        x, ids, scale = routed
        form, (owner,) = self.form, self._original
        k, units = ids.shape[1], torch.arange(self._units, device=x.device)
        live, experts = (ids < self._experts).reshape(-1), ids.reshape(-1).clamp_max(self._experts - 1)
        pairs, weights = (x if k == 1 else x.repeat_interleave(k, dim=0)), weights_of(form, self)
        places = self._places(weights, experts)
        gate = gather_dot(pairs, _bank(weights.first), places[0].masked_fill(~live[:, None], -1), None, self._bias(0))
        values = activated(form, owner, gate)
        kept = self._keeps(values, experts) & live[:, None]
        hidden = values
        if self.gated:
            bank, bias = (weights.first, 0) if weights.second is None else (weights.second, 1)
            up = gather_dot(pairs, _bank(bank), places[1].masked_fill(~kept, -1), None, self._bias(bias))
            hidden = combine(form, owner, gate, up).masked_fill(~kept, 0.0)
            passed = kept & self._keeps(values, experts, hidden)
        else:
            passed = kept
        self.ran[0] += x.shape[0]
        self.ran[1] += kept.sum()
        self.ran[3] += passed.sum()
        rows = (experts[:, None] * self._units + units).masked_fill(~passed, -1)
        out = gather_accumulate(hidden, _bank(weights.down.mT), rows)
        bias = self._bias(2)
        if bias is not None:
            out = out + bias.view(self._experts, -1)[experts]
        out = normed(form, owner, out)
        out = torch.where(live[:, None], out, pairs if form.beyond == "input" else 0.0)
        if scale is not None:
            out = out * scale.reshape(-1, 1)
        return out if k == 1 else out.view(x.shape[0], k, -1).sum(dim=1)

    def _places(self, weights: Any, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the units of these experts [pairs], each [pairs, units], in the banks of the gate and of up."""
        units, height = torch.arange(self._units, device=experts.device), weights.first.shape[1]
        if not self.form.fused:
            rows = experts[:, None] * height + units
            return rows, rows
        gate, up = (part.start + units * (part.step or 1) for part in LAYOUTS[self.form.layout](self._units))
        return experts[:, None] * height + gate, experts[:, None] * height + up

    def _bias(self, place: int) -> Tensor | None:
        """The bias of first, second or down as float32 [experts * rows]."""
        bias = weights_of(self.form, self)[3 + place]
        return None if bias is None else self._kept(f"bias {place}", lambda: bias.detach().float().flatten(), bias)


def _bank(weight: Tensor) -> Tensor:
    """weight [experts, rows, n], in whose memory rows are contiguous, as [experts * rows, n]."""
    return weight.reshape(-1, weight.shape[2])


def _turn(layer: SelectiveExperts, _keys: Any) -> None:
    """Another weight may have been put in, as ``load_state_dict(assign=True)`` does."""
    layer._lay_out(True)
