"""How units that never ran get a new place in a choice: beside units that do, by keys that are nearly theirs."""

from __future__ import annotations

import torch
from torch import Tensor


def partners(used: Tensor) -> tuple[Tensor, Tensor]:
    """used bool [n] -> those that are not, int64 [m], and for each a random one that is; none where none is."""
    dead, alive = (~used).nonzero().squeeze(1), used.nonzero().squeeze(1)
    if not alive.numel():
        return alive, alive
    return dead, alive[torch.randint(alive.numel(), dead.shape, device=alive.device)]


def near(keys: Tensor) -> Tensor:
    """A copy of keys [..., d] with a tenth of a fresh draw added."""
    return keys + 0.1 * keys.shape[-1] ** -0.5 * torch.randn_like(keys)
