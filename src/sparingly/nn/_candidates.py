"""The classes that one training step looks at, and how likely each of them was to be among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparingly.selectors.controls import inclusion, stratified


@dataclass(frozen=True)
class Candidates:
    """The classes of a step, shared by its tokens.

    Attributes:
        ids: int64 [n], distinct, in rising order.
        log_inclusion: float32 [n], log of the chance that the class is among the candidates of a token whose right
            class it is not.
        places: int64 [tokens, m], where in ids each right class is; at pads that of the token's first right class.
        right: bool [tokens, m], False at pads.
    """

    ids: Tensor
    log_inclusion: Tensor
    places: Tensor
    right: Tensor


def draw(
    target: Tensor, num_classes: int, negatives: int, hard: Tensor | None, counts: Tensor, total: Tensor
) -> Candidates:
    """Unite the targets, random classes and the selector's hard ones.

    Args:
        target: int64 [tokens, m], right classes, -1 is a pad; at least one for each token.
        num_classes: how many classes there are.
        negatives: how many random classes to draw, distinct; all of them if there are not so many.
        hard: int64 [_], hard negatives for the batch as a whole, repeats allowed.
        counts: int64 [num_classes], how often each class was a target before; ``total`` []: the sum of it.

    A class is among the candidates because a token of the batch has it for target, or by the random draw, so its
    chance is 1 - (1 - p)^others (1 - r), with p its share of targets so far (this batch included, so that a class
    seen for the first time does not count a thousandfold), ``others`` the targets of the other tokens, and r its
    chance in the draw. Hard ones are certain. Nothing here is as long as the number of classes.
    """
    right = target >= 0
    wanted = target[right]
    count = min(negatives, num_classes)
    parts = [wanted] if hard is None else [wanted, hard]
    if count:
        parts.append(stratified(num_classes, count, (), target.device))
    ids = torch.cat(parts).sort().values
    ids = torch.cat([ids[:1], ids[1:][ids[1:] != ids[:-1]]])
    found = torch.searchsorted(ids, wanted)
    seen = torch.bincount(found, minlength=ids.shape[0])
    share = (counts.index_select(0, ids) + seen) / (total + wanted.shape[0])
    others = wanted.shape[0] - wanted.shape[0] / max(target.shape[0], 1)
    missed = torch.log1p(-share.clamp_max(1 - 2**-20)) * others
    if count:
        missed += torch.log1p(-inclusion(ids, num_classes, count))
    log_inclusion = (-torch.expm1(missed)).clamp_min(1e-12).log()
    if hard is not None:
        log_inclusion[torch.searchsorted(ids, hard)] = 0.0
    return Candidates(ids, log_inclusion, _places(right, found), right)


def _places(right: Tensor, found: Tensor) -> Tensor:
    """found [number of right classes] -> [tokens, m], pads like the token's first right class."""
    if right.shape[1] == 1:
        return found.view_as(right)
    places = torch.zeros_like(right, dtype=torch.int64).masked_scatter_(right, found)
    first = places.gather(1, right.byte().argmax(dim=1, keepdim=True))
    return torch.where(right, places, first)
