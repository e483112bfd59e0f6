"""Two-layer perceptron of selected units in plain PyTorch; also serves float64 and devices without a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparingly.ops._arrays import accumulator, check_range
from sparingly.ops._record import tensor_bytes
from sparingly.ops.mlp_rows._activations import ACTIVATIONS
from sparingly.ops.mlp_rows._arguments import Arguments
from sparingly.ops.mlp_rows._count import record


def units_of(ids: Tensor, block: int) -> Tensor:
    """Blocks [tokens, k] -> their units [tokens, k * block]; pads stay -1."""
    if block == 1:
        return ids
    units = ids.unsqueeze(2) * block + torch.arange(block, device=ids.device)
    return units.masked_fill(ids.unsqueeze(2) < 0, -1).flatten(1)


def reference(*args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`sparingly.ops.mlp_rows.mlp_rows`; also the units' sums [tokens, k * block] before the activation."""
    given = Arguments._make(args)
    hidden, up, bias, down, ids, weights, block, activation = given
    visited = check_range(ids, up.shape[0] // block) * block
    dtype, units = accumulator(hidden, up), units_of(ids, block)
    pad, rows = units < 0, units.clamp(min=0)
    inward, outward = up[rows].to(dtype), down[rows].to(dtype)
    scores = torch.einsum("td,tkd->tk", hidden.to(dtype), inward)
    if bias is not None:
        scores = scores + bias[rows].to(dtype)
    scores = scores.masked_fill(pad, 0.0)
    values = ACTIVATIONS[activation][0](scores)
    if weights is not None:
        values = values * weights.to(dtype).repeat_interleave(block, dim=1)
    sums = torch.einsum("tk,tkd->td", values.masked_fill(pad, 0.0), outward)
    record(visited, given, scores, sums, copied=tensor_bytes(inward, outward))
    return sums, scores
