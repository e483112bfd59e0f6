"""Where the weights of all experts of a mixture lie, as names, and what they compute of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ExpertForm:
    """How a module keeps its experts, each ``down(act(up(x)))`` or ``down(act(gate(x)) * up(x))``: names alone.

    Attributes:
        call: a row of :data:`CALLS`, how the module is told which expert serves which token.
        arguments: names of its forward's arguments, in order.
        up, down, gate: parameters [experts, out, in]. ``gate == up``: one fused parameter.
        transposed: whether up and gate, and whether down, are [experts, in, out] instead.
        stacked: so many experts are [experts * rows, columns] in every parameter; None: they have three dimensions.
        layout: of a fused parameter, a row of :data:`LAYOUTS`.
        activation: attribute (of a child, with dots) that holds the elementwise activation; None: the module's
            ``_apply_gate`` puts gate and up together.
        neutral: the value of up(x) at which what ``_apply_gate`` gives is the gate's activation.
        biases: parameters [experts, out] of up, down and gate, or None.
        norm: child through which every expert's output goes, or None.
        beyond: what a token gets of an expert that has no weights: nothing, or itself.
    """

    call: str
    arguments: tuple[str, ...]
    up: str
    down: str
    gate: str | None = None
    layout: str = "gate_up"
    transposed: tuple[bool, bool] = (False, False)
    stacked: int | None = None
    activation: str | None = None
    neutral: float = 1.0
    biases: tuple[str | None, str | None, str | None] = (None, None, None)
    norm: str | None = None
    beyond: str = "nothing"

    @property
    def fused(self) -> bool:
        """True if gate and up are parts of one parameter."""
        return self.gate == self.up


LAYOUTS: dict[str, Callable[[int], tuple[slice, slice]]] = {
    "gate_up": lambda units: (slice(0, units), slice(units, 2 * units)),
    "interleaved": lambda units: (slice(0, 2 * units, 2), slice(1, 2 * units, 2)),
    "up_gate": lambda units: (slice(units, 2 * units), slice(0, units)),
}
"""Name -> of how many units -> which rows of a fused parameter are the gate's, and which up's."""


class Routed(NamedTuple):
    """Tokens x [tokens, in], the experts of each, ids int64 [tokens, k], and their weights [tokens, k] or None."""

    x: Tensor
    ids: Tensor
    weights: Tensor | None


def _routed(experts: int, x: Tensor, ids: Tensor, weights: Tensor) -> Routed:
    return Routed(x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, ids.shape[-1]))


def _shared(experts: int, x: Tensor, weights: Tensor) -> Routed:
    flat = x.reshape(-1, x.shape[-1])
    ids = torch.arange(experts, device=x.device).expand(flat.shape[0], experts)
    return Routed(flat, ids, weights.reshape(-1, experts))


def _sorted(experts: int, x: Tensor) -> Routed:
    """A row for each expert and token, all zeros where the expert is not the token's: such a row needs nothing."""
    flat = x.reshape(-1, x.shape[-1])
    ids = torch.arange(flat.shape[0], device=x.device).div(flat.shape[0] // experts, rounding_mode="floor")
    return Routed(flat, torch.where((flat != 0).any(dim=1), ids, experts)[:, None], None)


CALLS: dict[str, Callable[..., Routed]] = {"routed": _routed, "shared": _shared, "sorted": _sorted}
"""How the arguments of a call name experts: ``(x, ids, weights)``, ``(x, weights)`` of all, or ``(x)`` by its rows."""


class Weights(NamedTuple):
    """Views of a module's parameters, never copies: first (gate and up where they are fused, else what is activated)
    [experts, rows, in], second (up where it is apart, else None), down [experts, out, units], and their biases."""

    first: Tensor
    second: Tensor | None
    down: Tensor
    first_bias: Tensor | None
    second_bias: Tensor | None
    down_bias: Tensor | None


def weights_of(form: ExpertForm, module: nn.Module) -> Weights:
    """What the form names in the module."""

    def get(name: str | None) -> Tensor | None:
        return None if name is None else attrgetter(name)(module)

    def turned(name: str | None) -> Any:
        weight = get(name)
        if weight is not None and form.stacked is not None:
            weight = weight.view(form.stacked, -1, weight.shape[1])
        return weight.mT if weight is not None and form.transposed[name == form.down] else weight

    up_bias, down_bias, gate_bias = map(get, form.biases)
    if form.gate is None or form.fused:
        return Weights(turned(form.up), None, turned(form.down), up_bias, None, down_bias)
    return Weights(turned(form.gate), turned(form.up), turned(form.down), gate_bias, up_bias, down_bias)


def combine(form: ExpertForm, owner: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """What a gated expert's ``down`` reads, of gate [..., units] and up [..., units] before any activation."""
    if form.activation is not None:
        return attrgetter(form.activation)(owner)(gate) * up
    if form.layout == "interleaved":
        both = torch.stack((gate, up), dim=-1).flatten(-2)
    else:
        both = torch.cat((gate, up) if form.layout == "gate_up" else (up, gate), dim=-1)
    return owner._apply_gate(both)  # pyright: ignore[reportCallIssue]


def activated(form: ExpertForm, owner: nn.Module, x: Tensor) -> Tensor:
    """The activation of what the first weight gave, x [..., units]."""
    if form.activation is not None:
        return attrgetter(form.activation)(owner)(x)
    return combine(form, owner, x, torch.full_like(x, form.neutral))


def factors(form: ExpertForm, owner: nn.Module, up: Tensor) -> Tensor:
    """What the gate's activation is multiplied with, of up [..., units]."""
    if form.activation is not None:
        return up
    one = torch.ones_like(up)
    return combine(form, owner, one, up) / activated(form, owner, one)


class Halves(NamedTuple):
    """Of one expert and its tokens: gate and up [tokens, units] before any activation, up None where there is none."""

    gate: Tensor
    up: Tensor | None


def halves(form: ExpertForm, weights: Sequence[Any], x: Tensor) -> Halves:
    """One expert's weights (a :class:`Weights` of its own) and x [tokens, in] -> what its activation reads."""
    first, second, _, first_bias, second_bias, _ = weights
    both = F.linear(x, first, first_bias)
    if form.gate is None:
        return Halves(both, None)
    if not form.fused:
        return Halves(both, F.linear(x, second, second_bias))
    gate, up = LAYOUTS[form.layout](both.shape[-1] // 2)
    return Halves(both[..., gate], both[..., up])


def each(weights: Weights) -> list[Weights]:
    """The weights of each expert."""
    count = weights.down.shape[0]
    # One unbind of each parameter: its backward writes one gradient, that of an index as many as there are experts.
    parts = [[None] * count if part is None else part.unbind(0)[:count] for part in weights]
    return [Weights(*own) for own in zip(*parts, strict=True)]


Hidden = Callable[[int, Tensor, Halves], Tensor]
"""(expert, its (token, choice) pairs as places in the flattened ids, halves) -> what down reads [pairs, units]."""


def mixture(form: ExpertForm, module: nn.Module, owner: nn.Module, routed: Routed, hidden: Hidden) -> Tensor:
    """The dense product of all tokens: [tokens, out] in their dtype, one product for each expert that has any.

    module holds the parameters, owner the activation and the norm.
    """
    x, ids, scale = routed
    own, k = each(weights_of(form, module)), ids.shape[1]
    flat = ids.reshape(-1)
    sums = torch.zeros(x.shape[0], own[0].down.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)).to(x.device)
    for expert in flat.unique().tolist():
        pairs = (flat == expert).nonzero()[:, 0]
        tokens = pairs.div(k, rounding_mode="floor")
        if expert < len(own):
            mine = own[expert]
            given = hidden(expert, pairs, halves(form, mine, x[tokens]))
            out = normed(form, owner, F.linear(given, mine.down, mine.down_bias))
        elif form.beyond == "input":
            out = x[tokens]
        else:
            continue
        if scale is not None:
            out = out * scale.reshape(-1)[pairs, None]
        sums = sums.index_add(0, tokens, out.to(sums.dtype))
    return sums.to(x.dtype)


def normed(form: ExpertForm, owner: nn.Module, out: Tensor) -> Tensor:
    """out [..., out] of experts through the norm, where there is one."""
    return out if form.norm is None else getattr(owner, form.norm)(out)


def dense_hidden(form: ExpertForm, owner: nn.Module) -> Hidden:
    """Every unit, for :func:`mixture`."""

    def hidden(_expert: int, _pairs: Tensor, given: Halves) -> Tensor:
        if given.up is None:
            return activated(form, owner, given.gate)
        return combine(form, owner, given.gate, given.up)

    return hidden
