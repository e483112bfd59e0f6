"""Sums of one row from each table in plain PyTorch; also serves float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops._arrays import accumulator
from sparingly.ops._record import record_rows, tensor_bytes


def check_places(ids: Tensor, num_rows: int) -> int:
    """How many ids are not pads. Raises IndexError for one that is not of its place's table."""
    k = ids.shape[1]
    table = torch.div(ids, num_rows // k, rounding_mode="floor")
    wrong = (ids >= 0) & (table != torch.arange(k, device=ids.device)) | (ids < -1)
    if wrong.any():
        token, place = wrong.nonzero()[0].tolist()
        first = place * (num_rows // k)
        raise IndexError(
            f"ids[{token}, {place}] must be -1 or in {first}..{first + num_rows // k - 1}, the rows of its place's "
            f"table, got {int(ids[token, place])}"
        )
    return int((ids >= 0).sum())


def reference(factors: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """See :func:`sparingly.ops.table_sums.table_sums`."""
    visited = check_places(ids, rows.shape[0])
    dtype, (tokens, groups) = accumulator(factors, rows), factors.shape
    size = (tokens, groups, ids.shape[1] // groups, rows.shape[1])
    terms = rows[ids.clamp_min(0)].to(dtype).masked_fill((ids < 0).unsqueeze(2), 0.0)
    sums = terms.view(size).sum(dim=2) * factors.to(dtype).unsqueeze(2)
    copied = 2 * tensor_bytes(terms)
    record_rows("table_sums", visited, rows, read=(factors, ids), written=(sums,), copied=copied)
    return sums.flatten(1)
