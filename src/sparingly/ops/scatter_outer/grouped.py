"""Weighted vectors summed by id on the CPU, group after group: each sum is written once and never zeroed or read.

With 10,000 ids of 256 elements this takes half the time of slots that are zeroed first and then added to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._arrays import as_numpy
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import tensor_bytes
from sparingly.ops._threads import run_chunks


@compiled
def _bounds(ordered, touched, bounds):
    """Where each group of equal ids starts in ``ordered``, pads left out; returns the number of groups."""
    groups = 0
    previous = -1
    for position in range(ordered.size):
        if ordered[position] < 0 or ordered[position] == previous:
            continue
        previous = ordered[position]
        touched[groups] = previous
        bounds[groups] = position
        groups += 1
    bounds[groups] = ordered.size
    return groups


@compiled
def _sum(start, stop, weights, vectors, places, bounds, sums):
    """Sums of the groups start..stop."""
    k = weights.shape[1]
    for group in range(start, stop):
        first = places[bounds[group]]
        weight = weights[first // k, first % k]
        for j in range(sums.shape[1]):
            sums[group, j] = weight * vectors[first // k, j]
        for position in range(bounds[group] + 1, bounds[group + 1]):
            place = places[position]
            weight = weights[place // k, place % k]
            for j in range(sums.shape[1]):
                sums[group, j] += weight * vectors[place // k, j]


@compiled
def _count_places(ids, starts, touched, places, bounds):
    """The same for ids of few rows, starts [num_rows] of zeros: counted instead of sorted. Leaves pads out."""
    for position in range(ids.size):
        if ids[position] >= 0:
            starts[ids[position]] += 1
    groups, start = 0, 0
    for row in range(starts.size):
        if starts[row]:
            touched[groups], bounds[groups] = row, start
            start += starts[row]
            starts[row] = bounds[groups]
            groups += 1
    bounds[groups] = start
    for position in range(ids.size):
        if ids[position] >= 0:
            places[starts[ids[position]]] = position
            starts[ids[position]] += 1
    return groups


COUNTED = 16
"""With up to so many rows for each id, counting them takes less time than sorting the ids."""


def group(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids int64 [tokens, k] below num_rows, -1 is a pad -> (touched [n], places [_], bounds [n + 1]), all int64.

    ``touched``: the ids in rising order; the flat places ``places[bounds[i]:bounds[i + 1]]`` hold ``touched[i]``, and
    rise.
    """
    flat = ids.reshape(-1)
    touched, bounds = torch.empty_like(flat), flat.new_empty(flat.shape[0] + 1)
    if num_rows <= COUNTED * flat.shape[0]:
        places, starts = torch.empty_like(flat), flat.new_zeros(num_rows)
        groups = _count_places(flat.numpy(), starts.numpy(), touched.numpy(), places.numpy(), bounds.numpy())
    else:
        ordered, places = flat.sort(stable=True)
        groups = _bounds(ordered.numpy(), touched.numpy(), bounds.numpy())
    return touched[:groups].clone(), places, bounds[: groups + 1]


def grouped_sums(weights: Tensor, vectors: Tensor, places: Tensor, bounds: Tensor) -> Tensor:
    """Sum of ``weights[t, j] * vectors[t]`` over the places of each group; [n, d], float32.

    weights [tokens, k] and vectors [tokens, d], float32 or bfloat16; places and bounds from :func:`group`.
    """
    weights, vectors = weights.detach().float().contiguous(), vectors.detach().float().contiguous()
    sums = torch.empty(bounds.shape[0] - 1, vectors.shape[1], dtype=torch.float32)
    visited = int(bounds[-1] - bounds[0])
    run_chunks(
        _sum,
        sums.shape[0],
        visited * vectors.shape[1] * 4,
        as_numpy(weights),
        as_numpy(vectors),
        as_numpy(places),
        as_numpy(bounds),
        sums.numpy(),
    )
    if ledger.active():
        ledger.record(
            "sparingly::scatter_outer",
            dtype=sums.dtype,
            macs=visited * vectors.shape[1],
            bytes_read=visited * (vectors.shape[1] * 4 + 12) + tensor_bytes(bounds),
            bytes_written=tensor_bytes(sums),
        )
    return sums
