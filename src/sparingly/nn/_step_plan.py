"""The addresses with which one token goes through the layers of a converted Llama-type network as one compiled call.

Between the 210 operators that a token of SmolLM2-135M calls, Python takes two thirds of the time that the operators
do; here it builds a table of addresses once.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly.nn import _rows
from sparingly.nn import _step_kernels as kernels
from sparingly.nn._int8 import Bank
from sparingly.nn.linear import SelectiveLinear
from sparingly.nn.mlp import SelectiveMLP
from sparingly.nn.selective import Selective
from sparingly.ops._pages import HUGE_PAGE_BYTES, request_huge_pages
from sparingly.ops._views import LIKE
from sparingly.selectors.threshold import Threshold

LEDGER = "a ledger counts: the modules run, so that it sees them"


class Unplanned(Exception):
    """Why a network cannot be decoded as one compiled call."""


class Watch:
    """Notices changes in layers that a table of addresses was made from."""

    def __init__(self, layers: list[Any]):
        self.modules = modules = [module for layer in layers for module in layer.modules()]
        self.selective = [module for module in modules if isinstance(module, Selective)]
        self.places = [
            (held, name) for m in modules for held in (m._modules, m._parameters, m._buffers) for name in held
        ]
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.cuts = [module.selector._buffers for module in self.selective]
        self.found: list[Any] | None = None

    def remember(self) -> None:
        """What is there now is what later calls compare with."""
        self.found = [held.get(name) for held, name in self.places]
        tensors = [found for found in self.found if isinstance(found, Tensor)]
        counters = {id(module.ran) for module in self.selective}
        self.tensors = tensors
        # Counters change with every token, and tensors of inference mode do not say when they do.
        self.versioned = [t for t in tensors if not t.is_inference() and id(t) not in counters]
        self.mark, self.now = self._mark(), self._switches()

    def switched(self) -> bool:
        """Whether a setting, ``off`` or ``rows`` changed; 0.03 ms, 1 ms for :meth:`changed`."""
        return self.found is None or self._switches() != self.now

    def changed(self) -> bool:
        """Whether anything did."""
        if self.found is None or self.switched():
            return True
        now = [held.get(name) for held, name in self.places]
        return not all(map(is_, now, self.found)) or self._mark() != self.mark

    def _switches(self) -> tuple[list[int], list[tuple[bool, str | None]]]:
        # A new setting is a new tensor; the old ones are held, so that no new one has the same number.
        return [id(held["cut"]) for held in self.cuts], [(module.off, module.rows) for module in self.selective]

    def _mark(self) -> tuple[Any, ...]:
        pointers = [tensor.data_ptr() for tensor in self.tensors]
        return pointers, [tensor._version for tensor in self.versioned], any(self.hooks)


class StepPlan:
    """The addresses of a network's layers. Raises :class:`Unplanned` for layers of another kind."""

    def __init__(self, layers: list[Any], heads: tuple[int, int, int], scaling: float):
        """heads: how many of queries, of keys and values, and their width."""
        self.keep: list[Tensor] = []
        first, norms = layers[0].mlp, [(layer.input_layernorm, layer.post_attention_layernorm) for layer in layers]
        if not isinstance(first, SelectiveMLP):
            raise Unplanned("mlp is not a SelectiveMLP")
        self.sizes = norms[0][0].weight.numel(), first.num_units, *heads
        self.dtype = first._served_down(first._layers()).rows.dtype
        if self.dtype not in LIKE:
            raise Unplanned(f"weights are {self.dtype}, not float32 or bfloat16, and have no int8 rows")
        rows = []
        for number, layer in enumerate(layers):
            try:
                rows.append(self._layer(layer, norms[number]))
            except Unplanned as reason:
                raise Unplanned(f"layer {number}: {reason}") from None
        self.table = np.array(rows, np.int64)
        self.eps = np.array([[norm.variance_epsilon for norm in pair] for pair in norms], np.float32)
        self.scaling = scaling

    def run(self, x: Tensor, position: int, cos: Tensor, sin: Tensor, cache: Tensor) -> None:
        """x float32 [1, d] -> what comes out of the last layer, in its place.

        All float32 and contiguous: cos and sin of the position [width], cache [layers, 2, shared, positions, width].
        """
        work = torch.empty(kernels.workspace(*self.sizes))
        kernels.decode(
            LIKE[self.dtype],
            self.table,
            self.eps,
            (*self.sizes, cache.shape[3], position),
            self.scaling,
            *[tensor.data_ptr() for tensor in (x, work, cos, sin, cache)],
        )

    def _layer(self, layer: Any, norms: tuple[Any, Any]) -> list[int]:
        d, n, heads, shared, width = self.sizes
        attention, inner, outer = layer.self_attn, heads * width, shared * width
        _gather(_codes(layer) if self.dtype is torch.int8 else _weights(layer))
        found = []
        for name, shape in (("q", (d, inner)), ("k", (d, outer)), ("v", (d, outer)), ("o", (inner, d))):
            found += self._linear(f"{name}_proj", getattr(attention, f"{name}_proj"), shape)
        found += self._mlp(layer.mlp, d, n)
        return found + [self._vector(norm.weight, d) for norm in norms]

    def _linear(self, name: str, layer: Any, shape: tuple[int, int]) -> list[int]:
        """Addresses from WEIGHT to RAN."""
        if type(layer) is not SelectiveLinear:
            raise Unplanned(f"{name} is not a SelectiveLinear")
        selector = _threshold(name, layer)
        return [
            *self._bank(name, layer._served(), shape),
            self._vector(selector.cut, shape[0]),
            self._vector(selector.centre, shape[0]),
            self._vector(layer._rest(), shape[1]),
            self._at(layer.ran),
        ]

    def _mlp(self, mlp: Any, d: int, n: int) -> list[int]:
        """The gate's addresses, then those from UP to MLP_RAN."""
        if type(mlp) is not SelectiveMLP or not mlp.gated:
            raise Unplanned("mlp is not a gated SelectiveMLP")
        layers, selector = mlp._layers(), _threshold("mlp", mlp)
        if layers.fused or not _silu(mlp._activation[0]):
            raise Unplanned("mlp has one matrix for gate and up, or another activation than silu")
        if not all(type(part) is nn.Linear and not _rows.overridden(part) for part in (layers.up, layers.down)):
            raise Unplanned("up or down is not a plain nn.Linear")
        resting = mlp._resting(layers, layers.up.weight) if selector.centre.numel() else None
        bias = None if layers.up.bias is None else layers.up.bias.detach().float()
        return [
            *self._linear("gate", layers.gate, (d, n)),
            *self._bank("up", mlp._served_up(layers.up.weight), (n, d))[:2],
            *self._bank("down", mlp._served_down(layers), (n, d)),
            self._vector(bias, n),
            self._vector(selector.cut, n),
            self._vector(selector.cut_out, n),
            self._vector(selector.centre, n),
            self._vector(mlp._rest(layers, layers.up.bias), d),
            0 if resting is None else self._at(resting.rows),
            self._vector(None if resting is None else resting.scale, d),
            self._at(mlp.ran),
        ]

    def _bank(self, name: str, bank: Bank, shape: tuple[int, int]) -> tuple[int, int, int]:
        """The addresses of the rows, of their scales and of the outputs'."""
        rows = bank.rows
        if rows.dtype != self.dtype or rows.shape != shape or not rows.is_contiguous():
            want = f"{list(shape)}, contiguous, {self.dtype}"
            raise Unplanned(f"{name}'s rows must be {want}; got {list(rows.shape)}, {rows.dtype}")
        return self._at(rows), self._vector(bank.scale, shape[0]), self._vector(bank.outputs, shape[1])

    def _vector(self, vector: Tensor | None, size: int) -> int:
        """The address of float32 [size], a copy of it where it is of another type; 0 for none or an empty one."""
        if vector is None or not vector.numel():
            return 0
        if vector.shape != (size,):
            raise Unplanned(f"a vector must be [{size}], got {list(vector.shape)}")
        return self._at(vector.detach().float().contiguous())

    def _at(self, tensor: Tensor) -> int:
        if not tensor.is_cpu or tensor.is_neg():
            raise Unplanned(f"tensors must be on the CPU, got {tensor.device}")
        # Another tensor of the same memory: a parameter may be given new memory.
        self.keep.append(tensor.detach())
        return tensor.data_ptr()


