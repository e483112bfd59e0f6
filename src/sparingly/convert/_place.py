"""Where a network can be made selective, and where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparingly.nn._expert_form import ExpertForm


@dataclass(frozen=True)
class Place:
    """Something that can be made selective.

    Attributes:
        path: the module to replace. Of kind "mlp" with `container`: the container; without: the same as `down`.
        kind: "mlp", "linear", "head", "conv", or "experts" (weights of all experts in one parameter).
        up, gate, down: full names of linear layers, for kind "mlp"; gate None for plain down(act(up(x))).
        activation: elementwise; the network's own module or function where there is one. None where it is elementwise
            (tested) but not known to us; `container` is then False.
        container: True: path's forward(x) is exactly the MLP, in eval and in training mode, verified with numbers.
            False: only `down` may be replaced; what it reads is the activation.
        fused: None, or "gate_up" or "up_gate": gate and up are the halves, in this order, of one matrix; gate == up.
        form: of kind "experts", which parameters are what.
        per_token: of kind "experts", how many experts a token had in the forward that was watched, 1 if it had none.
    """

    path: str
    kind: str
    up: str | None = None
    gate: str | None = None
    down: str | None = None
    activation: Callable[[Tensor], Tensor] | None = None
    container: bool = True
    fused: str | None = None
    form: ExpertForm | None = None
    per_token: int = 1


@dataclass(frozen=True)
class Skipped:
    """What cannot be made selective, and why; path "" for the whole network."""

    path: str
    reason: str
