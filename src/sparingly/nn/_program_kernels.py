"""One token through a whole small network: a list of instructions on numbered places of one workspace, compiled once.

A network is a table int64 [instructions, COLUMNS]: what to do, where its operands and its result begin in the workspace
(in float32 elements), its sizes, and the addresses of its weights.
"""

from __future__ import annotations

import math

import numpy as np

from sparingly.nn._fern_rows import one_token
from sparingly.ops._numba import dot, dot_eight, kernel
from sparingly.ops._views import matrix_at, vector_at
from sparingly.ops.mlp_rows._activations import activate
from sparingly.ops.mlp_rows.cpu import run_token
from sparingly.ops.product_topk.cpu import best_places, best_sums, fill_keys, pairs_of
from sparingly.ops.threshold_accumulate.cpu import add_rows, fill, find_kept
from sparingly.selectors.tree import descend

LINEAR, NORM, ACTIVATE, ADD, KEPT, FERNS, PRODUCT_KEY, EXPERTS, TREE = range(9)
# The first columns of every instruction; what follows depends on what it does.
DO, FROM, TO = range(3)
COLUMNS = 20


@kernel
def linear(x, rows, bias, out):
    """out [1, n] = rows [n, d] . x [1, d] + bias [n], which may be empty."""
    n = rows.shape[0]
    whole = n - n % 8
    for j in range(0, whole, 8):
        s0, s1, s2, s3, s4, s5, s6, s7 = dot_eight(rows, (j, j + 1, j + 2, j + 3, j + 4, j + 5, j + 6, j + 7), x, 0)
        out[0, j], out[0, j + 1], out[0, j + 2], out[0, j + 3] = s0, s1, s2, s3
        out[0, j + 4], out[0, j + 5], out[0, j + 6], out[0, j + 7] = s4, s5, s6, s7
    for j in range(whole, n):
        out[0, j] = dot(rows, j, x, 0)
    for j in range(bias.size):
        out[0, j] += bias[j]


@kernel
def _kept(x, rows, bias, cut, out):
    """:func:`linear` of the inputs that pass their cut; rows [d, n], an input's weights as its row."""
    ids = np.empty(cut.size + 1, np.int64)
    fill(out, bias)
    add_rows(ids, 0, find_kept(x, 0, cut, ids), x, 0, rows, cut[:0], out, 0)


@kernel
def _norm(x, gain, shift, eps, out):
    """Layer norm of x [1, d]; gain and shift [d] may be empty."""
    d = x.shape[1]
    mean = np.float32(0.0)
    for j in range(d):
        mean += x[0, j]
    mean /= np.float32(d)
    spread = np.float32(0.0)
    for j in range(d):
        spread += (x[0, j] - mean) * (x[0, j] - mean)
    factor = np.float32(1.0) / np.sqrt(spread / np.float32(d) + eps)
    for j in range(d):
        value = (x[0, j] - mean) * factor
        value = value * gain[j] if gain.size else value
        out[0, j] = value + shift[j] if shift.size else value


@kernel
def _product_keys(x, at, ids, weights):
    """What :class:`sparingly.selectors.ProductKey` chooses for x [1, d]: ids and weights [heads, k]."""
    heads, width, n, m = at[0], at[1], at[2], at[3]
    k, d = ids.shape[1], x.shape[1]
    queries = np.empty((1, heads * 2 * width), np.float32)
    linear(x, matrix_at(at[4], heads * 2 * width, d, np.float32), np.empty(0, np.float32), queries)
    halves = queries.reshape(heads * 2, width)
    for half in range(heads * 2):
        factor = np.float32(1.0) / np.sqrt(dot(halves, half, halves, half) / np.float32(width) + np.float32(2**-23))
        for j in range(width):
            halves[half, j] *= factor
    left, right = np.empty((1, n), np.float32), np.empty((1, m), np.float32)
    pairs = pairs_of(n, m, k)
    sums, most = np.empty((1, pairs), np.float32), max(n, m, pairs)
    scratch = (
        np.empty(most, np.int64),
        np.empty((3, most), np.int64),
        sums,
        sums.view(np.uint32),
        np.empty(k, np.int64),
    )
    nothing = np.empty(0, np.float32)
    for head in range(heads):
        first = halves[2 * head : 2 * head + 1]
        linear(first, matrix_at(at[5] + 4 * head * n * width, n, width, np.float32), nothing, left)
        second = halves[2 * head + 1 : 2 * head + 2]
        linear(second, matrix_at(at[6] + 4 * head * m * width, m, width, np.float32), nothing, right)
        one_left, one_right = (left, left.view(np.uint32)), (right, right.view(np.uint32))
        best_sums(0, one_left, one_right, scratch, weights[head : head + 1], ids[head : head + 1])
        total, top = np.float32(0.0), weights[head, 0]
        for place in range(k):
            weights[head, place] = np.float32(math.exp(weights[head, place] - top))
            total += weights[head, place]
        for place in range(k):
            weights[head, place] *= np.float32(k) / total


