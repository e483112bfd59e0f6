"""Weighted sum of selected rows on the CPU: one pass, the sum stays in the cache while the rows stream past."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops._arrays import as_numpy, as_vector, check_range, not_for_numba
from sparingly.ops._numba import axpy, near_rows, prefetch_ahead, prefetch_first
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import record_rows, row_bytes
from sparingly.ops._threads import run_chunks


@compiled
def _sums(start, stop, weights, rows, ids, scale, sums):
    """sums[start..stop], which is overwritten; scale may be empty."""
    k = ids.shape[1]
    flat_ids = ids.reshape(-1)
    near = near_rows(rows)
    prefetch_first(rows, flat_ids, start * k, stop * k)
    for token in range(start, stop):
        for j in range(rows.shape[1]):
            sums[token, j] = 0.0
        for place in range(k):
            prefetch_ahead(rows, flat_ids, token * k + place, stop * k, near)
            row = ids[token, place]
            if row < 0:
                continue
            weight = weights[token, place]
            if scale.size:
                weight *= scale[row]
            axpy(weight, rows, row, sums, token)


def unsupported(weights: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    return not_for_numba(weights, rows, scale, contiguous=(rows,))


def kernel(weights: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None) -> Tensor:
    """See :func:`sparingly.ops.gather_accumulate.gather_accumulate`."""
    ids = ids.contiguous()
    visited = check_range(ids, rows.shape[0])
    sums = torch.empty(ids.shape[0], rows.shape[1], dtype=torch.float32)
    run_chunks(
        _sums,
        ids.shape[0],
        visited * row_bytes(rows),
        as_numpy(weights.float().contiguous()),
        as_numpy(rows),
        as_numpy(ids),
        as_vector(scale),
        sums.numpy(),
    )
    record_rows("gather_accumulate", visited, rows, scale, read=(weights, ids), written=(sums,))
    return sums
