# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's launch syntax and language carry no types that fit; kernels are checked by running and compiling them.
"""Product with the inputs that pass their cut on a GPU (Triton).

One program adds up a block of columns of one token's rows; it looks at all n inputs and loads the rows of those that
pass. Where there are too few tokens to fill a GPU, each token's inputs are split over several programs whose float32
parts are added in a fixed order afterwards: no atomics, so equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._record import record_rows
from sparingly.ops.gather_accumulate.triton import PROGRAMS
from sparingly.ops.gather_dot.triton import cdiv, tile, unit_stride, why_not


@triton.jit
def _load_kept(values_ptr, cut_ptr, units, end):
    """(values float32, which of the units before `end` pass their cut: not |value| < cut, so also NaN)."""
    inside = units < end
    values = tl.load(values_ptr + units, mask=inside, other=0.0).to(tl.float32)
    cuts = tl.load(cut_ptr + units, mask=inside, other=0.0).to(tl.float32)
    below = tl.abs(values) < cuts
    return values, inside & (below == 0)


@triton.jit
def _threshold_accumulate(
    x_ptr, weights_ptr, rows_ptr, cut_ptr, scale_ptr, sums_ptr,
    x_stride, weights_stride, row_stride, width, n, blocks_d, splits, chunk,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = (program % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = (program // blocks_d).to(tl.int64)  # token * splits + split
    token = part // splits
    first = (part % splits).to(tl.int32) * chunk
    last = tl.minimum(first + chunk, n)
    inside = cols < width
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_K):
        units = start + tl.arange(0, BLOCK_K)
        weights, kept = _load_kept(x_ptr + token * x_stride, cut_ptr, units, last)
        if HAS_WEIGHTS:
            weights = tl.load(weights_ptr + token * weights_stride + units, mask=kept, other=0.0)
        if HAS_SCALE:
            weights *= tl.load(scale_ptr + units, mask=kept, other=0.0)
        # What is cut has weight 0 and not its own: its rows read as 0.
        weights = tl.where(kept, weights, 0.0)
        offsets = units.to(tl.int64)[:, None] * row_stride + cols[None, :]
        values = tl.load(rows_ptr + offsets, mask=kept[:, None] & inside[None, :], other=0)
        total += weights[:, None] * values.to(tl.float32)
    tl.store(sums_ptr + part * width + cols, tl.sum(total, 0), mask=inside)


def accumulate(
    x: Tensor, weights: Tensor | None, rows: Tensor, cut: Tensor, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Sum of the rows that pass, weighted by ``weights`` [tokens, n] float32 or, without, by x itself; plus bias."""
    tokens, (n, width) = x.shape[0], rows.shape
    sums = torch.zeros(tokens, width, dtype=torch.float32, device=rows.device)
    if tokens and n and width:
        block_k, block_d = tile(width, n)
        blocks_d = cdiv(width, block_d)
        steps = cdiv(n, block_k)
        chunk = cdiv(steps, min(steps, cdiv(PROGRAMS, tokens * blocks_d))) * block_k
        splits = cdiv(n, chunk)
        parts = torch.empty(tokens, splits, width, dtype=torch.float32, device=rows.device)
        with torch.cuda.device_of(rows):
            _threshold_accumulate[(tokens * splits * blocks_d,)](
                x, weights, rows, cut, scale, parts,
                x.stride(0), 0 if weights is None else weights.stride(0), rows.stride(0), width, n, blocks_d, splits,
                chunk,
                BLOCK_K=block_k, BLOCK_D=block_d, HAS_WEIGHTS=weights is not None, HAS_SCALE=scale is not None,
            )  # fmt: skip
        sums = parts.sum(1) if splits > 1 else parts.view(tokens, width)
    return sums if bias is None else sums + bias


def count_ran(ran: Tensor, x: Tensor, cut: Tensor) -> None:
    """Add tokens and units that ran to ran [4], without a wait for the device."""
    ran[0] += x.shape[0]
    ran[1] += (~(x.abs() < cut)).sum()


def unsupported(
    x: Tensor, rows: Tensor, cut: Tensor, scale: Tensor | None, bias: Tensor | None, ran: Tensor
) -> str | None:
    """Why these arguments cannot run here, or None."""
    return why_not(rows, ran, x, cut, scale, bias)


def kernel(x: Tensor, rows: Tensor, cut: Tensor, scale: Tensor | None, bias: Tensor | None, ran: Tensor) -> Tensor:
    """x [tokens, n], rows [n, d], cut [n] -> [tokens, d] float32; rows of cut inputs are not loaded."""
    x, cut = unit_stride(x), cut.contiguous()
    sums = accumulate(x, None, rows, cut, None if scale is None else scale.contiguous(), bias)
    before = ran[1].clone() if ledger.active() else None
    count_ran(ran, x, cut)
    if before is not None:
        read = (x, cut) if bias is None else (x, cut, bias)
        visited = int(ran[1] - before)
        record_rows("threshold_accumulate", visited, rows, scale, read=read, written=(sums,), other=x.numel())
    return sums