@kernel
def _experts(x, at, ids, weights):
    """What :class:`sparingly.selectors.Experts` chooses for x [1, d]: ids and weights [1, k]."""
    blocks, k = at[0], ids.shape[1]
    scores, biased = np.empty((1, blocks), np.float32), np.empty((1, blocks), np.float32)
    linear(x, matrix_at(at[1], blocks, x.shape[1], np.float32), np.empty(0, np.float32), scores)
    bias = vector_at(at[2], blocks, np.float32)
    for block in range(blocks):
        scores[0, block] = np.float32(1.0) / (np.float32(1.0) + np.float32(math.exp(-scores[0, block])))
        biased[0, block] = scores[0, block] + bias[block]
    keys = np.empty(blocks, np.int64)
    fill_keys(keys, biased.view(np.uint32), 0, blocks)
    best_places(keys, blocks, k, ids[0])
    total = np.float32(0.0)
    for place in range(k):
        total += scores[0, ids[0, place]]
    for place in range(k):
        weights[0, place] = scores[0, ids[0, place]] * (np.float32(k) / max(total, np.float32(k) * np.float32(1e-20)))


@kernel
def _ferns(x, at, gain, out):
    """A bag of the rows that ferns name; ``at``: ferns, tests, ferns that are asked, groups, width of a row, addresses
    of first, second, cut, blank and of the rows."""
    ferns, tests, asked, groups, width = at[0], at[1], at[2], at[3], at[4]
    first, second = matrix_at(at[5], tests, asked, np.uint32), matrix_at(at[6], tests, asked, np.uint32)
    cut, blank = matrix_at(at[7], tests, asked, np.float32), vector_at(at[8], asked, np.int64)
    rows = matrix_at(at[9], ferns << tests, width, np.float32)
    one_token(x, first, second, cut, blank, rows, gain, out.reshape(groups, width))


@kernel
def _ffn(do, x, at, out):
    """A layer of selected units; ``at``: num_units, block, activation, width of a selection, addresses of up, bias and
    down, then what its selector needs."""
    units, block, act, width = at[0], at[1], at[2], at[3]
    d = x.shape[1]
    up, bias = matrix_at(at[4], units, d, np.float32), vector_at(at[5], units, np.float32)
    down = matrix_at(at[6], units, d, np.float32)
    ids, weights = np.empty((1, width), np.int64), np.empty((1, width), np.float32)
    choice = at[7:]
    if do == PRODUCT_KEY:
        heads = choice[0]
        _product_keys(x, choice, ids.reshape(heads, width // heads), weights.reshape(heads, width // heads))
    elif do == EXPERTS:
        _experts(x, choice, ids, weights)
    else:
        descend(0, 1, choice[0], choice[1], block, x, up, bias, ids)
        weights = weights[:0]
    scores, chosen, values = (
        np.empty((1, width * block), np.float32),
        np.empty(width * block, np.int64),
        np.empty(width * block, np.float32),
    )
    run_token(0, act, block, x, up, bias, down, ids, weights, scores, out, chosen, values)


@kernel
def walk(table, eps, work):
    """All instructions, on a workspace whose begin holds the input; returns where the answer begins.

    work float32 [places], eps [instructions].
    """
    base = work.ctypes.data
    for step in range(table.shape[0]):
        at = table[step]
        do, size, result = at[DO], at[3], at[4]
        x = matrix_at(base + 4 * at[FROM], 1, size, np.float32)
        out = matrix_at(base + 4 * at[TO], 1, result, np.float32)
        if do == LINEAR:
            bias = vector_at(at[6], result, np.float32)
            linear(x, matrix_at(at[5], result, size, np.float32), bias, out)
        elif do == NORM:
            gain, shift = vector_at(at[5], size, np.float32), vector_at(at[6], size, np.float32)
            _norm(x, gain, shift, eps[step], out)
        elif do == ACTIVATE:
            for j in range(size):
                out[0, j] = activate(at[5], x[0, j])
        elif do == ADD:
            other = matrix_at(base + 4 * at[5], 1, size, np.float32)
            for j in range(size):
                out[0, j] = x[0, j] + other[0, j]
        elif do == KEPT:
            bias, cut = vector_at(at[6], result, np.float32), vector_at(at[7], size, np.float32)
            _kept(x, matrix_at(at[5], size, result, np.float32), bias, cut, out)
        elif do == FERNS:
            _ferns(x, at[5:], eps[step], out)
        else:
            _ffn(do, x, at[5:], out)
    return table[table.shape[0] - 1, TO]


@kernel
def run_one(table, eps, x, out, work):
    """x [1, d] through the network to out [1, n]."""
    work[: x.shape[1]] = x[0]
    place = walk(table, eps, work)
    out[0] = work[place : place + out.shape[1]]


@kernel
def run(table, eps, inputs, tokens, outputs, room):
    """Each row of what lies at the address ``inputs``, float32 [tokens, d], through the network to that of outputs
    [tokens, n]. False at the first row that is not finite.

    The workspace has ``room`` places; eps [instructions].
    """
    d, work = table[0, 3], np.empty(room, np.float32)
    given = matrix_at(inputs, tokens, d, np.float32)
    for token in range(tokens):
        wrong = np.float32(0.0)
        for j in range(d):
            work[j] = given[token, j]
            wrong += given[token, j] * np.float32(0.0)
        if wrong != np.float32(0.0):
            return False
        place = walk(table, eps, work)
        for j in range(outputs.shape[1]):
            outputs[token, j] = work[place + j]
    return True
