"""Best k among the selected rows on the CPU: scores go into a heap of k and never into memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._arrays import check_range, not_for_numba, scan_ids
from sparingly.ops._numba import (
    NOTHING,
    dot,
    heap_clear,
    heap_push,
    heap_sort,
    inlined,
    near_rows,
    prefetch_ahead,
    prefetch_first,
)
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import record_rows
from sparingly.ops._threads import chunks_for, most_alone, run_chunks
from sparingly.ops._views import CPU, LIKE, addresses, matrix_at, packed, vector_at


@inlined
def _keep(start, stop, ahead, hidden, token, rows, ids, scale, bias, scores, places, heap):
    """Heap number ``heap`` becomes the best of the rows at positions start..stop; prefetches up to ``ahead``."""
    near = near_rows(rows)
    heap_clear(scores, places, heap)
    for position in range(start, stop):
        prefetch_ahead(rows, ids, position, ahead, near)
        row = ids[position]
        if row < 0:
            continue
        score = dot(rows, row, hidden, token)
        if scale.size:
            score *= scale[row]
        if bias.size:
            score += bias[row]
        # Positions come in rising order, so that an equal score never displaces an earlier one.
        if not score <= scores[heap, 0] or places[heap, 0] == NOTHING:
            heap_push(scores, places, heap, score, position)


@inlined
def _name(ids, scores, classes, token):
    """Order a token's heap best first, and put ids in the place of positions."""
    heap_sort(scores, classes, token)
    for rank in range(scores.shape[1]):
        place = classes[token, rank]
        classes[token, rank] = ids[place] if place != NOTHING else np.int64(-1)


@compiled
def _best(start, stop, m, hidden, rows, ids, scale, bias, scores, classes, part_scores, part_places, chunk):
    """Positions start..stop of the flattened ids [tokens, m]; scale and bias may be empty.

    Tokens that end here are finished; one that does not stays a heap. Of a token that begins before ``start``, the
    best of here become heap number ``chunk`` of part_scores and part_places.
    """
    prefetch_first(rows, ids, start, stop)
    while start < stop:
        token = start // m
        end = min(stop, (token + 1) * m)
        if start == token * m:
            _keep(start, end, stop, hidden, token, rows, ids, scale, bias, scores, classes, token)
            if end == (token + 1) * m:
                _name(ids, scores, classes, token)
        else:
            _keep(start, end, stop, hidden, token, rows, ids, scale, bias, part_scores, part_places, chunk)
        start = end


@compiled
def part(start, stop, chunks, part_scores, part_places, like, sizes, places):
    """:func:`_best` of ``start..stop`` of ``chunks`` equal parts of what lies at addresses; part_* [chunks, k].

    Rows are of the type of ``like`` (:mod:`sparingly.ops._views`).
    """
    tokens, m, num_rows, d, k = sizes
    hidden, rows, ids, scale, bias, scores, classes = places
    size = tokens * m
    for chunk in range(start, stop):
        _best(
            size * chunk // chunks,
            size * (chunk + 1) // chunks,
            m,
            matrix_at(hidden, tokens, d, np.float32),
            matrix_at(rows, num_rows, d, like.dtype),
            vector_at(ids, size, np.int64),
            vector_at(scale, num_rows, np.float32),
            vector_at(bias, num_rows, np.float32),
            matrix_at(scores, tokens, k, np.float32),
            matrix_at(classes, tokens, k, np.int64),
            matrix_at(part_scores, chunks, k, np.float32),
            matrix_at(part_places, chunks, k, np.int64),
            chunk,
        )


@compiled
def _begin(most, like, sizes, places):
    """How many ids are not pads, -1 if one is out of range. Up to ``most`` of them are served at once."""
    tokens, m, num_rows, _, _ = sizes
    bad, visited = scan_ids(vector_at(places[2], tokens * m, np.int64), num_rows)
    if bad >= 0:
        return -1
    if visited <= most:
        # One chunk begins no token halfway, so that nothing is partial.
        part(0, 1, 1, 0, 0, like, sizes, places)
    return visited


@compiled
def merge(chunks, part_scores, part_places, sizes, places):
    """Bring together the heaps of tokens that several chunks have worked on, and finish those tokens."""
    tokens, m, _, _, k = sizes
    _, _, ids, _, _, scores, classes = places
    every = vector_at(ids, tokens * m, np.int64)
    best, kept = matrix_at(scores, tokens, k, np.float32), matrix_at(classes, tokens, k, np.int64)
    found, found_places = matrix_at(part_scores, chunks, k, np.float32), matrix_at(part_places, chunks, k, np.int64)
    for chunk in range(1, chunks):
        start, stop = tokens * m * chunk // chunks, tokens * m * (chunk + 1) // chunks
        token = start // m
        if start == token * m:
            continue
        for rank in range(k):
            if found_places[chunk, rank] != NOTHING:
                heap_push(best, kept, token, found[chunk, rank], found_places[chunk, rank])
        if stop >= (token + 1) * m:
            _name(every, best, kept, token)


def unsupported(
    hidden: Tensor, rows: Tensor, ids: Tensor, k: int, scale: Tensor | None = None, bias: Tensor | None = None
) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    return not_for_numba(hidden, rows, scale, bias, contiguous=(rows,))


def kernel(
    hidden: Tensor, rows: Tensor, ids: Tensor, k: int, scale: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`sparingly.ops.topk_rows.topk_rows`. Threads share out the rows, also those of one token."""
    vectors, ids = hidden.float().contiguous(), ids.contiguous()
    scale, bias = packed(scale), packed(bias)
    (tokens, m), (num_rows, d) = ids.shape, rows.shape
    scores = torch.empty((tokens, k), dtype=torch.float32, device=CPU)
    classes = torch.empty((tokens, k), dtype=torch.int64, device=CPU)
    if not m:
        scores.fill_(-torch.inf)
        classes.fill_(-1)
    like, sizes = LIKE[rows.dtype], (tokens, m, num_rows, d, k)
    tensors = (vectors, rows, ids, scale, bias, scores, classes)
    places = addresses(*tensors)
    row_bytes = d * rows.element_size()
    most = most_alone(row_bytes)
    visited = _begin(most, like, sizes, places)
    if visited < 0:
        check_range(ids, num_rows)
    if visited > most:
        work_bytes = visited * row_bytes
        chunks = chunks_for(tokens * m, work_bytes)
        part_scores = torch.empty((chunks, k), dtype=torch.float32, device=CPU)
        part_places = torch.empty((chunks, k), dtype=torch.int64, device=CPU)
        heaps = (chunks, part_scores.data_ptr(), part_places.data_ptr())
        run_chunks(part, chunks, work_bytes, *heaps, like, sizes, places, keep=(*tensors, part_scores, part_places))
        merge(*heaps, sizes, places)
    written = (scores, classes)
    record_rows("topk_rows", visited, rows, scale, bias, read=(hidden, ids), written=written, other=visited)
    return scores, classes
