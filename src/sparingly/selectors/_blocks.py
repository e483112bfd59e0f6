"""Scores of groups as blocks: a group's rows are read once and multiplied with all tokens that chose it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._arrays import as_numpy, as_vector
from sparingly.ops._numba import NOTHING, heap_clear, heap_push, heap_sort, inlined, kernel, prefetch_row, to_f32
from sparingly.ops._record import row_bytes, tensor_bytes
from sparingly.ops._threads import run_chunks

# Rows of a tile: 4 rows by 2 tokens keep 8 sums in registers and load 6 vectors for 8 multiply-adds.
TILE = 4
AHEAD = 8


@kernel
def invert(probed, num_groups):
    """(starts [groups + 1], pairs): pairs starts[g]..starts[g+1] are the flat places in ``probed`` that name g."""
    tokens, probes = probed.shape
    starts = np.zeros(num_groups + 1, np.int64)
    for token in range(tokens):
        for rank in range(probes):
            starts[probed[token, rank] + 1] += 1
    for group in range(num_groups):
        starts[group + 1] += starts[group]
    following = starts[:-1].copy()
    pairs = np.empty(tokens * probes, np.int64)
    for token in range(tokens):
        for rank in range(probes):
            group = probed[token, rank]
            pairs[following[group]] = token * probes + rank
            following[group] += 1
    return starts, pairs


@inlined
def _widen(rows, row, scale, tile, place):
    """``rows[row]``, scaled, as float32 into ``tile[place]``."""
    factor = np.float32(1.0)
    if scale.size:
        factor = scale[row]
    for j in range(rows.shape[1]):
        tile[place, j] = to_f32(rows[row, j]) * factor


@inlined
def _dot4x2(tile, hidden, first, second, sums):
    """Products of the tile's 4 rows with 2 tokens into sums [8]."""
    a0 = np.float32(0.0)
    a1 = np.float32(0.0)
    a2 = np.float32(0.0)
    a3 = np.float32(0.0)
    b0 = np.float32(0.0)
    b1 = np.float32(0.0)
    b2 = np.float32(0.0)
    b3 = np.float32(0.0)
    for j in range(tile.shape[1]):
        x = hidden[first, j]
        y = hidden[second, j]
        a0 += tile[0, j] * x
        a1 += tile[1, j] * x
        a2 += tile[2, j] * x
        a3 += tile[3, j] * x
        b0 += tile[0, j] * y
        b1 += tile[1, j] * y
        b2 += tile[2, j] * y
        b3 += tile[3, j] * y
    sums[0] = a0
    sums[1] = a1
    sums[2] = a2
    sums[3] = a3
    sums[4] = b0
    sums[5] = b1
    sums[6] = b2
    sums[7] = b3


