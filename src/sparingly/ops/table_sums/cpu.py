"""Sums of one row from each table on the CPU: table by table, so that its rows stay in the first cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._arrays import as_numpy, not_for_numba
from sparingly.ops._numba import axpy
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import record_rows
from sparingly.ops._threads import run_chunks
from sparingly.ops.table_sums.reference import check_places

BLOCK = 128
"""Tokens that pass a table together: their sums stay in the cache too."""
TILE = 16


@compiled
def _turn(ids, size, local):
    """local int32 [k, tokens] becomes ids [tokens, k] turned, each within its own table of ``size`` rows, -1 at pads.

    How many are no pads; -1 if one is of another table. A walk along a column of ids would miss the cache and the
    address translation at every step.
    """
    tokens, k = ids.shape
    count, wrong = 0, 0
    for begin in range(0, tokens, TILE):
        end = min(begin + TILE, tokens)
        for place in range(k):
            for token in range(begin, end):
                row = ids[token, place]
                known = row >= 0
                inside = row - place * size if known else -1
                count += known
                wrong += (row < -1) | (inside >= size) | (known & (inside < 0))
                local[place, token] = inside
    return -1 if wrong else count


@compiled
def _known(local, place, start, stop, tokens):
    """tokens[:n] become those of start..stop that name a row of the table; returns n."""
    found = 0
    for token in range(start, stop):
        # Written in any case: a branch would be mispredicted too often.
        tokens[found] = token
        found += local[place, token] >= 0
    return found


@compiled
def _sums(start, stop, factors, rows, local, out):
    """Tokens start..stop of out [tokens, groups * d]."""
    groups, (_, d), k = factors.shape[1], rows.shape, local.shape[0]
    sums, tokens = np.empty((BLOCK, d), np.float32), np.empty(BLOCK + 1, np.int64)
    for begin in range(start, stop, BLOCK):
        end = min(begin + BLOCK, stop)
        for group in range(groups):
            for token in range(end - begin):
                for j in range(d):
                    sums[token, j] = np.float32(0.0)
            for place in range(group * (k // groups), (group + 1) * (k // groups)):
                first = place * (rows.shape[0] // k)
                for one in range(_known(local, place, begin, end, tokens)):
                    token = tokens[one]
                    axpy(np.float32(1.0), rows, first + local[place, token], sums, token - begin)
            for token in range(begin, end):
                for j in range(d):
                    out[token, group * d + j] = factors[token, group] * sums[token - begin, j]


@compiled
def _touched(start, stop, local, slots):
    """For the tables start..stop: slots [k, size] become 1 where a row is named, 0 elsewhere."""
    for place in range(start, stop):
        for row in range(slots.shape[1]):
            slots[place, row] = 0
        for token in range(local.shape[1]):
            slots[place, max(local[place, token], 0)] |= local[place, token] >= 0


@compiled
def _number(slots, rows):
    """Number what is touched, in the order of rows, and write which rows those are."""
    count = 0
    for place in range(slots.shape[0]):
        for row in range(slots.shape[1]):
            if slots[place, row]:
                rows[count] = place * slots.shape[1] + row
                slots[place, row] = count
                count += 1
            else:
                slots[place, row] = -1


@compiled
def _gradient(start, stop, grad, local, slots, groups, values):
    """For the tables start..stop: sum grad [groups * tokens, d] of the tokens that name a row; values [touched, d]."""
    (tables, size), many = slots.shape, local.shape[1]
    tokens = np.empty(many + 1, np.int64)
    for place in range(start, stop):
        begin = place // (tables // groups) * many
        for row in range(size):
            if slots[place, row] >= 0:
                for j in range(values.shape[1]):
                    values[slots[place, row], j] = np.float32(0.0)
        for one in range(_known(local, place, 0, many, tokens)):
            token = tokens[one]
            axpy(np.float32(1.0), grad, begin + token, values, slots[place, local[place, token]])


def unsupported(factors: Tensor, rows: Tensor, ids: Tensor) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    return not_for_numba(factors, rows, contiguous=(rows,))


def kernel(factors: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """See :func:`sparingly.ops.table_sums.table_sums`."""
    factors = factors.float().contiguous()
    visited, local = _turned(ids, rows.shape[0])
    sums = torch.empty(ids.shape[0], factors.shape[1] * rows.shape[1])
    work = visited * rows.shape[1] * rows.element_size()
    run_chunks(_sums, ids.shape[0], work, *(as_numpy(one.detach()) for one in (factors, rows, local, sums)))
    record_rows("table_sums", visited, rows, read=(factors, ids), written=(sums,))
    return sums


def _turned(ids: Tensor, num_rows: int) -> tuple[int, Tensor]:
    """How many ids are no pads, and what :func:`_turn` makes of them; IndexError for one of another table."""
    local = torch.empty(ids.shape[1], ids.shape[0], dtype=torch.int32)
    visited = int(_turn(as_numpy(ids.contiguous()), num_rows // ids.shape[1], as_numpy(local)))
    if visited < 0:
        check_places(ids, num_rows)
    return visited, local


def gradient(factors: Tensor, grad: Tensor, ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """grad [tokens, groups * d] -> rows that ids names, rising, int64 [n], and their gradients, float32 [n, d]."""
    (tokens, groups), k = factors.shape, ids.shape[1]
    parts = grad.float().view(tokens, groups, -1) * factors.float().unsqueeze(2)
    # A table's sums then read one stretch of memory.
    parts = parts.transpose(0, 1).reshape(groups * tokens, -1)
    visited, local = _turned(ids, num_rows)
    places, slots = as_numpy(local), torch.empty(k, num_rows // k, dtype=torch.int64)
    run_chunks(_touched, k, local.nbytes, places, as_numpy(slots))
    count = int(slots.sum())
    touched = torch.empty(count, dtype=torch.int64)
    _number(as_numpy(slots), as_numpy(touched))
    values = torch.empty(count, parts.shape[1])
    run_chunks(
        _gradient, k, visited * parts.shape[1] * 4, as_numpy(parts), places, as_numpy(slots), groups, as_numpy(values)
    )
    record_rows("table_sums_gradient", visited, parts, read=(ids,), written=(touched, values))
    return touched, values
