"""Gated feed-forward layer of the units that pass their cut in plain PyTorch; also serves float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops._arrays import accumulator
from sparingly.ops._record import tensor_bytes
from sparingly.ops.gated_rows._arguments import Arguments
from sparingly.ops.gated_rows._count import record


def reference(*args: Tensor | None) -> Tensor:
    """See :func:`sparingly.ops.gated_rows.gated_rows`."""
    gate, hidden, up, down, cut, cut_out, up_bias, up_scale, down_scale, bias, ran = Arguments._make(args)
    dtype = accumulator(gate, hidden, up, down)
    token, row = (~(gate.to(dtype).abs() < cut.to(dtype))).nonzero(as_tuple=True)
    gathered, spread = up[row].to(dtype), hidden[token].to(dtype)
    scores = (spread * gathered).sum(-1)
    if up_scale is not None:
        scores = scores * up_scale[row].to(dtype)
    if up_bias is not None:
        scores = scores + up_bias[row].to(dtype)
    scores = scores * gate[token, row].to(dtype)
    visited = token.numel()
    if cut_out is not None:
        passed = ~(scores.abs() < cut_out[row].to(dtype))
        token, row, scores = token[passed], row[passed], scores[passed]
    if down_scale is not None:
        scores = scores * down_scale[row].to(dtype)
    terms = scores.unsqueeze(1) * down[row].to(dtype)
    sums = torch.zeros(gate.shape[0], down.shape[1], dtype=dtype, device=down.device)
    if bias is not None:
        sums += bias
    sums.index_add_(0, token, terms)
    ran[0] += gate.shape[0]
    ran[1] += visited
    ran[3] += token.numel()
    copied = tensor_bytes(gathered, spread) + 2 * tensor_bytes(terms)
    read = (gate, hidden, cut, cut_out, bias)
    record(visited, token.numel(), up, down, (up_bias, up_scale), (down_scale,), read, sums, copied=copied)
    return sums
