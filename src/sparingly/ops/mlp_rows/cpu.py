"""Two-layer perceptron of selected units on the CPU: eight rows at once, a token's sum stays in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._arrays import check_range, not_for_numba
from sparingly.ops._numba import EIGHT, axpy, axpy_eight, dot, dot_eight, eight, prefetch_row, to_f32
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._threads import run_chunks
from sparingly.ops._views import CPU, LIKE, addresses, packed
from sparingly.ops.mlp_rows import _by_block
from sparingly.ops.mlp_rows._activations import NUMBERS, activate_all
from sparingly.ops.mlp_rows._arguments import Arguments
from sparingly.ops.mlp_rows._count import record
from sparingly.ops.mlp_rows._places import arrays


@compiled
def run_token(token, act, block, hidden, up, bias, down, ids, weights, scores, sums, units, values):
    """The units of one row of ids [tokens, k]; weights [tokens, k] or [0, 0]; units and values [k * block]: scratch."""
    count = 0
    for j in range(down.shape[1]):
        sums[token, j] = np.float32(0.0)
    for place in range(ids.shape[1]):
        first = ids[token, place]
        if first < 0:
            for r in range(block):
                scores[token, place * block + r] = np.float32(0.0)
            continue
        for r in range(block):
            units[count] = first * block + r
            prefetch_row(up, first * block + r)
            count += 1
    whole = count - count % EIGHT
    for at in range(0, whole, EIGHT):
        s0, s1, s2, s3, s4, s5, s6, s7 = dot_eight(up, eight(units, at, 1), hidden, token)
        values[at], values[at + 1], values[at + 2], values[at + 3] = s0, s1, s2, s3
        values[at + 4], values[at + 5], values[at + 6], values[at + 7] = s4, s5, s6, s7
        for one in range(at, at + EIGHT):
            prefetch_row(down, units[one])
    for at in range(whole, count):
        values[at] = dot(up, units[at], hidden, token)
        prefetch_row(down, units[at])
    at = 0
    for place in range(ids.shape[1]):
        if ids[token, place] < 0:
            continue
        for r in range(block):
            if bias.size:
                values[at] += to_f32(bias[units[at]])
            scores[token, place * block + r] = values[at]
            at += 1
    activate_all(act, values, 0, count)
    if weights.size:
        at = 0
        for place in range(ids.shape[1]):
            if ids[token, place] >= 0:
                for _ in range(block):
                    values[at] *= weights[token, place]
                    at += 1
    for at in range(0, whole, EIGHT):
        axpy_eight(eight(values, at, 1), eight(units, at, 1), down, sums, token)
    for at in range(whole, count):
        axpy(values[at], down, units[at], sums, token)


@compiled
def part(start, stop, like, sizes, at):
    """Tokens start..stop of what lies at addresses, rows of the type of ``like``."""
    _, k, block, _, _, _, act = sizes
    hidden, up, bias, down, ids, weights, scores, sums = arrays(like, sizes, at)
    units, values = np.empty(k * block, np.int64), np.empty(k * block, np.float32)
    for token in range(start, stop):
        run_token(token, act, block, hidden, up, bias, down, ids, weights, scores, sums, units, values)


def unsupported(*args: Any) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    hidden, up, bias, down, _, weights, *_ = Arguments._make(args)
    return not_for_numba(hidden, up, bias, down, weights, contiguous=(up, down))


def kernel(*args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`sparingly.ops.mlp_rows.mlp_rows` and its reference."""
    given = Arguments._make(args)
    hidden, up, bias, down, ids, weights, block, activation = given
    (tokens, k), (num_units, d_in), d_out = ids.shape, up.shape, down.shape[1]
    vectors, places = hidden.float().contiguous(), ids.contiguous()
    factors = None if weights is None else weights.float().contiguous()
    scores = torch.empty((tokens, k * block), dtype=torch.float32, device=CPU)
    sums = torch.empty((tokens, d_out), dtype=torch.float32, device=CPU)
    tensors = (vectors, up, packed(bias), down, places, factors, scores, sums)
    sizes = (tokens, k, block, num_units, d_in, d_out, NUMBERS[activation])
    visited = check_range(places, num_units // block) * block
    work_bytes = visited * (d_in + d_out) * up.element_size()
    together = _by_block.pays(tokens, k, block, num_units // block)
    work = _by_block.part if together else part
    run_chunks(work, tokens, work_bytes, LIKE[up.dtype], sizes, addresses(*tensors), keep=tensors)
    record(visited, given, scores, sums, shared=together)
    return sums, scores
