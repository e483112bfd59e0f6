"""The walk of :class:`sparingly.selectors.graph.Graph`, compiled for the CPU.

One class is one *record* of whole cache lines: the int8 code of its projected row, then two float32, the code's scale
and the class's bias. A step of the walk reads 64 bytes a class and not a row, and nothing else of it.
"""

from __future__ import annotations

import numpy as np

from sparingly.ops._numba import dot, dot_i8, heap_clear, heap_push, heap_sort, inlined, kernel, prefetch_row

META_BYTES = 8
"""Bytes at a record's end that are not code: scale and bias, float32 each."""
EXACT = 32
"""Best of the pool that get exact scores, at least: on trained word vectors 8 lost 0.2 % of the best classes."""
SLOTS = 8
"""Walks that go in turns: while one waits for memory the others go on."""
BLOCK = 64
"""Tokens whose pools are kept at once."""
TABLE = 8192
"""Places for classes that one walk can see; 32 KB, so that it stays in the first cache level."""
DONE = np.int32(1 << 30)
"""Bit of an id in the pool whose neighbours were scored."""
ID_BITS = DONE - np.int32(1)


@kernel
def exact_rows(beam):
    """How many of a pool's best get exact scores."""
    return max(EXACT, beam // 4)


@kernel
def encode(vector, codes, row):
    """Write float32 ``vector`` [c] as integers of 8 bits into ``codes[row, :c]``; returns the scale of a code."""
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


@inlined
def score(codes, meta, row, queries, query, query_scale):
    """Approximate logit of a class: its record against a query's code, whose tail is zero."""
    last = meta.shape[1]
    return np.float32(dot_i8(codes, row, queries, query)) * meta[row, last - 2] * query_scale + meta[row, last - 1]


@inlined
def _seen_before(tables, slot, key):
    """Insert a key into a slot's open-addressing table of int32 (-1 is free); True if it was there."""
    mask = np.int64(tables.shape[1] - 1)
    place = (np.int64(key) * np.int64(2654435761) >> np.int64(7)) & mask
    while tables[slot, place] != -1:
        if tables[slot, place] == key:
            return True
        place = (place + 1) & mask
    tables[slot, place] = key
    return False


@inlined
def _insert(pool_scores, pool_ids, pool, size, capacity, value, key):
    """Insert into a pool of ``size``, sorted best first; returns its place, ``capacity`` if it was not good enough."""
    if size == capacity and not value > pool_scores[pool, capacity - 1]:
        return capacity
    place = size if size < capacity else capacity - 1
    while place > 0 and value > pool_scores[pool, place - 1]:
        pool_scores[pool, place] = pool_scores[pool, place - 1]
        pool_ids[pool, place] = pool_ids[pool, place - 1]
        place -= 1
    pool_scores[pool, place] = value
    pool_ids[pool, place] = key
    return place


@inlined
def _enter(token, queries, scales, entry_codes, entry_meta, entry_ids, pool_scores, pool_ids):
    """Score the entry records and keep the best few; returns how many."""
    size = 0
    most = min(pool_scores.shape[1], 8)
    for entry in range(entry_ids.shape[0]):
        value = score(entry_codes, entry_meta, entry, queries, token, scales[token])
        _insert(pool_scores, pool_ids, token, size, most, value, entry_ids[entry])
        size = min(size + 1, most)
    return size


@inlined
def _gather(slot, node, codes, neighbours, tables, fresh):
    """Note the neighbours of ``node`` that this walk has not met, and ask for their records; returns how many."""
    count = 0
    for j in range(neighbours.shape[1]):
        other = neighbours[node, j]
        if other < 0:
            break
        if not _seen_before(tables, slot, other):
            prefetch_row(codes, other)
            fresh[slot, count] = other
            count += 1
    return count


@kernel
def walk(
    queries, scales, codes, meta, entry_codes, entry_meta, entry_ids, neighbours, tables, slack, scores, ids, counts
):
    """Best-first walks of tokens 0..n; fills their pools and counts [n, 3]: records scored, lists read, pool size.

    queries int8 or int16 [n, bytes] with scales [n]. tables int32 [slots, a power of 2]: so many walks take turns, and
    each asks for what it will read before its turn ends, so that memory's delays overlap. A pool, scores and ids
    [n, beam], is sorted best first; an id in it has the bit DONE set once its neighbours were scored. A walk ends when
    every class of its pool within ``slack`` of the best one was (Malkov and Yashunin 2020, algorithm 2, on one layer),
    or when its table is three quarters full.
    """
    tokens, beam = queries.shape[0], scores.shape[1]
    slots = tables.shape[0]
    limit = (tables.shape[1] // 4) * 3 - neighbours.shape[1]
    fresh = np.empty((slots, neighbours.shape[1]), np.int32)
    walker = np.full(slots, -1)  # the token that walks in a slot
    waiting = np.zeros(slots, np.int64)  # records that its turn before asked for
    places = np.zeros(slots, np.int64)  # where in its pool it looks next
    coming, left = 0, tokens
    while left > 0:
        for slot in range(slots):
            token = walker[slot]
            if token < 0:
                if coming == tokens:
                    continue
                token = coming
                coming += 1
                walker[slot] = token
                size = _enter(token, queries, scales, entry_codes, entry_meta, entry_ids, scores, ids)
                tables[slot, :] = -1
                for place in range(size):
                    _seen_before(tables, slot, ids[token, place])
                place = 0
                counts[token, 0] = 0
                counts[token, 1] = 0
            else:
                size, place = counts[token, 2], places[slot]
                if waiting[slot] == 0:
                    node = ids[token, place]
                    ids[token, place] = node | DONE
                    waiting[slot] = _gather(slot, node, codes, neighbours, tables, fresh)
                    counts[token, 0] += waiting[slot]
                    counts[token, 1] += 1
                    if waiting[slot] > 0 and slots > 1:
                        continue
                for j in range(waiting[slot]):
                    value = score(codes, meta, fresh[slot, j], queries, token, scales[token])
                    # What lies further behind the best than slack is never looked at: it need not be kept either.
                    if value < scores[token, 0] - slack:
                        continue
                    where = _insert(scores, ids, token, size, beam, value, fresh[slot, j])
                    size = min(size + (where < beam), beam)
                    if where <= place:
                        place = where
                        prefetch_row(neighbours, fresh[slot, j])
                waiting[slot] = 0
            while place < size and ids[token, place] & DONE:
                place += 1
            counts[token, 2] = size
            places[slot] = place
            if place == size or scores[token, place] < scores[token, 0] - slack or counts[token, 0] >= limit:
                walker[slot] = -1
                left -= 1
                continue
            # Lists are asked for before they are needed: this one, and the one that is next unless something better
            # turns up.
            for ahead in range(place, min(size, place + 2)):
                if not ids[token, ahead] & DONE:
                    prefetch_row(neighbours, ids[token, ahead])


@inlined
def _rank(token, pool, counts, pool_ids, hidden, rows, scale, bias, scores, classes):
    """Exact scores of the first counts[token, 2] of a pool, the best k of them into scores and classes [token]."""
    heap_clear(scores, classes, token)
    for place in range(counts[token, 2]):
        row = pool_ids[pool, place]
        value = dot(rows, row, hidden, token)
        if scale.size:
            value *= scale[row]
        if bias.size:
            value += bias[row]
        heap_push(scores, classes, token, value, np.int64(place))
    heap_sort(scores, classes, token)
    for rank in range(scores.shape[1]):
        place = classes[token, rank]
        classes[token, rank] = pool_ids[pool, place] if place < counts[token, 2] else np.int64(-1)


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
    block = max(1, min(BLOCK, stop - start))
    queries = np.zeros((block, codes.shape[1]), np.int16)  # int8 values: see dot_i8
    scales = np.empty(block, np.float32)
    projected = np.empty(projection.shape[0], np.float32)
    tables = np.empty((min(SLOTS, block), TABLE), np.int32)
    pool_scores = np.empty((block, beam), np.float32)
    pool_ids = np.empty((block, beam), np.int32)
    most = max(exact_rows(beam), scores.shape[1])
    for first in range(start, stop, block):
        size = min(block, stop - first)
        for token in range(size):
            for j in range(projection.shape[0]):
                projected[j] = dot(projection, j, hidden, first + token)
            scales[token] = encode(projected, queries, token)
        walk(
            queries[:size],
            scales,
            codes,
            meta,
            entry_codes,
            entry_meta,
            entry_ids,
            neighbours,
            tables,
            slack,
            pool_scores,
            pool_ids,
            counts[first : first + size],
        )
        for token in range(size + 1):
            if token < size:
                counts[first + token, 2] = min(counts[first + token, 2], most)
                for place in range(counts[first + token, 2]):
                    pool_ids[token, place] &= ID_BITS
                    prefetch_row(rows, pool_ids[token, place])
            if token > 0:  # One behind, so that its rows have arrived.
                _rank(first + token - 1, token - 1, counts, pool_ids, hidden, rows, scale, bias, scores, classes)
