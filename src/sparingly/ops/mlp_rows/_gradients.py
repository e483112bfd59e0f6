"""Gradients of :func:`sparingly.ops.mlp_rows.mlp_rows`: composed of other operators, or grouped by unit in one pass.

The composed form serves every device, dense gradients and gradients of gradients. The grouped one serves training on
the CPU: each touched unit's rows are read once for all tokens that ran it, and its gradients written once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._arrays import as_numpy
from sparingly.ops._gradients import of_rows_and_bias, sparse_rows
from sparingly.ops._numba import axpy, to_f32
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._threads import run_chunks
from sparingly.ops.mlp_rows._activations import ACTIVATIONS, NUMBERS, activate, slope
from sparingly.ops.mlp_rows._count import record_backward
from sparingly.ops.mlp_rows.reference import units_of
from sparingly.ops.scatter_outer.grouped import group

Gradients = tuple[Tensor | None, ...]
"""Of hidden, up, bias, down, ids (never) and weights."""


class Saved(NamedTuple):
    """What the forward pass left; scores [tokens, k * block] before the activation."""

    hidden: Tensor
    up: Tensor
    down: Tensor
    ids: Tensor
    weights: Tensor | None
    scores: Tensor
    block: int
    activation: str


def composed(
    saved: Saved, grad: Tensor | None, of_scores: Tensor | None, needs: tuple[bool, ...], sparse: bool
) -> Gradients:
    """grad [tokens, d_out] and of_scores [tokens, k * block], the gradients of both outputs, either may be None."""
    from sparingly.ops.gather_accumulate import gather_accumulate
    from sparingly.ops.gather_dot import gather_dot

    hidden, up, down, ids, weights, scores, block, activation = saved
    function, derivative = ACTIVATIONS[activation]
    units = units_of(ids, block)
    pad = units < 0
    values, factors = function(scores), None
    if weights is not None:
        factors = weights.to(scores.dtype).repeat_interleave(block, dim=1).masked_fill(pad, 0.0)
    of_weights = of_down = None
    change = torch.zeros_like(scores) if of_scores is None else of_scores.masked_fill(pad, 0.0)
    if grad is not None:
        grad = grad.contiguous()
        of_values = gather_dot(grad, down, units).masked_fill(pad, 0.0)
        if weights is not None and needs[5]:
            of_weights = (of_values * values).unflatten(1, (-1, block)).sum(2).to(weights.dtype)
        if needs[3]:
            outward = (values if factors is None else values * factors).masked_fill(pad, 0.0)
            of_down, _ = of_rows_and_bias(outward, grad, units, down, need_rows=True, need_bias=False, sparse=sparse)
        of_values = of_values if factors is None else of_values * factors
        change = change + of_values * derivative(scores)
    of_hidden = gather_accumulate(change, up, units).to(hidden.dtype) if needs[0] else None
    options = {"need_rows": needs[1], "need_bias": needs[2], "sparse": sparse}
    of_up, of_bias = of_rows_and_bias(change, hidden, units, up, **options)
    of_bias = None if of_bias is None else of_bias.to(up.dtype)
    return of_hidden, of_up, of_bias, of_down, None, of_weights


@compiled
def _groups(start, stop, act, block, places, bounds, hidden, grad, down, touched, saved, found):
    """Gradients of the touched blocks start..stop: of their rows, and of each place's scores and weights.

    saved: scores, weights ([0, 0] for ones); found: of_up, of_down [blocks * block, _], of_bias [blocks * block],
    of_scores [tokens, k * block], of_weights [tokens * k, block].
    """
    scores, weights = saved
    of_up, of_down, of_bias, of_scores, of_weights = found
    k = scores.shape[1] // block
    for number in range(start, stop):
        for r in range(block):
            unit, row = touched[number] * block + r, number * block + r
            for j in range(of_up.shape[1]):
                of_up[row, j] = np.float32(0.0)
            for j in range(of_down.shape[1]):
                of_down[row, j] = np.float32(0.0)
            total = np.float32(0.0)
            for position in range(bounds[number], bounds[number + 1]):
                place = places[position]
                token, column = place // k, (place % k) * block + r
                weight = weights[token, place % k] if weights.size else np.float32(1.0)
                score = scores[token, column]
                value = activate(act, score)
                outward = value * weight
                of_value = np.float32(0.0)
                for j in range(of_down.shape[1]):
                    pull = grad[token, j]
                    of_value += pull * to_f32(down[unit, j])
                    of_down[row, j] += outward * pull
                change = of_value * weight * slope(act, score)
                of_weights[place, r] = of_value * value
                of_scores[token, column] = change
                total += change
                axpy(change, hidden, token, of_up, row)
            of_bias[row] = total


def grouped(saved: Saved, grad: Tensor, needs: tuple[bool, ...]) -> Gradients:
    """grad [tokens, d_out] -> gradients, those of up, bias and down sparse; all tensors must be plain."""
    from sparingly.ops.gather_accumulate import gather_accumulate

    hidden, up, down, ids, weights, scores, block, activation = saved
    (num_units, d_in), d_out = up.shape, down.shape[1]
    touched, places, bounds = group(ids, num_units // block)
    rows = touched.shape[0] * block
    vectors, pull = hidden.detach().float().contiguous(), grad.detach().float().contiguous()
    factors = torch.empty(0, 0) if weights is None else weights.detach().float().contiguous()
    of_up, of_down, of_bias = torch.empty(rows, d_in), torch.empty(rows, d_out), torch.empty(rows)
    of_scores, of_weights = torch.zeros_like(scores), torch.zeros(ids.numel(), block)
    found = (of_up, of_down, of_bias, of_scores, of_weights)
    visited = int(bounds[-1] - bounds[0]) * block
    run_chunks(
        _groups,
        touched.shape[0],
        visited * (d_in + d_out) * 8,
        NUMBERS[activation],
        block,
        as_numpy(places),
        as_numpy(bounds),
        as_numpy(vectors),
        as_numpy(pull),
        as_numpy(down),
        as_numpy(touched),
        (as_numpy(scores), as_numpy(factors)),
        tuple(as_numpy(one) for one in found),
    )
    record_backward(visited, rows, down, of_up, of_scores, vectors, pull)
    of_hidden = None
    if needs[0]:
        of_hidden = gather_accumulate(of_scores, up.detach(), units_of(ids, block)).to(hidden.dtype)
    units = units_of(touched.unsqueeze(1), block).flatten()
    of_up, of_bias, of_down = (
        sparse_rows(one.to(up.dtype), units, num_units) if needed else None
        for one, needed in zip((of_up, of_bias, of_down), needs[1:4], strict=True)
    )
    return (
        of_hidden,
        of_up,
        of_bias,
        of_down,
        None,
        of_weights.sum(1).view(ids.shape).to(weights.dtype) if weights is not None and needs[5] else None,
    )
