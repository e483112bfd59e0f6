"""The weight of a Linear-like layer as a bank: one input channel, or one output unit, is one contiguous row.

A parameter keeps its shape, so that names, checkpoints and optimisers stay as they are; only its memory is turned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HALF = "weights or inputs are float16, for which there is no kernel: one dense product of the selected values"


def transposed(layer: nn.Module) -> bool:
    """True for layers whose weight is [in, out] (transformers' Conv1D), False for [out, in] (torch.nn.Linear)."""
    # nn.Module looks for a missing attribute in four places: ask the class first.
    return type(layer) is not nn.Linear and (hasattr(layer, "nf") or bool(getattr(layer, "transposed", False)))


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a Linear-like layer."""
    rows, columns = layer.weight.shape[:2]  # pyright: ignore
    return (int(rows), int(columns)) if transposed(layer) else (int(columns), int(rows))


def by_input(layer: nn.Module) -> Tensor:
    """The weight as [in_features, out_features], a view; also of a pointwise convolution's [out, in, 1, 1]."""
    weight: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
    weight = weight.flatten(1) if weight.dim() == 4 else weight
    return weight if transposed(layer) else weight.t()


def by_output(layer: nn.Module) -> Tensor:
    """The weight as [out_features, in_features], a view."""
    return by_input(layer).t()


def by_columns(weight: Tensor) -> bool:
    """True for a matrix, or several, whose columns are contiguous in memory, and its rows are not."""
    return not weight.is_contiguous() and weight.mT.is_contiguous()


@torch.no_grad()
def lay_out(weight: Tensor, *, columns: bool) -> None:
    """Turn the memory of a matrix, or of each of several [n, rows, columns], its values and shape staying: columns (or
    rows) become contiguous."""
    wanted = weight.mT if columns else weight
    if not wanted.is_contiguous():
        turned = wanted.contiguous()
        weight.data = turned.mT if columns else turned


def overridden(layer: nn.Module) -> bool:
    """True if something else than the class's ``forward`` runs: hooks, or one put on the instance (accelerate does)."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks")
_HOOKS += ("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module that takes another's place run its hooks; the handles that remove them keep working."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
