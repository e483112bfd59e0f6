"""What a head refuses before it does anything, and which tokens still lack an answer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops._arrays import FLOATS, check_finite
from sparingly.ops._numba import kernel as compiled


def check_hidden(hidden: Tensor, in_features: int, *, finite: bool = False) -> None:
    """Raise TypeError or ValueError unless hidden is floating [tokens, in_features], and finite if asked.

    Names the first token that is not finite.
    """
    if hidden.dtype not in FLOATS:
        raise TypeError(f"hidden must be float32, bfloat16 or float64, got {hidden.dtype}")
    if hidden.dim() != 2 or hidden.shape[1] != in_features:
        raise ValueError(
            f"hidden must be [tokens, in_features] with in_features = {in_features}, got {list(hidden.shape)}"
        )
    if finite:
        check_finite("hidden", hidden)


def check_target(target: Tensor, tokens: int, num_classes: int) -> Tensor:
    """target int64 [tokens] or [tokens, m] -> [tokens, m], -1 is a pad.

    Raises TypeError, ValueError or IndexError for another dtype or shape, a token without a right class, or a class
    out of range.
    """
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.dim() not in (1, 2) or target.shape[0] != tokens or target.numel() == 0:
        raise ValueError(
            f"target must be [tokens] or [tokens, m] with tokens = {tokens}, at least 1 of each, "
            f"got {list(target.shape)}"
        )
    lowest, highest = (int(value) for value in torch.aminmax(target))
    several = target.dim() == 2
    if highest >= num_classes or lowest < (-1 if several else 0):
        worst = highest if highest >= num_classes else lowest
        pad = ", or -1 for a pad" if several else ""
        raise IndexError(f"target must be in 0..{num_classes - 1}{pad}, got {worst}")
    if not several:
        return target.unsqueeze(1)
    if lowest < 0:
        none = (target < 0).all(dim=1).nonzero()
        if none.numel():
            raise ValueError(f"every token needs a right class, got none for token {int(none[0])}")
    return target


@compiled
def _count_missing(classes):
    """How many rows of classes [tokens, k] end in a pad."""
    missing = 0
    for token in range(classes.shape[0]):
        missing += classes[token, classes.shape[1] - 1] < 0
    return missing


def missing_rows(classes: Tensor) -> Tensor | None:
    """classes [tokens, k], best first -> the tokens with fewer than k, int64 [_], or None if there are none."""
    if classes.is_cpu and not _count_missing(classes.numpy()):
        return None
    missing = (classes[:, -1] < 0).nonzero().squeeze(1)
    return missing if missing.numel() else None
