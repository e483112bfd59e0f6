"""Weighted sum of selected rows on the CPU: one pass, the sum stays in the cache while the rows stream past."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._arrays import check_range, not_for_numba, scan_ids
from sparingly.ops._numba import axpy, inlined, near_rows, prefetch_ahead, prefetch_first
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import record_rows
from sparingly.ops._threads import chunks_for, most_alone, run_chunks
from sparingly.ops._views import CPU, LIKE, addresses, matrix_at, packed, vector_at


@inlined
def _sum(start, stop, ahead, weights, rows, ids, scale, sums, target):
    """``sums[target]`` becomes the weighted sum of the rows at positions start..stop; prefetches up to ``ahead``."""
    near = near_rows(rows)
    for j in range(rows.shape[1]):
        sums[target, j] = 0.0
    for position in range(start, stop):
        prefetch_ahead(rows, ids, position, ahead, near)
        row = ids[position]
        if row < 0:
            continue
        weight = weights[position]
        if scale.size:
            weight *= scale[row]
        axpy(weight, rows, row, sums, target)


@compiled
def _sums(start, stop, k, weights, rows, ids, scale, sums, partial, chunk):
    """Positions start..stop of the flattened [tokens, k], as weights and ids; scale may be empty.

    A token's sum goes to ``sums``; where its places begin before ``start``, what is summed here to ``partial[chunk]``.
    """
    prefetch_first(rows, ids, start, stop)
    while start < stop:
        token = start // k
        end = min(stop, (token + 1) * k)
        if start == token * k:
            _sum(start, end, stop, weights, rows, ids, scale, sums, token)
        else:
            _sum(start, end, stop, weights, rows, ids, scale, partial, chunk)
        start = end


@compiled
def part(start, stop, chunks, partial, like, sizes, places):
    """:func:`_sums` of ``start..stop`` of ``chunks`` equal parts of what lies at addresses; partial [chunks, d].

    Rows are of the type of ``like`` (:mod:`sparingly.ops._views`).
    """
    tokens, k, num_rows, d = sizes
    weights, rows, ids, scale, sums = places
    size = tokens * k
    for chunk in range(start, stop):
        _sums(
            size * chunk // chunks,
            size * (chunk + 1) // chunks,
            k,
            vector_at(weights, size, np.float32),
            matrix_at(rows, num_rows, d, like.dtype),
            vector_at(ids, size, np.int64),
            vector_at(scale, num_rows, np.float32),
            matrix_at(sums, tokens, d, np.float32),
            matrix_at(partial, chunks, d, np.float32),
            chunk,
        )


@compiled
def _begin(most, like, sizes, places):
    """How many ids are not pads, -1 if one is out of range. Up to ``most`` of them are served at once."""
    tokens, k, num_rows, _ = sizes
    bad, visited = scan_ids(vector_at(places[2], tokens * k, np.int64), num_rows)
    if bad >= 0:
        return -1
    if visited <= most:
        # One chunk begins no token halfway, so that nothing is partial.
        part(0, 1, 1, 0, like, sizes, places)
    return visited


@compiled
def merge(chunks, partial, sizes, sums):
    """Add what chunks have summed of tokens that they did not begin, in the order of the chunks."""
    tokens, k, _, d = sizes
    total, parts = matrix_at(sums, tokens, d, np.float32), matrix_at(partial, chunks, d, np.float32)
    for chunk in range(1, chunks):
        start = tokens * k * chunk // chunks
        if start % k:
            for j in range(d):
                total[start // k, j] += parts[chunk, j]


def unsupported(weights: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    return not_for_numba(weights, rows, scale, contiguous=(rows,))


def kernel(weights: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None) -> Tensor:
    """See :func:`sparingly.ops.gather_accumulate.gather_accumulate`.

    Threads share out the rows, also those of one token. Sums are the same in every run with as many threads.
    """
    factors, ids, scale = weights.float().contiguous(), ids.contiguous(), packed(scale)
    (tokens, k), (num_rows, d) = ids.shape, rows.shape
    sums = torch.empty((tokens, d), dtype=torch.float32, device=CPU)
    if not k:
        sums.zero_()
    like, sizes = LIKE[rows.dtype], (tokens, k, num_rows, d)
    tensors = (factors, rows, ids, scale, sums)
    places = addresses(*tensors)
    row_bytes = d * rows.element_size()
    most = most_alone(row_bytes)
    visited = _begin(most, like, sizes, places)
    if visited < 0:
        check_range(ids, num_rows)
    if visited > most:
        work_bytes = visited * row_bytes
        chunks = chunks_for(tokens * k, work_bytes)
        partial = torch.empty((chunks, d), dtype=torch.float32, device=CPU)
        run_chunks(part, chunks, work_bytes, chunks, partial.data_ptr(), like, sizes, places, keep=(*tensors, partial))
        merge(chunks, partial.data_ptr(), sizes, sums.data_ptr())
    record_rows("gather_accumulate", visited, rows, scale, read=(weights, ids), written=(sums,))
    return sums