def _weights(layer: Any) -> list[Tensor]:
    return [part.weight for part in layer.modules() if isinstance(part, nn.Linear)]


def _codes(layer: Any) -> list[Tensor]:
    """The int8 rows that the modules of a layer keep."""
    found: list[Tensor] = []
    for part in layer.modules():
        if isinstance(part, SelectiveLinear) and part.rows is not None:
            found.append(part._served().rows)
        elif isinstance(part, SelectiveMLP) and part.gated and part.rows is not None:
            layers = part._layers()
            found += [bank.rows for bank in (part._served_up(layers.up.weight), part._served_down(layers))]
    return found


def _gather(weights: list[Tensor]) -> None:
    """Move matrices of one dtype side by side into memory of 2 MB pages: most are smaller than such a page, or not
    many times as large. Nothing is done where they lie so already."""
    if len({weight.dtype for weight in weights}) != 1 or not all(weight.is_cpu for weight in weights):
        return
    if len({weight.untyped_storage().data_ptr() for weight in weights}) == 1:
        return
    size, element = sum(weight.numel() for weight in weights), weights[0].element_size()
    page = HUGE_PAGE_BYTES // element
    room = torch.empty((-(-size // page) + 1) * page, dtype=weights[0].dtype)
    first = -(room.data_ptr() // element) % page
    room = room[first : first + -(-size // page) * page]
    request_huge_pages(room)
    for weight in weights:
        turned = not weight.is_contiguous()
        source = weight.t() if turned else weight
        place, room = room[: weight.numel()].view(source.shape), room[weight.numel() :]
        place.copy_(source)
        weight.data = place.t() if turned else place


def _threshold(name: str, layer: Selective) -> Threshold:
    if not isinstance(layer.selector, Threshold):
        raise Unplanned(f"{name} has no Threshold")
    reason = layer._idle() or ("it has hooks" if _rows.overridden(layer) else None)
    if reason is not None:
        raise Unplanned(f"{name}: {reason}")
    return layer.selector


def _silu(activation: Any) -> bool:
    return activation is F.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")
