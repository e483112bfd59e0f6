# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's launch syntax and language carry no types that fit; kernels are checked by running and compiling them.
"""Weighted sum of selected rows on a GPU (Triton).

One program adds up a block of columns of one token's rows. Where there are too few tokens to fill a GPU, each
token's rows are split over several programs whose float32 parts are added in a fixed order afterwards: no atomics, so
equal inputs give equal bits, and the split depends on shapes alone. Ids are checked as in `gather_dot.triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._record import record_rows
from sparingly.ops.gather_dot.triton import (
    _load_ids,
    cdiv,
    count_valid,
    new_flag,
    raise_flagged,
    tile,
    unit_stride,
    why_not,
)

PROGRAMS = 1024  # aimed at when splitting: several for each of an H100's 132 multiprocessors


@triton.jit
def _gather_accumulate(
    weights_ptr, rows_ptr, ids_ptr, scale_ptr, sums_ptr, flag_ptr,
    weights_stride, row_stride, ids_stride, num_rows, width, k, blocks_d, splits, chunk,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = (program % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = (program // blocks_d).to(tl.int64)  # token * splits + split
    token = part // splits
    first = (part % splits).to(tl.int32) * chunk
    last = tl.minimum(first + chunk, k)
    inside = cols < width
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        ids, valid, wrong = _load_ids(ids_ptr + token * ids_stride, slots, last, num_rows, flag_ptr)
        rows = tl.where(valid, ids, 0)
        weights = tl.load(weights_ptr + token * weights_stride + slots, mask=valid, other=0.0).to(tl.float32)
        if HAS_SCALE:
            weights *= tl.load(scale_ptr + rows, mask=valid, other=0.0)
        weights = tl.where(wrong, float("nan"), weights)
        values = tl.load(
            rows_ptr + rows[:, None] * row_stride + cols[None, :], mask=valid[:, None] & inside[None, :], other=0
        )
        total += weights[:, None] * values.to(tl.float32)
    tl.store(sums_ptr + part * width + cols, tl.sum(total, 0), mask=inside)


def unsupported(weights: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None) -> str | None:
    """Why these arguments cannot run here, or None."""
    return why_not(rows, ids, weights, scale)


def kernel(
    weights: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None, *, check_ids: bool = True
) -> Tensor:
    """weights [tokens, k], rows [N, d], ids [tokens, k] -> sums [tokens, d] float32; pads (-1) add nothing.

    The weight of a pad is not read, so NaN there is harmless. Raises IndexError for an id outside -1..N-1 (after
    one wait for the device; `check_ids=False` skips the wait and leaves NaN in that token's sum).
    """
    tokens, k = ids.shape
    width = rows.shape[1]
    if tokens == 0 or k == 0 or width == 0:
        return torch.zeros(tokens, width, dtype=torch.float32, device=rows.device)
    weights, ids = unit_stride(weights), unit_stride(ids)
    block_k, block_d = tile(width, k)
    blocks_d = cdiv(width, block_d)
    steps = cdiv(k, block_k)
    chunk = cdiv(steps, min(steps, cdiv(PROGRAMS, tokens * blocks_d))) * block_k
    splits = cdiv(k, chunk)
    parts = torch.empty(tokens, splits, width, dtype=torch.float32, device=rows.device)
    flag = new_flag(ids)
    with torch.cuda.device_of(rows):
        _gather_accumulate[(tokens * splits * blocks_d,)](
            weights, rows, ids, scale, parts, flag,
            weights.stride(0), rows.stride(0), ids.stride(0), rows.shape[0], width, k, blocks_d, splits, chunk,
            BLOCK_K=block_k, BLOCK_D=block_d, HAS_SCALE=scale is not None,
        )  # fmt: skip
    sums = parts.sum(1) if splits > 1 else parts.view(tokens, width)
    if check_ids:
        raise_flagged(flag, ids, rows.shape[0])
    if ledger.active():
        copied = parts.nbytes if splits > 1 else 0
        record_rows(
            "gather_accumulate", count_valid(ids), rows, scale, read=(weights, ids), written=(sums,), copied=copied
        )
    return sums
