"""The walk of :class:`sparingly.selectors.graph.Graph`, compiled for the CPU.

One class is one *record* of whole cache lines: the int8 code of its projected row, then two float32, the code's scale
and the class's bias. A step of the walk reads 64 bytes a class and not a row, and nothing else of it.
"""

from __future__ import annotations

import numpy as np

from sparingly.ops._numba import (
    dot,
    dot_i8_i8,
    heap_clear,
    heap_push,
    heap_sort,
    kernel,
    prefetch,
    prefetch_row,
)

META_BYTES = 8
"""Bytes at a record's end that are not code: scale and bias, float32 each."""
EXACT = 32
"""Best of the pool that get exact scores: of 289,000 word vectors the records' best 32 always held the exact best."""
DONE = np.int32(1 << 30)
"""Bit of an id in the pool whose neighbours were scored."""


@kernel
def encode(vector, codes, row):
    """Write float32 ``vector`` [c] as int8 into ``codes[row, :c]``; returns the scale of a code."""
    largest = np.float32(0.0)
    for j in range(vector.shape[0]):
        largest = max(largest, abs(vector[j]))
    scale = largest / np.float32(127.0)
    inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
    for j in range(vector.shape[0]):
        codes[row, j] = np.int8(np.rint(vector[j] * inverse))
    return scale


@kernel
def encode_rows(start, stop, projected, bias, codes, meta):
    """Records start..stop from projected rows [n, c] and bias [n] (or empty)."""
    last = meta.shape[1]
    for row in range(start, stop):
        meta[row, last - 2] = encode(projected[row], codes, row)
        meta[row, last - 1] = bias[row] if bias.size else np.float32(0.0)


@kernel
def score(codes, meta, row, query, query_scale):
    """Approximate logit of a class: its record against the query's code [1, bytes], whose tail is zero."""
    last = meta.shape[1]
    return np.float32(dot_i8_i8(codes, row, query, 0)) * meta[row, last - 2] * query_scale + meta[row, last - 1]


@kernel
def _seen_before(table, mask, key):
    """Insert a key into an open-addressing table of int32 (-1 is free); True if it was there."""
    place = (np.int64(key) * np.int64(2654435761) >> np.int64(7)) & mask
    while table[place] != -1:
        if table[place] == key:
            return True
        place = (place + 1) & mask
    table[place] = key
    return False


@kernel
def _insert(pool_scores, pool_ids, size, capacity, value, key):
    """Insert into the pool, sorted best first; returns (new size, place or capacity if it was not good enough)."""
    if size == capacity and not value > pool_scores[capacity - 1]:
        return size, capacity
    place = size if size < capacity else capacity - 1
    while place > 0 and value > pool_scores[place - 1]:
        pool_scores[place] = pool_scores[place - 1]
        pool_ids[place] = pool_ids[place - 1]
        place -= 1
    pool_scores[place] = value
    pool_ids[place] = key
    return min(size + 1, capacity), place


@kernel
def walk(
    query, query_scale, codes, meta, entry_codes, entry_meta, entry_ids, neighbours, table, pool_scores, pool_ids, slack
):
    """Best-first walk; fills the pool and returns (its size, records scored, lists read).

    An id in the pool has the bit DONE set once its neighbours were scored. The walk ends when every class of the pool
    within ``slack`` of the best one was (Malkov and Yashunin 2020, algorithm 2, on one layer), or when the table is
    three quarters full.
    """
    beam = pool_scores.shape[0]
    mask = np.int64(table.shape[0] - 1)
    table[:] = -1
    size = 0
    starts = min(beam, 8)
    for entry in range(entry_ids.shape[0]):
        value = score(entry_codes, entry_meta, entry, query, query_scale)
        size, _ = _insert(pool_scores, pool_ids, size, starts, value, entry_ids[entry])
    for place in range(size):
        _seen_before(table, mask, pool_ids[place])
        prefetch_row(neighbours, pool_ids[place])
    scored = np.int64(0)
    lists = np.int64(0)
    limit = (table.shape[0] // 4) * 3 - neighbours.shape[1]
    fresh = np.empty(neighbours.shape[1], np.int32)
    place = 0
    while place < size and scored < limit:
        if pool_ids[place] & DONE:
            place += 1
            continue
        if pool_scores[place] < pool_scores[0] - slack:
            break
        node = pool_ids[place]
        pool_ids[place] = node | DONE
        lists += 1
        count = 0
        for j in range(neighbours.shape[1]):
            other = neighbours[node, j]
            if other < 0:
                break
            if not _seen_before(table, mask, other):
                prefetch_row(codes, other)
                fresh[count] = other
                count += 1
        first = size
        for j in range(count):
            value = score(codes, meta, fresh[j], query, query_scale)
            # What lies further behind the best than slack is never looked at: it need not be kept either.
            if value < pool_scores[0] - slack:
                continue
            size, where = _insert(pool_scores, pool_ids, size, beam, value, fresh[j])
            if where < first:
                first = where
        scored += count
        if first < place:
            place = first
        # The next list is asked for before it is needed: its address is known now.
        for ahead in range(place, min(size, place + 2)):
            if not pool_ids[ahead] & DONE:
                prefetch(neighbours, pool_ids[ahead], 0)
                prefetch(neighbours, pool_ids[ahead], neighbours.shape[1] * 4 - 1)
    return size, scored, lists


@kernel
def search(
    start,
    stop,
    hidden,
    projection,
    codes,
    meta,
    entry_codes,
    entry_meta,
    entry_ids,
    neighbours,
    beam,
    slack,
    table_size,
    rows,
    scale,
    bias,
    scores,
    classes,
    counts,
):
    """Tokens start..stop: walk, exact scores of the pool's first, best k. counts [tokens, 3]: scored, lists, exact.

    projection [c, d] float32. rows [N, d] float32, bfloat16 bits or int8 with scale [N]; bias [N] or empty.
    scores, classes [tokens, k]; -1 where the pool held fewer.
    """
    code_length = projection.shape[0]
    query = np.zeros((1, codes.shape[1]), np.int8)
    projected = np.empty(code_length, np.float32)
    table = np.empty(table_size, np.int32)
    pool_scores = np.empty(beam, np.float32)
    pool_ids = np.empty(beam, np.int32)
    id_bits = DONE - np.int32(1)
    for token in range(start, stop):
        for j in range(code_length):
            projected[j] = dot(projection, j, hidden, token)
        query_scale = encode(projected, query, 0)
        size, scored, lists = walk(
            query,
            query_scale,
            codes,
            meta,
            entry_codes,
            entry_meta,
            entry_ids,
            neighbours,
            table,
            pool_scores,
            pool_ids,
            slack,
        )
        size = min(size, max(EXACT, scores.shape[1]))
        for place in range(size):
            pool_ids[place] &= id_bits
            prefetch_row(rows, pool_ids[place])
        heap_clear(scores, classes, token)
        for place in range(size):
            row = pool_ids[place]
            value = dot(rows, row, hidden, token)
            if scale.size:
                value *= scale[row]
            if bias.size:
                value += bias[row]
            heap_push(scores, classes, token, value, np.int64(place))
        heap_sort(scores, classes, token)
        for rank in range(scores.shape[1]):
            place = classes[token, rank]
            classes[token, rank] = pool_ids[place] if place < size else np.int64(-1)
        counts[token, 0] = scored
        counts[token, 1] = lists
        counts[token, 2] = size
