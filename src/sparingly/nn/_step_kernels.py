"""A token's way through every layer of a selective Llama-type network, as one compiled call on one thread.

The loops over rows are those of the operators; what is left out is the Python between them. Numba does not notice
changes of the files that these loops come from: delete its caches after one.
"""

from __future__ import annotations

import numpy as np

from sparingly.nn._attention_kernels import attend, rms_norm
from sparingly.ops._numba import EIGHT, kernel
from sparingly.ops._views import matrix_at, vector_at
from sparingly.ops.gated_rows.cpu import _add as add_gated
from sparingly.ops.threshold_accumulate.cpu import add_rows, count_ran, find_kept

# Columns of a layer's addresses. A matrix with a threshold on its inputs has seven. Scales are those of int8 rows.
WEIGHT, ROW_SCALE, OUT_SCALE, CUT, CENTRE, REST, RAN = range(7)
QUERY, KEY, VALUE, OUT, GATE = range(0, 35, 7)
UP, UP_SCALE, DOWN, DOWN_SCALE, DOWN_OUT_SCALE, UP_BIAS, MLP_CUT, CUT_OUT, MLP_CENTRE, MLP_REST = range(35, 45)
CODES, SCALE, MLP_RAN, NORM, MLP_NORM = range(45, 50)
COLUMNS = 50


@kernel
def _begin(out, rest, d, added):
    """``out [d] = rest``, or ``+=`` where ``added``; nothing at address 0 counts as zeros."""
    sums, start = vector_at(out, d, np.float32), vector_at(rest, d, np.float32)
    if not added:
        for j in range(d):
            sums[j] = start[j] if start.size else np.float32(0.0)
    elif start.size:
        for j in range(d):
            sums[j] += start[j]


@kernel
def _off_centre(values, centre, n, out):
    """``out [n] = values - centre``; no centre at address 0."""
    x, middle, moved = vector_at(values, n, np.float32), vector_at(centre, n, np.float32), vector_at(out, n, np.float32)
    for j in range(n):
        moved[j] = x[j] - middle[j] if middle.size else x[j]


@kernel
def _room(out, scale, room):
    """Where to sum up what goes to ``out`` [1, d]: there, or where outputs have a ``scale``, in ``room``, from zero."""
    if not scale.size:
        return out
    sums = matrix_at(room, 1, scale.size, np.float32)
    for j in range(scale.size):
        sums[0, j] = np.float32(0.0)
    return sums


@kernel
def _scaled(sums, scale, out):
    """Add what :func:`_room` gave to ``out`` [1, d]; without a ``scale`` it is there already."""
    for j in range(scale.size):
        out[0, j] += sums[0, j] * scale[j]


@kernel
def _linear(like, table, layer, first, sizes, x, moved, out, ids, room, added):
    """One matrix [n, d] on the input [n] at ``x``, cut: to ``out`` [d], or added to it. ``moved``: room for [n]."""
    n, d = sizes
    _begin(out, table[layer, first + REST], d, added)
    _off_centre(x, table[layer, first + CENTRE], n, moved)
    values, total = matrix_at(moved, 1, n, np.float32), matrix_at(out, 1, d, np.float32)
    kept = find_kept(values, 0, vector_at(table[layer, first + CUT], n, np.float32), ids)
    rows = matrix_at(table[layer, first + WEIGHT], n, d, like.dtype)
    scale = vector_at(table[layer, first + ROW_SCALE], n, np.float32)
    outputs = vector_at(table[layer, first + OUT_SCALE], d, np.float32)
    sums = _room(total, outputs, room)
    add_rows(ids, 0, kept, values, 0, rows, scale, sums, 0)
    _scaled(sums, outputs, total)
    count_ran(vector_at(table[layer, first + RAN], 4, np.int64), 1, kept)


@kernel
def _resting(table, layer, d, x, out, ids):
    """Add what units at their centre add to a token: every row of int8 [d, d], times a scale and its input."""
    scale = vector_at(table[layer, SCALE], d, np.float32)
    if scale.size:
        for j in range(d):
            ids[j] = j
        codes = matrix_at(table[layer, CODES], d, d, np.int8)
        add_rows(ids, 0, d, matrix_at(x, 1, d, np.float32), 0, codes, scale, matrix_at(out, 1, d, np.float32), 0)


