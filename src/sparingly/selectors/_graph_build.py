"""Builds the neighbour lists of :class:`sparingly.selectors.graph.Graph`.

Rows are clustered, each row joins its few nearest clusters, and within a cluster all pairs are compared by one matrix
product: the same neighbours as by inserting rows one by one, in about half the processor time, and in an order that
does not depend on threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._numba import dot_i8, inlined, kernel, prefetch_row
from sparingly.ops._threads import run_chunks
from sparingly.selectors._graph_search import BLOCK, ID_BITS, META_BYTES, SLOTS, TABLE, walk

MEMBERS = 256
"""Rows per cluster, on average and at least, before each row joins JOINS of them."""
JOINS = 3
LIST = 40
"""Nearest rows taken from each cluster."""
CONSIDERED = 64
"""Nearest rows that thinning looks at."""
MANY = 2048
"""Centroids beyond which finding them is made cheaper; at 288,992 rows (1,128 of them) it cost 0.1 % of agreement."""
SHARE_OF_MANY = 4
"""One in so many centroids is then compared with a row."""


def unit(rows: Tensor) -> Tensor:
    """Rows scaled to length one; rows of zeros stay."""
    return torch.nn.functional.normalize(rows.float(), dim=1)


def cluster(rows: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Spherical k-means on a sample: unit rows [n, c] -> unit centroids [clusters, c]."""
    n = rows.shape[0]
    rounds, share = (5, 32) if clusters <= MANY else (3, 16)
    sample = rows[torch.randperm(n, generator=generator)[: min(n, clusters * share)]]
    centroids = sample[:clusters].clone()
    for _ in range(rounds):
        nearest = torch.cat([(part @ centroids.T).argmax(1) for part in sample.split(2048)])
        sums = torch.zeros_like(centroids).index_add_(0, nearest, sample)
        empty = torch.bincount(nearest, minlength=clusters) == 0
        sums[empty] = sample[torch.randint(sample.shape[0], (int(empty.sum()),), generator=generator)]
        centroids = unit(sums)
    return centroids


