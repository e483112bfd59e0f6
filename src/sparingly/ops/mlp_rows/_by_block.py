"""Batches whose tokens share blocks: each block's rows are read once for all tokens of a chunk that chose it."""

from __future__ import annotations

import numpy as np

from sparingly.ops._numba import EIGHT, axpy_eight, dot_eight, eight, inlined, prefetch_row, to_f32
from sparingly.ops._numba import kernel as compiled
from sparingly.ops.mlp_rows._activations import activate_all
from sparingly.ops.mlp_rows._places import arrays

SHARED = 2
"""From so many tokens for each block on. Below, going from token to token costs less: the tokens' vectors move more
often than the rows."""


AHEAD = 2
"""So many tokens ahead their vectors are asked for."""


def pays(tokens: int, k: int, block: int, blocks: int) -> bool:
    """True if tokens with k blocks each, of ``blocks``, are better served block by block."""
    return block % EIGHT == 0 and tokens * k >= SHARED * blocks


@inlined
def _run(token, place, act, hidden, up, bias, down, weights, scores, sums, units, values):
    """One block for one token; units: its units, a multiple of eight."""
    weight = weights[token, place] if weights.size else np.float32(1.0)
    for at in range(0, units.size, EIGHT):
        s0, s1, s2, s3, s4, s5, s6, s7 = dot_eight(up, eight(units, at, 1), hidden, token)
        values[at], values[at + 1], values[at + 2], values[at + 3] = s0, s1, s2, s3
        values[at + 4], values[at + 5], values[at + 6], values[at + 7] = s4, s5, s6, s7
        for one in range(at, at + EIGHT):
            score = values[one]
            if bias.size:
                score += to_f32(bias[units[one]])
            scores[token, place * units.size + one] = score
            values[one] = score
        activate_all(act, values, at, at + EIGHT)
        for one in range(at, at + EIGHT):
            values[one] *= weight
        axpy_eight(eight(values, at, 1), eight(units, at, 1), down, sums, token)


@compiled
def part(start, stop, like, sizes, at):
    """As :func:`sparingly.ops.mlp_rows.cpu.part`, block by block."""
    _, k, block, num_units, _, d_out, act = sizes
    hidden, up, bias, down, ids, weights, scores, sums = arrays(like, sizes, at)
    bounds = np.zeros(num_units // block + 1, np.int64)
    places = np.empty((stop - start) * k, np.int64)
    for token in range(start, stop):
        for j in range(d_out):
            sums[token, j] = np.float32(0.0)
        for place in range(k):
            if ids[token, place] >= 0:
                bounds[ids[token, place] + 1] += 1
                continue
            for r in range(block):
                scores[token, place * block + r] = np.float32(0.0)
    for one in range(1, bounds.size):
        bounds[one] += bounds[one - 1]
    # Each place goes to where its block begins, which moves on: afterwards bounds[b] is where block b ends.
    for token in range(start, stop):
        for place in range(k):
            if ids[token, place] >= 0:
                places[bounds[ids[token, place]]] = token * k + place
                bounds[ids[token, place]] += 1
    units, values = np.empty(block, np.int64), np.empty(block, np.float32)
    first = 0
    for chosen in range(bounds.size - 1):
        for r in range(block):
            units[r] = chosen * block + r
        for position in range(first, bounds[chosen]):
            token, place = places[position] // k, places[position] % k
            if position + AHEAD < bounds[bounds.size - 2]:
                prefetch_row(hidden, places[position + AHEAD] // k)
                prefetch_row(sums, places[position + AHEAD] // k)
            _run(token, place, act, hidden, up, bias, down, weights, scores, sums, units, values)
        first = bounds[chosen]
