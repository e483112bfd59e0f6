"""Scores of selected rows in plain PyTorch; also serves float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops._arrays import accumulator, check_range
from sparingly.ops._record import record_rows, tensor_bytes


def reference(
    hidden: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """See :func:`sparingly.ops.gather_dot.gather_dot`."""
    visited = check_range(ids, rows.shape[0])
    dtype = accumulator(hidden, rows)
    token, place = (ids >= 0).nonzero(as_tuple=True)
    row = ids[token, place]
    gathered = rows[row].to(dtype)
    spread = hidden[token].to(dtype)
    values = (spread * gathered).sum(-1)
    if scale is not None:
        values = values * scale[row].to(dtype)
    if bias is not None:
        values = values + bias[row].to(dtype)
    scores = torch.full(ids.shape, -torch.inf, dtype=dtype, device=hidden.device)
    scores[token, place] = values
    copied = tensor_bytes(gathered, spread)
    record_rows("gather_dot", visited, rows, scale, bias, read=(hidden, ids), written=(scores,), copied=copied)
    return scores
