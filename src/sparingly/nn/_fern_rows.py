"""Sums of the rows that ferns name, without ids in between: one token at a time, and fern by fern for many.

A fern's rows are few, so that they stay in the first cache while a block of tokens passes: half the time of going from
token to token. For a block the features are turned, so that one comparison is made for all of its tokens at once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._arrays import as_numpy
from sparingly.ops._numba import EIGHT, axpy, axpy_eight, eight, kernel, prefetch_row
from sparingly.ops._record import record_rows
from sparingly.ops._threads import run_chunks
from sparingly.selectors import Ferns
from sparingly.selectors.ferns import arrays, name_patterns

BLOCK = 128
"""Tokens that pass a fern together."""


@kernel
def one_token(x, first, second, cut, blank, rows, gain, sums):
    """x [1, d] -> sums [groups, width], each ``gain / sqrt(n)`` times the sum of the n rows that its ferns name."""
    asked, groups, width = blank.size, sums.shape[0], sums.shape[1]
    ids, known = np.empty((1, asked), np.int64), np.empty(asked, np.int64)
    name_patterns(0, 1, x, first, second, cut, blank, ids)
    start, size = 0, asked // groups
    for group in range(groups):
        stop = start
        for place in range(group * size, (group + 1) * size):
            if ids[0, place] >= 0:
                prefetch_row(rows, ids[0, place])
                known[stop] = ids[0, place]
                stop += 1
        share = gain / np.sqrt(np.float32(max(1, stop - start)))
        shares = (share, share, share, share, share, share, share, share)
        for j in range(width):
            sums[group, j] = np.float32(0.0)
        while start + EIGHT <= stop:
            axpy_eight(shares, eight(known, start, 1), rows, sums, group)
            start += EIGHT
        for place in range(start, stop):
            axpy(share, rows, known[place], sums, group)
        start = stop


@kernel
def _turn(x, first, many, turned):
    """turned[:, :many] = x[first : first + many] turned, sixteen tokens at a time, so that lines are written whole."""
    whole = many - many % 16
    for begin in range(0, whole, 16):
        for j in range(x.shape[1]):
            for token in range(begin, begin + 16):
                turned[j, token] = x[first + token, j]
    for token in range(whole, many):
        for j in range(x.shape[1]):
            turned[j, token] = x[first + token, j]


@kernel
def _patterns(turned, first, second, cut, fern, pattern):
    """What the fern says of each of BLOCK tokens; turned [d, BLOCK]."""
    for token in range(BLOCK):
        pattern[token] = 0
    for test in range(first.shape[0]):
        one, other, least, bit = first[test, fern], second[test, fern], cut[test, fern], np.int32(1 << test)
        for token in range(BLOCK):
            pattern[token] += bit if turned[one, token] - turned[other, token] > least else np.int32(0)


@kernel
def _tokens(start, stop, x, first, second, cut, blank, rows, groups, gain, out, read):
    """Tokens start..stop of x [tokens, d] -> out [tokens, groups * width] as :func:`one_token`, and to read, int64
    [tokens], how many rows each has read."""
    tests, width, size = first.shape[0], rows.shape[1], blank.size // groups
    turned, sums = np.zeros((x.shape[1], BLOCK), np.float32), np.empty((BLOCK, width), np.float32)
    pattern, count = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    seeing = np.empty(BLOCK + 1, np.int64)
    for begin in range(start, stop, BLOCK):
        many = min(BLOCK, stop - begin)
        _turn(x, begin, many, turned)
        for token in range(many):
            read[begin + token] = 0
        for group in range(groups):
            for token in range(BLOCK):
                count[token] = 0
                for j in range(width):
                    sums[token, j] = np.float32(0.0)
            for fern in range(group * size, (group + 1) * size):
                _patterns(turned, first, second, cut, fern, pattern)
                nothing, place, found = blank[fern], fern << tests, 0
                for token in range(many):
                    # Written in any case: a branch would be mispredicted too often.
                    seeing[found] = token
                    sees = pattern[token] != nothing
                    found += sees
                    count[token] += sees
                for j in range(found):
                    axpy(np.float32(1.0), rows, place + pattern[seeing[j]], sums, seeing[j])
            for token in range(many):
                read[begin + token] += count[token]
                share = gain / np.sqrt(np.float32(max(1, count[token])))
                for j in range(width):
                    out[begin + token, group * width + j] = share * sums[token, j]


def look_up(selector: Ferns, x: Tensor, rows: Tensor, groups: int, gain: float) -> tuple[Tensor, int]:
    """x float32 [tokens, d], rows float32 [num_rows, width], both contiguous on the CPU.

    Returns sums [tokens, groups * width] and how many rows were read.
    """
    out = torch.empty(x.shape[0], groups * rows.shape[1])
    read = torch.empty(x.shape[0], dtype=torch.int64)
    tests = selector.asked()
    inputs = [as_numpy(x), *arrays(tests), as_numpy(rows)]
    work = x.shape[0] * selector.setting * rows.shape[1] * 4
    run_chunks(_tokens, x.shape[0], work, *inputs, groups, np.float32(gain), as_numpy(out), as_numpy(read))
    count = int(read.sum())
    if ledger.active():
        compared = 2 * x.shape[0] * selector.setting * selector.tests
        record_rows("fern_rows", count, rows, read=(x, *tests), written=(out,), other=compared)
    return out, count