def join(rows: Tensor, centroids: Tensor, joins: int, generator: torch.Generator) -> Tensor:
    """Ids of the nearest centroids, best first: unit rows [n, c] -> int64 [n, joins].

    Many centroids are clustered themselves, and a row is compared with those near the middle of its own group only.
    """
    if len(centroids) <= MANY:
        return torch.cat([(part @ centroids.T).topk(joins, dim=1).indices for part in rows.split(2048)])
    middles = cluster(centroids, int(len(centroids) ** 0.5), generator)
    group = torch.cat([(part @ middles.T).argmax(1) for part in rows.split(2048)])
    order = torch.argsort(group)
    members = order.split(torch.bincount(group, minlength=len(middles)).tolist())
    joined = torch.empty(len(rows), joins, dtype=torch.int64)
    for middle, whole in zip(middles, members, strict=True):
        close = (centroids @ middle).topk(len(centroids) // SHARE_OF_MANY).indices
        near = centroids[close].T
        for part in whole.split(2048):
            joined[part] = close[(rows[part] @ near).topk(joins, dim=1).indices]
    return joined


@inlined
def _edge(products, i, count):
    """(below, above): at least ``count`` of products[i] reach the first, if so many are there, at most the second.

    Bisected to 0.001: counting runs on whole vector registers, and ``topk`` took thirty times as long.
    """
    one, none = np.float32(1.0), np.float32(0.0)
    below, above = np.float32(-1.01), np.float32(1.01)
    for _ in range(11):
        middle = (below + above) * np.float32(0.5)
        many = none
        for j in range(products.shape[1]):
            many += one if products[i, j] >= middle else none
        if many >= count:
            below = middle
        if many <= count:
            above = middle
        if many == count:
            break
    return below, above


@kernel
def _select(start, stop, products, low, who, places, count, ids, similarities):
    """Of each row of cosines [rows, members] the best ``count`` into ids, similarities [n, joins * count], unordered.

    Row i is member ``low + i``, who[member] its id and places[member] its block of columns. Of those at the edge, 0.001
    wide, the first ones are taken.
    """
    better = np.empty(products.shape[1], np.int32)
    for i in range(start, stop):
        products[i, low + i] = -2.0  # No row is its own neighbour.
        below, above = _edge(products, i, count)
        found = 0
        for j in range(products.shape[1]):
            better[found] = j
            found += products[i, j] >= below
        spare = count
        for f in range(found):
            spare -= products[i, better[f]] >= above
        row, kept = who[low + i], places[low + i] * count
        for f in range(found):
            j = better[f]
            if products[i, j] < above:
                if spare == 0:
                    continue
                spare -= 1
            ids[row, kept] = who[j]
            similarities[row, kept] = products[i, j]
            kept += 1


def nearest(rows: Tensor, joined: Tensor, clusters: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Approximate nearest rows by cosine: (int32 [n, joins * count] ids or -1, float32 likewise similarities).

    rows: unit [n, c]; joined: [n, joins] from :func:`join`. Column block j holds what the row's j-th cluster gave.
    """
    n, joins = joined.shape
    ids = np.full((n, joins * count), -1, np.int32)
    similarities = np.full((n, joins * count), -np.inf, np.float32)
    flat = joined.reshape(-1)
    order = torch.argsort(flat, stable=True)
    bounds = torch.bincount(flat, minlength=clusters).cumsum(0).tolist()
    # One buffer for all: the system would clear the pages of each new one.
    products, begin = torch.empty(2048 * int(np.diff(bounds, prepend=0).max())), 0
    for end in bounds:
        members = order[begin:end]
        begin = end
        if members.numel() < 2:
            continue
        who, places = members // joins, (members % joins).numpy()
        block, names = rows[who], who.to(torch.int32).numpy()
        for low in range(0, len(block), 2048):
            some = block[low : low + 2048]
            part = torch.mm(some, block.T, out=products[: len(some) * len(block)].view(len(some), -1)).numpy()
            run_chunks(_select, len(part), part.nbytes, part, low, names, places, count, ids, similarities)
    return ids, similarities


@inlined
def _falling(ids, similarities, row, order, counts):
    """Positions of the ids >= 0 in a row, by falling similarity, into order [width]; returns how many.

    Counting sort by 256 steps, counts [257], then insertion: a seventh of the time of ``argsort``.
    """
    width, size = ids.shape[1], 0
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for j in range(width):
        if ids[row, j] >= 0:
            low, high = min(low, similarities[row, j]), max(high, similarities[row, j])
            size += 1
    step = np.float32(255.0) / max(high - low, np.float32(1e-6))
    counts[:] = 0
    for j in range(width):
        if ids[row, j] >= 0:
            counts[np.int32((high - similarities[row, j]) * step) + 1] += 1
    for j in range(1, counts.size):
        counts[j] += counts[j - 1]
    for j in range(width):
        if ids[row, j] >= 0:
            near = np.int32((high - similarities[row, j]) * step)
            order[counts[near]] = j
            counts[near] += 1
    for j in range(1, size):
        place, moved = j, order[j]
        while place > 0 and similarities[row, order[place - 1]] < similarities[row, moved]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = moved
    return size


@kernel
def _thin(start, stop, ids, similarities, codes, lengths, degree, out):
    """Choose up to ``degree`` diverse neighbours for rows start..stop.

    Nearest first; one that is closer to a neighbour chosen before than to the row itself is passed over (Malkov and
    Yashunin 2020, algorithm 4), then the nearest of those passed over fill the list.
    """
    order = np.empty(ids.shape[1], np.int32)
    counts = np.empty(257, np.int32)
    spare, seen = np.empty(CONSIDERED, np.int32), np.empty(CONSIDERED, np.int32)
    for row in range(start, stop):
        size = _falling(ids, similarities, row, order, counts)
        for rank in range(min(size, 8)):
            prefetch_row(codes, ids[row, order[rank]])
        kept, spares, considered = 0, 0, 0
        for rank in range(size):
            other = ids[row, order[rank]]
            if rank + 8 < size:
                prefetch_row(codes, ids[row, order[rank + 8]])
            if kept == degree or considered == CONSIDERED:
                break
            double = False
            for j in range(considered):
                double |= seen[j] == other
            if double:
                continue
            seen[considered] = other
            considered += 1
            near = similarities[row, order[rank]]
            ok = True
            for j in range(kept):
                chosen = out[row, j]
                if np.float32(dot_i8(codes, other, codes, chosen)) > near * lengths[other] * lengths[chosen]:
                    ok = False
                    break
            if ok:
                out[row, kept] = other
                kept += 1
            else:
                spare[spares] = other
                spares += 1
        for j in range(spares):
            if kept == degree:
                break
            out[row, kept] = spare[j]
            kept += 1
        for j in range(kept, degree):
            out[row, j] = -1


@kernel
def _both_ways(forward, out):
    """Add every link's reverse while there is room: forward [n, half] -> out [n, degree].

    Every row is then in the list of its nearest neighbour, which gives up its farthest one if it must.
    """
    n, half = forward.shape
    degree = out.shape[1]
    size = np.zeros(n, np.int32)
    for row in range(n):
        for j in range(half):
            if forward[row, j] >= 0:
                out[row, size[row]] = forward[row, j]
                size[row] += 1
    for j in range(half):
        for row in range(n):
            other = forward[row, j]
            if other < 0:
                continue
            there = False
            for i in range(size[other]):
                there |= out[other, i] == row
            if there:
                continue
            if size[other] < degree:
                out[other, size[other]] = row
                size[other] += 1
            elif j == 0:
                out[other, degree - 1] = row


@kernel
def _look(
    start, stop, first, codes, records, meta, lengths, reach, entries, entry_records, entry_meta, lists, ids, near
):
    """What a walk that aims at row ``first + i`` finds: ids, near [n, beam], for i in start..stop.

    The query is the row's own direction, ``reach`` long, so that the walk meets what a real query for this class
    meets, large biases and norms included.
    """
    tables = np.empty((SLOTS, TABLE), np.int32)
    counts = np.empty((BLOCK, 3), np.int64)
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        scales = np.float32(reach) / np.maximum(lengths[first + low : first + high], np.float32(1e-20))
        walk(
            codes[first + low : first + high],
            scales,
            records,
            meta,
            entry_records,
            entry_meta,
            entries,
            lists,
            tables,
            np.float32(np.inf),
            near[low:high],
            ids[low:high],
            counts,
        )
        for i in range(low, high):
            row, kept = first + i, 0
            for place in range(counts[i - low, 2]):
                other = ids[i, place] & ID_BITS
                if other != row:
                    ids[i, kept] = other
                    near[i, kept] = np.float32(dot_i8(codes, other, codes, row)) / (lengths[other] * lengths[row])
                    kept += 1
            ids[i, kept:] = -1
            near[i, kept:] = -np.inf


def build(
    rows: Tensor, records: np.ndarray, reach: float, degree: int, num_entries: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(neighbour lists int32 [n, degree] with -1 pads, entry ids int32 [<= num_entries]) of rows [n, c] float32.

    The rows are overwritten, scaled to length one: there may be gigabytes of them.
    records: int8 [n, bytes] of the same rows. reach: typical length of a hidden state.
    """
    generator = torch.Generator().manual_seed(seed)
    n = rows.shape[0]
    for part in rows.split(1 << 16):
        part.copy_(unit(part))
    codes = records.copy()
    codes[:, -META_BYTES:] = 0
    parts = (codes[low : low + (1 << 16)].astype(np.float32) for low in range(0, n, 1 << 16))
    lengths = np.concatenate([np.linalg.norm(part, axis=1) for part in parts]) + np.float32(1e-20)
    clusters = max(1, min(n // MEMBERS, int(4 * n**0.5)))
    centroids = cluster(rows, clusters, generator)
    joined = join(rows, centroids, min(JOINS, clusters), generator)
    ids, near = nearest(rows, joined, clusters, LIST)
    entries = _entries(rows, cluster(rows, max(1, min(num_entries, n // 4)), generator))
    half = np.full((n, degree // 2), -1, np.int32)
    thin_bytes = n * degree * codes.shape[1]
    run_chunks(_thin, n, thin_bytes, ids, near, codes, lengths, degree // 2, half)
    lists = np.full((n, degree), -1, np.int32)
    _both_ways(half, lists)
    _improve(lists, half, ids, near, codes, records, lengths, reach, entries)
    lists.fill(-1)
    _both_ways(half, lists)
    return lists, entries


def _entries(rows: Tensor, centroids: Tensor) -> np.ndarray:
    """The row nearest each centroid, each row once."""
    chosen = [(part @ rows.T).argmax(1) for part in centroids.split(64)]
    return torch.cat(chosen).unique().to(torch.int32).numpy()


def _improve(lists, half, ids, near, codes, records, lengths, reach, entries, beam: int = 48, chunk: int = 1 << 16):
    """Thin each list out again, from the nearest rows and from what a walk towards the row finds; writes ``half``.

    On trained word vectors (288,992 rows) this lifted the agreement at the same number of records scored from 0.952 to
    0.970 (beam 64); a second round gave 0.972 and was left out.
    """
    meta, entry_records = records.view(np.float32), records[entries]
    for first in range(0, len(ids), chunk):
        size = min(chunk, len(ids) - first)
        found, similar = np.empty((size, beam), np.int32), np.empty((size, beam), np.float32)
        views = (codes, records, meta, lengths, reach, entries, entry_records, entry_records.view(np.float32), lists)
        run_chunks(_look, size, size * beam * 4096, first, *views, found, similar)
        every = np.concatenate([ids[first : first + size], found], axis=1)
        weights = np.concatenate([near[first : first + size], similar], axis=1)
        part = half[first : first + size]
        run_chunks(_thin, size, size * beam * 4096, every, weights, codes, lengths, half.shape[1], part)