@kernel
def _multiply(start, stop, hidden, rows, scale, bias, members, lengths, order, starts, pairs, probes, scores, classes):
    """The best k of each (token, group) pair of the groups order[start..stop], unsorted; classes hold places."""
    tile = np.zeros((TILE, rows.shape[1]), np.float32)
    sums = np.empty(2 * TILE, np.float32)
    for at in range(start, stop):
        group = order[at]
        first, last, size = starts[group], starts[group + 1], lengths[group]
        for at_pair in range(first, last):
            heap_clear(scores, classes, pairs[at_pair])
        for base in range(0, size, TILE):
            count = min(TILE, size - base)
            for place in range(count):
                ahead = base + place + AHEAD
                if ahead < size:
                    prefetch_row(rows, members[group, ahead])
                _widen(rows, members[group, base + place], scale, tile, place)
            for at_pair in range(first, last, 2):
                pair = pairs[at_pair]
                twin = pairs[min(at_pair + 1, last - 1)]
                _dot4x2(tile, hidden, pair // probes, twin // probes, sums)
                for place in range(count):
                    offset = np.float32(0.0)
                    if bias.size:
                        offset = bias[members[group, base + place]]
                    score = sums[place] + offset
                    if not score <= scores[pair, 0] or classes[pair, 0] == NOTHING:
                        heap_push(scores, classes, pair, score, base + place)
                    score = sums[TILE + place] + offset
                    if twin != pair and (not score <= scores[twin, 0] or classes[twin, 0] == NOTHING):
                        heap_push(scores, classes, twin, score, base + place)


@kernel
def _merge(start, stop, probed, members, pair_scores, pair_places, scores, classes):
    """The best k of each token over its groups; a class that came from two of them counts once."""
    probes = probed.shape[1]
    k = scores.shape[1]
    heads = np.zeros(probes, np.int64)
    for token in range(start, stop):
        heads[:] = 0
        for rank in range(probes):
            heap_sort(pair_scores, pair_places, token * probes + rank)
        found = 0
        while found < k:
            best = -1
            for rank in range(probes):
                pair = token * probes + rank
                if heads[rank] == k or pair_places[pair, heads[rank]] == NOTHING:
                    continue
                score = pair_scores[pair, heads[rank]]
                if best < 0:
                    best = rank
                else:
                    leader = pair_scores[token * probes + best, heads[best]]
                    if score > leader or (np.isnan(score) and not np.isnan(leader)):
                        best = rank
            if best < 0:
                break
            pair = token * probes + best
            number = np.int64(members[probed[token, best], pair_places[pair, heads[best]]])
            known = False
            for place in range(found):
                known = known or classes[token, place] == number
            if not known:
                scores[token, found] = pair_scores[pair, heads[best]]
                classes[token, found] = number
                found += 1
            heads[best] += 1
        for place in range(found, k):
            scores[token, place] = -np.inf
            classes[token, place] = -1


@kernel
def _expand(start, stop, probed, members, others, lengths, ids):
    """The classes of each token's groups, each once."""
    probes = probed.shape[1]
    rank_of = np.full(members.shape[0], probes, np.int64)
    for token in range(start, stop):
        for rank in range(probes):
            rank_of[probed[token, rank]] = rank
        at = 0
        for rank in range(probes):
            group = probed[token, rank]
            for place in range(lengths[group]):
                # A class that an earlier group of this token holds too is there already.
                fresh = True
                for copy in range(others.shape[2]):
                    fresh = fresh and rank_of[others[group, place, copy]] > rank
                if fresh:
                    ids[token, at] = members[group, place]
                    at += 1
        for rest in range(at, ids.shape[1]):
            ids[token, rest] = -1
        for rank in range(probes):
            rank_of[probed[token, rank]] = probes


def expand(probed: Tensor, members: Tensor, others: Tensor, lengths: Tensor) -> Tensor:
    """probed int64 [tokens, probes] -> ids int64 [tokens, probes * capacity], no class twice in a row, -1 pads last.

    members int32 [groups, capacity], others int32 [groups, capacity, copies - 1]: the other groups of each member.
    """
    tokens, probes = probed.shape
    ids = torch.empty(tokens, probes * members.shape[1], dtype=torch.int64)
    arrays = (probed.numpy(), members.numpy(), others.numpy(), lengths.numpy(), ids.numpy())
    run_chunks(_expand, tokens, tensor_bytes(ids), *arrays)
    if ledger.active():
        visited = int(lengths[probed].sum())
        ledger.record(
            "sparingly::expand_groups",
            dtype=torch.int32,
            other=visited * max(1, others.shape[2]),
            bytes_read=visited * 4 * (1 + others.shape[2]) + tensor_bytes(probed),
            bytes_written=tensor_bytes(ids),
        )
    return ids


def topk_blocks(
    hidden: Tensor,
    rows: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    members: Tensor,
    lengths: Tensor,
    probed: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Best k of each token among the members of its probed groups, each active group's rows read once.

    hidden [tokens, d]; rows [num_units, d] float32, bfloat16 or int8 (with scale [num_units]); members int32
    [groups, capacity], the first lengths [groups] of each row valid; probed int64 [tokens, probes], no group twice in a
    row -> scores float32 and classes int64 [tokens, k], best first; -inf and -1 where there are fewer than k.
    """
    tokens, probes = probed.shape
    groups = probed.numpy()
    starts, pairs = invert(groups, members.shape[0])
    order = np.flatnonzero(np.diff(starts))
    hidden = hidden.detach().float().contiguous()
    pair_scores = np.empty((tokens * probes, k), dtype=np.float32)
    pair_places = np.empty((tokens * probes, k), dtype=np.int64)
    scores = torch.empty(tokens, k, dtype=torch.float32)
    classes = torch.empty(tokens, k, dtype=torch.int64)
    sizes = lengths.numpy()
    read = int(sizes[order].sum())
    products = int(sizes[groups].sum())
    table = members.numpy()
    run_chunks(
        _multiply,
        len(order),
        products * row_bytes(rows),
        as_numpy(hidden),
        as_numpy(rows),
        as_vector(scale),
        as_vector(bias),
        table,
        sizes,
        order,
        starts,
        pairs,
        probes,
        pair_scores,
        pair_places,
    )
    run_chunks(
        _merge, tokens, pair_scores.nbytes, groups, table, pair_scores, pair_places, scores.numpy(), classes.numpy()
    )
    if ledger.active():
        kept = pair_scores.nbytes + pair_places.nbytes
        ledger.record(
            "sparingly::topk_blocks",
            dtype=rows.dtype,
            macs=products * rows.shape[1],
            other=products,
            # A block's rows once; the hidden states once for each tile of rows that they meet would be cache traffic.
            bytes_read=read * (row_bytes(rows, scale, bias) + 4) + tensor_bytes(hidden, probed) + kept,
            bytes_written=tensor_bytes(scores, classes) + kept,
        )
    return scores, classes
