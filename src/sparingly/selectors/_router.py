"""The router of :class:`sparingly.selectors.partition.Partition`: two levels of linear scores on unit-length inputs.

Groups are arranged in equally large families. A token scores all families, then the groups of its best few families:
about 2 * sqrt(groups) rows times the number of families followed, where one level would score every group.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.energy import ledger
from sparingly.ops._numba import dot, heap_clear, heap_push, heap_sort, inlined, kernel
from sparingly.ops._record import tensor_bytes
from sparingly.ops._threads import run_chunks
from sparingly.selectors._assign import assign

SHARPNESS = 20.0
"""Length of a fresh group vector: the softmax over groups of unit inputs then neither saturates nor is flat."""
SAMPLE = 16
"""Rows per group that clustering looks at."""
ROUNDS = 6
REFINEMENTS = 3
REFINE_BEAM = 6


class Router(NamedTuple):
    """Scores of families and groups, float32 on the CPU."""

    families: Tensor  # [families, d]
    family_bias: Tensor  # [families]
    vectors: Tensor  # [groups, d], family by family
    group_bias: Tensor  # [groups]


def unit(rows: Tensor) -> Tensor:
    """Rows scaled to length one, float32; rows of zeros stay."""
    return nn.functional.normalize(rows.float(), dim=1)


def family_size(groups: int) -> int:
    """Groups per family: the divisor of ``groups`` that is nearest to its square root."""
    divisors = [size for size in range(1, groups + 1) if groups % size == 0]
    return min(divisors, key=lambda size: abs(math.log(size * size / groups)))


def centroids(rows: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spherical k-means: unit rows [n, d], n >= 1 -> (unit centroids [count, d], nearest centroid int64 [n])."""
    start = torch.randperm(rows.shape[0], generator=generator)
    centers = rows[start[torch.arange(count) % rows.shape[0]]].clone()
    nearest = torch.zeros(rows.shape[0], dtype=torch.int64)
    for turn in range(ROUNDS):
        nearest = torch.cat([(part @ centers.T).argmax(1) for part in rows.split(16384)])
        if turn == ROUNDS - 1:
            break
        sums = torch.zeros_like(centers).index_add_(0, nearest, rows)
        empty = torch.bincount(nearest, minlength=count) == 0
        sums[empty] = rows[torch.randint(rows.shape[0], (int(empty.sum()),), generator=generator)]
        centers = unit(sums)
    return centers, nearest


def _shares(sizes: Tensor, total: int) -> list[int]:
    """``total`` split in proportion to ``sizes``, whole numbers (largest remainders)."""
    exact = sizes.double() * total / sizes.sum()
    shares = exact.floor().long()
    rest = (exact - shares).argsort(descending=True)[: total - int(shares.sum())]
    shares[rest] += 1
    return shares.tolist()


