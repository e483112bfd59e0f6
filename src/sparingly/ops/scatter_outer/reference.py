"""Weighted vectors added into slots in plain PyTorch; also serves float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops._arrays import accumulator, check_range
from sparingly.ops._record import tensor_bytes
from sparingly.ops.scatter_outer._count import record


def reference(weights: Tensor, vectors: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """See :func:`sparingly.ops.scatter_outer.scatter_outer`."""
    visited = check_range(slots, num_slots)
    dtype = accumulator(weights, vectors)
    token, place = (slots >= 0).nonzero(as_tuple=True)
    terms = weights[token, place].to(dtype).unsqueeze(1) * vectors[token].to(dtype)
    sums = torch.zeros(num_slots, vectors.shape[1], dtype=dtype, device=vectors.device)
    sums.index_add_(0, slots[token, place], terms)
    record(visited, weights, vectors, slots, sums, copied=2 * tensor_bytes(terms))
    return sums
