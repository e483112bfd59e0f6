"""Weighted vectors added into slots on the CPU, without the [tokens * k, d] products in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops._arrays import as_numpy, check_range, not_for_numba
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._numba import near_rows, prefetch_ahead, prefetch_first
from sparingly.ops._threads import run_chunks
from sparingly.ops.scatter_outer._count import record


@compiled
def _scatter(start, stop, weights, vectors, slots, sums):
    """Columns start..stop of sums: threads share columns, so that no two ever write to one place."""
    tokens, k = slots.shape
    flat_slots, flat_weights = slots.reshape(-1), weights.reshape(-1)
    near = near_rows(sums)
    prefetch_first(sums, flat_slots, 0, tokens * k)
    token = 0
    for position in range(tokens * k):
        if position == (token + 1) * k:
            token += 1
        prefetch_ahead(sums, flat_slots, position, tokens * k, near)
        slot = flat_slots[position]
        if slot < 0:
            continue
        weight = flat_weights[position]
        for j in range(start, stop):
            sums[slot, j] += weight * vectors[token, j]


def unsupported(weights: Tensor, vectors: Tensor, slots: Tensor, num_slots: int) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    return not_for_numba(weights, vectors)


def kernel(weights: Tensor, vectors: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """See :func:`sparingly.ops.scatter_outer.scatter_outer`."""
    slots = slots.contiguous()
    visited = check_range(slots, num_slots)
    sums = torch.zeros(num_slots, vectors.shape[1], dtype=torch.float32)
    run_chunks(
        _scatter,
        vectors.shape[1],
        visited * vectors.shape[1] * 4,
        as_numpy(weights.float().contiguous()),
        as_numpy(vectors.float().contiguous()),
        as_numpy(slots),
        sums.numpy(),
    )
    record(visited, weights, vectors, slots, sums)
    return sums