def cluster(rows: Tensor, groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Group vectors [groups, d], arranged by family, and family vectors [families, d] for unit rows [n, d].

    Rows are split into sqrt(groups) parts and each part into as many groups as its share of rows; the groups are then
    put into families of equal size, as near to a family's center as fits, and moved by rounds of k-means.
    """
    sample = rows[torch.randperm(rows.shape[0], generator=generator)[: groups * SAMPLE]]
    size = family_size(groups)
    families = groups // size
    parts, nearest = centroids(sample, families, generator)
    fine = []
    for part, share in enumerate(_shares(torch.bincount(nearest, minlength=families), groups)):
        if share:
            fine.append(centroids(sample[nearest == part], share, generator)[0])
    vectors = torch.cat(fine)

    def nearness(numbers: Tensor, open_families: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = vectors[numbers] @ parts.T
        if open_families is not None:
            scores = scores.masked_fill(~open_families, -torch.inf)
        values, order = scores.sort(dim=1, descending=True, stable=True)
        return values.contiguous(), order.contiguous()

    family = assign(nearness, torch.full((groups, 1), -1), families, size)[:, 0]
    return _refine(rows, vectors[torch.argsort(family, stable=True)], families, generator)


def _refine(rows: Tensor, vectors: Tensor, families: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rounds of k-means over all groups, with the router itself looking for the nearest.

    Undoes what splitting part by part got wrong: 16 of 4,096 groups then held the best class of 97.2 % of inputs
    instead of 95.9 % (288,992 trained classes of a spelling task, four homes each).
    """
    sample = rows[torch.randperm(rows.shape[0], generator=generator)[: vectors.shape[0] * 2 * SAMPLE]]
    parents = unit(vectors.reshape(families, -1, vectors.shape[1]).mean(dim=1))
    no_bias = torch.zeros(vectors.shape[0])
    for _ in range(REFINEMENTS):
        router = Router(parents, no_bias[:families], vectors, no_bias)
        nearest = best_groups(sample, router, REFINE_BEAM, 1)[1][:, 0]
        sums = torch.zeros_like(vectors).index_add_(0, nearest, sample)
        empty = torch.bincount(nearest, minlength=vectors.shape[0]) == 0
        sums[empty] = vectors[empty]
        vectors = unit(sums)
        parents = unit(vectors.reshape(families, -1, vectors.shape[1]).mean(dim=1))
    return vectors, parents


@inlined
def _dot4(rows, row, hidden, token, sums):
    """Products of rows row..row+3 with one token into sums [4]: four sums hide the latency of the additions."""
    a = np.float32(0.0)
    b = np.float32(0.0)
    c = np.float32(0.0)
    d = np.float32(0.0)
    for j in range(rows.shape[1]):
        x = hidden[token, j]
        a += rows[row, j] * x
        b += rows[row + 1, j] * x
        c += rows[row + 2, j] * x
        d += rows[row + 3, j] * x
    sums[0] = a
    sums[1] = b
    sums[2] = c
    sums[3] = d


@inlined
def _push_range(rows, bias, start, stop, hidden, token, factor, sums, scores, positions):
    """Push rows start..stop, scored, into the token's heap."""
    for base in range(start, stop, 4):
        count = min(4, stop - base)
        if count == 4:
            _dot4(rows, base, hidden, token, sums)
        else:
            for place in range(count):
                sums[place] = dot(rows, base + place, hidden, token)
        for place in range(count):
            heap_push(scores, positions, token, sums[place] * factor + bias[base + place], base + place)


@kernel
def _route(
    start, stop, hidden, families, family_bias, vectors, group_bias, family_scores, followed, scores, groups
):  # fmt: skip
    size = vectors.shape[0] // families.shape[0]
    sums = np.zeros(4, np.float32)
    for token in range(start, stop):
        length = np.sqrt(dot(hidden, token, hidden, token))
        factor = np.float32(1.0) / max(length, np.float32(1e-12))
        heap_clear(family_scores, followed, token)
        heap_clear(scores, groups, token)
        _push_range(families, family_bias, 0, families.shape[0], hidden, token, factor, sums, family_scores, followed)
        for place in range(followed.shape[1]):
            first = followed[token, place] * size
            _push_range(vectors, group_bias, first, first + size, hidden, token, factor, sums, scores, groups)
        heap_sort(scores, groups, token)


def best_groups(hidden: Tensor, router: Router, beam: int, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best groups in each token's ``beam`` best families: scores and groups [tokens, count], best first.

    hidden: [tokens, d], float32 on the CPU, of any length: it counts as scaled to length one. ``beam`` families
    must hold ``count`` groups.
    """
    tokens, number, size = hidden.shape[0], router.families.shape[0], router.vectors.shape[0]
    beam = min(beam, number)
    visited = number + beam * (size // number)
    scores = torch.empty(tokens, count, dtype=torch.float32)
    groups = torch.empty(tokens, count, dtype=torch.int64)
    arrays = [value.contiguous().numpy() for value in (hidden, *router)]
    scratch = np.empty((tokens, beam), np.float32), np.empty((tokens, beam), np.int64)
    work = tokens * visited * hidden.shape[1]
    # The router stays in cache, where work goes some four times as fast as through rows of a bank.
    run_chunks(_route, tokens, work, *arrays, *scratch, scores.numpy(), groups.numpy())
    if ledger.active():
        ledger.record(
            "sparingly::route",
            dtype=torch.float32,
            macs=work,
            other=tokens * visited,
            # Each operand once per operation: the router's rows once, however many tokens share them.
            bytes_read=min(tokens * visited, number + size) * 4 * (hidden.shape[1] + 1) + tensor_bytes(hidden),
            bytes_written=tensor_bytes(scores, groups),
        )
    return scores, groups
