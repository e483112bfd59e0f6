"""Weighted sum of selected rows in plain PyTorch; also serves float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops._arrays import accumulator, check_range
from sparingly.ops._record import record_rows, tensor_bytes


def reference(weights: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None) -> Tensor:
    """See :func:`sparingly.ops.gather_accumulate.gather_accumulate`."""
    visited = check_range(ids, rows.shape[0])
    dtype = accumulator(weights, rows)
    token, place = (ids >= 0).nonzero(as_tuple=True)
    row = ids[token, place]
    weight = weights[token, place].to(dtype)
    if scale is not None:
        weight = weight * scale[row].to(dtype)
    terms = weight.unsqueeze(1) * rows[row].to(dtype)
    sums = torch.zeros(ids.shape[0], rows.shape[1], dtype=dtype, device=rows.device)
    sums.index_add_(0, token, terms)
    copied = 2 * tensor_bytes(terms)
    record_rows("gather_accumulate", visited, rows, scale, read=(weights, ids), written=(sums,), copied=copied)
    return sums
