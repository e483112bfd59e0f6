"""Scores of selected rows on the CPU: one pass, the rows are read once and copied nowhere."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._arrays import as_numpy, as_vector, check_range, not_for_numba
from sparingly.ops._numba import dot, near_rows, prefetch_ahead, prefetch_first
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import record_rows, row_bytes
from sparingly.ops._threads import run_chunks


@compiled
def _scores(start, stop, hidden, rows, ids, scale, bias, scores):
    """scores[start..stop] of the flattened [tokens, k]; scale and bias may be empty."""
    k = ids.shape[1]
    flat_ids, flat_scores = ids.reshape(-1), scores.reshape(-1)
    near = near_rows(rows)
    prefetch_first(rows, flat_ids, start, stop)
    token = start // k if k else 0
    for position in range(start, stop):
        # Not position // k: a division takes as long as a short row.
        if position == (token + 1) * k:
            token += 1
        prefetch_ahead(rows, flat_ids, position, stop, near)
        row = flat_ids[position]
        if row < 0:
            flat_scores[position] = -np.inf
            continue
        score = dot(rows, row, hidden, token)
        if scale.size:
            score *= scale[row]
        if bias.size:
            score += bias[row]
        flat_scores[position] = score


def unsupported(
    hidden: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    return not_for_numba(hidden, rows, scale, bias, contiguous=(rows,))


def kernel(
    hidden: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """See :func:`sparingly.ops.gather_dot.gather_dot`."""
    ids = ids.contiguous()
    visited = check_range(ids, rows.shape[0])
    scores = torch.empty(ids.shape, dtype=torch.float32)
    # Widened once here, the hidden states stay float32 in the cache while the rows stream past.
    vectors = hidden.detach().float().contiguous()
    run_chunks(
        _scores,
        ids.numel(),
        visited * row_bytes(rows),
        vectors.numpy(),
        as_numpy(rows),
        as_numpy(ids),
        as_vector(scale),
        as_vector(bias),
        scores.numpy(),
    )
    record_rows("gather_dot", visited, rows, scale, bias, read=(hidden, ids), written=(scores,))
    return scores