@kernel
def _gated(like, table, layer, sizes, x, gate, out, ids, room):
    """Add the units whose value, silu of ``gate`` [n] off its centre, passes its cut to ``out`` [d]."""
    d, n = sizes
    values = matrix_at(gate, 1, n, np.float32)
    for j in range(n):
        values[0, j] = values[0, j] / (np.float32(1.0) + np.exp(-values[0, j]))
    _off_centre(gate, table[layer, MLP_CENTRE], n, gate)
    _begin(out, table[layer, MLP_REST], d, True)
    kept = find_kept(values, 0, vector_at(table[layer, MLP_CUT], n, np.float32), ids)
    total = matrix_at(out, 1, d, np.float32)
    outputs = vector_at(table[layer, DOWN_OUT_SCALE], d, np.float32)
    sums = _room(total, outputs, room)
    passed = add_gated(
        ids,
        0,
        kept,
        values,
        matrix_at(x, 1, d, np.float32),
        0,
        matrix_at(table[layer, UP], n, d, like.dtype),
        matrix_at(table[layer, DOWN], n, d, like.dtype),
        vector_at(table[layer, CUT_OUT], n, np.float32),
        vector_at(table[layer, UP_BIAS], n, np.float32),
        vector_at(table[layer, UP_SCALE], n, np.float32),
        vector_at(table[layer, DOWN_SCALE], n, np.float32),
        sums,
        0,
        np.empty(2 * EIGHT, np.int64),
        np.empty(2 * EIGHT, np.float32),
    )
    _scaled(sums, outputs, total)
    ran = vector_at(table[layer, MLP_RAN], 4, np.int64)
    count_ran(ran, 1, kept)
    ran[3] += passed


@kernel
def decode(like, table, eps, sizes, scaling, x, work, cos, sin, cache):
    """One token through all layers; ``x`` float32 [d] becomes what comes out of the last.

    ``table`` int64 [layers, COLUMNS] addresses of rows of ``like``'s type and float32 vectors, 0 for none; ``eps``
    float32 [layers, 2]. Other addresses, float32: work [workspace(sizes)], cos and sin [width] of the token's
    position, cache [layers, 2, shared, positions, width]. ``sizes``: d, n, heads, shared, width, positions, position.
    """
    d, n, heads, shared, width, positions, position = sizes
    inner, outer = heads * width, shared * width
    moved, normed = work, work + 4 * max(d, inner)
    qkv, gate = normed + 4 * d, normed + 4 * d
    mixed = qkv + 4 * (inner + 2 * outer)
    room = normed + 4 * (d + max(n, 2 * inner + 2 * outer))
    ids = np.empty(max(d, n, inner) + 1, np.int64)
    for layer in range(table.shape[0]):
        rms_norm(d, eps[layer, 0], x, table[layer, NORM], normed)
        _linear(like, table, layer, QUERY, (d, inner), normed, moved, qkv, ids, room, False)
        _linear(like, table, layer, KEY, (d, outer), normed, moved, qkv + 4 * inner, ids, room, False)
        _linear(like, table, layer, VALUE, (d, outer), normed, moved, qkv + 4 * (inner + outer), ids, room, False)
        kept_here = cache + layer * 8 * shared * positions * width
        attend((heads, shared, width, positions, position), scaling, (qkv, cos, sin, kept_here, mixed))
        _linear(like, table, layer, OUT, (inner, d), mixed, moved, x, ids, room, True)
        rms_norm(d, eps[layer, 1], x, table[layer, MLP_NORM], normed)
        _linear(like, table, layer, GATE, (d, n), normed, moved, gate, ids, room, False)
        _gated(like, table, layer, (d, n), normed, gate, x, ids, room)
        _resting(table, layer, d, normed, x, ids)


def workspace(d: int, n: int, heads: int, shared: int, width: int) -> int:
    """How many float32 :func:`decode` needs room for."""
    inner = heads * width
    return max(d, inner) + d + max(n, 2 * inner + 2 * shared * width) + max(d, n, inner)
