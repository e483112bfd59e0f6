"""Scores of selected rows on the CPU: one pass, the rows are read once and copied nowhere."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._arrays import check_range, not_for_numba, scan_ids
from sparingly.ops._numba import dot, near_rows, prefetch_ahead, prefetch_first
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import record_rows
from sparingly.ops._threads import most_alone, run_chunks
from sparingly.ops._views import CPU, LIKE, addresses, matrix_at, packed, vector_at


@compiled
def _scores(start, stop, k, hidden, rows, ids, scale, bias, scores):
    """scores[start..stop] of the flattened [tokens, k], as ids; scale and bias may be empty."""
    near = near_rows(rows)
    prefetch_first(rows, ids, start, stop)
    token = start // k if k else 0
    for position in range(start, stop):
        # Not position // k: a division takes as long as a short row.
        if position == (token + 1) * k:
            token += 1
        prefetch_ahead(rows, ids, position, stop, near)
        row = ids[position]
        if row < 0:
            scores[position] = -np.inf
            continue
        score = dot(rows, row, hidden, token)
        if scale.size:
            score *= scale[row]
        if bias.size:
            score += bias[row]
        scores[position] = score


@compiled
def part(start, stop, like, sizes, places):
    """:func:`_scores` of what lies at addresses, rows of the type of ``like`` (:mod:`sparingly.ops._views`)."""
    tokens, k, num_rows, d = sizes
    hidden, rows, ids, scale, bias, scores = places
    _scores(
        start,
        stop,
        k,
        matrix_at(hidden, tokens, d, np.float32),
        matrix_at(rows, num_rows, d, like.dtype),
        vector_at(ids, tokens * k, np.int64),
        vector_at(scale, num_rows, np.float32),
        vector_at(bias, num_rows, np.float32),
        vector_at(scores, tokens * k, np.float32),
    )


@compiled
def _begin(most, like, sizes, places):
    """How many ids are not pads, -1 if one is out of range. Up to ``most`` of them are served at once."""
    tokens, k, num_rows, _ = sizes
    bad, visited = scan_ids(vector_at(places[2], tokens * k, np.int64), num_rows)
    if bad >= 0:
        return -1
    if visited <= most:
        part(0, tokens * k, like, sizes, places)
    return visited


def unsupported(
    hidden: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    return not_for_numba(hidden, rows, scale, bias, contiguous=(rows,))


def kernel(
    hidden: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """See :func:`sparingly.ops.gather_dot.gather_dot`."""
    # Widened once here, the hidden states stay float32 in the cache while the rows stream past.
    vectors, ids = hidden.float().contiguous(), ids.contiguous()
    scale, bias = packed(scale), packed(bias)
    (tokens, k), (num_rows, d) = ids.shape, rows.shape
    scores = torch.empty((tokens, k), dtype=torch.float32, device=CPU)
    like, sizes = LIKE[rows.dtype], (tokens, k, num_rows, d)
    tensors = (vectors, rows, ids, scale, bias, scores)
    places = addresses(*tensors)
    row_bytes = d * rows.element_size()
    most = most_alone(row_bytes)
    visited = _begin(most, like, sizes, places)
    if visited < 0:
        check_range(ids, num_rows)
    if visited > most:
        run_chunks(part, tokens * k, visited * row_bytes, like, sizes, places, keep=tensors)
    record_rows("gather_dot", visited, rows, scale, bias, read=(hidden, ids), written=(scores,))
    return scores
