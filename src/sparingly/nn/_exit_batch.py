"""A batch that exits make shorter: who is left, what layers behind an exit are given, and what an exit pools."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MASK = "attention_mask"
"""The argument that is 1 at an example's own tokens and 0 at padding, [n, tokens]."""

GRID = 4
"""An early layer knows what is where, which one mean over the picture loses."""


class Batch:
    """A batch some of which have left; what layers before an exit were given as well as later ones is cut to the rest.

    An encoder gives every layer the same attention mask, as long as the batch was at first. Such a tensor is known by
    its identity, not by its length: what comes out of a layer behind the exit may happen to be as long.

    Attributes:
        waiting: int64 [m], which examples are left.
        mask: [n, tokens], what some layer was given as "attention_mask"; None if none was.
    """

    def __init__(self, count: int):
        self.count, self.waiting = count, torch.arange(count)
        self.mask: Tensor | None = None
        self._whole: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._cut: dict[int, Tensor] = {}

    def leave(self, going: Tensor) -> Tensor:
        """going bool [m], on the CPU -> which examples these are."""
        left, self.waiting = self.waiting[going], self.waiting[~going]
        self._cut.clear()
        return left

    def pooled(self, hidden: Tensor) -> Tensor:
        """:func:`pooled`, of those that are left, over their real tokens."""
        return pooled(hidden, None if self.mask is None else self.mask[self.waiting.to(self.mask.device)])

    def arguments(self, args: Any, named: dict[str, Any]) -> tuple[Any, Any]:
        """What a layer is given by place and by name -> the same for those that are left."""
        mask = named.get(MASK)
        if self.mask is None and isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == self.count:
            self.mask = mask
        return self.given(args), self.given(named)

    def given(self, value: Any) -> Any:
        """Tensors nested in tuples, lists and dicts."""
        if isinstance(value, Tensor):
            return self._rest(value)
        if type(value) is dict:
            return {name: self.given(part) for name, part in value.items()}
        return type(value)(map(self.given, value)) if type(value) in (tuple, list) else value

    def _rest(self, tensor: Tensor) -> Tensor:
        if len(self.waiting) == self.count:
            if tensor.dim() and len(tensor) == self.count:
                self._whole[id(tensor)] = tensor
            return tensor
        if self._whole.get(id(tensor)) is not tensor:
            return tensor
        if id(tensor) not in self._cut:
            self._cut[id(tensor)] = tensor[self.waiting.to(tensor.device)]
        return self._cut[id(tensor)]


def pooled(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """[n, channels, height, width], [n, tokens, channels] or [n, channels] -> float32 [n, width of the head]: means.

    Of a picture, those of at most GRID by GRID parts. mask [n, tokens]: 1 for tokens that count, 0 for padding.
    """
    hidden = hidden.float()
    if hidden.dim() == 4:
        part = [math.ceil(int(size) / GRID) for size in hidden.shape[2:]]
        return F.avg_pool2d(hidden, part, ceil_mode=True).flatten(1)
    if hidden.dim() != 3:
        return hidden.flatten(2).mean(dim=2) if hidden.dim() > 3 else hidden
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(dim=1)
    weights = mask.to(hidden.device).float().unsqueeze(2)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)
