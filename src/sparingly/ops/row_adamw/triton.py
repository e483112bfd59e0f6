# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's launch syntax and language carry no types that fit; kernels are checked by running and compiling them.
"""AdamW on selected rows, in place, on a GPU (Triton).

Two kernels in a row: the first looks at every id and gradient and raises a flag for what is wrong; the second reads
the flags on the device and writes nothing if one is up. The host reads them after both, so a step waits for the device
once, at its end, and a bad step leaves every tensor as it was. Ids that rise strictly (those of a coalesced gradient
do) are unique; others are first held back and cost a sort. Sources: :func:`sparingly.ops.row_adamw.row_adamw_`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparingly.ops.gather_dot.triton import cdiv, next_power_of_2, unit_stride, why_not
from sparingly.ops.row_adamw._checks import check_values, record

TILE = 1024  # numbers per program and step; four tensors of them are in registers at once
_BAD_ID = tl.constexpr(0)
_BAD_GRAD = tl.constexpr(1)
_NOT_RISING = tl.constexpr(2)


@triton.jit
def _check(ids_ptr, grad_ptr, flags_ptr, num_rows, n, width, grad_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    slots = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ids = tl.load(ids_ptr + slots, mask=slots < n, other=0)
    if tl.max(((ids < 0) | (ids >= num_rows)).to(tl.int32), 0) > 0:
        tl.store(flags_ptr + _BAD_ID, 1)
    after = tl.load(ids_ptr + slots + 1, mask=slots + 1 < n, other=num_rows)
    if tl.max(((slots < n) & (ids >= after)).to(tl.int32), 0) > 0:
        tl.store(flags_ptr + _NOT_RISING, 1)
    worst = tl.zeros([ROWS, BLOCK_D], tl.int32)
    for start in range(0, width, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = (slots < n)[:, None] & (cols < width)[None, :]
        grad = tl.load(grad_ptr + slots[:, None] * grad_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        worst |= (~(tl.abs(grad) < float("inf"))).to(tl.int32)
    if tl.max(tl.max(worst, 1), 0) > 0:
        tl.store(flags_ptr + _BAD_GRAD, 1)


@triton.jit
def _update(
    param_ptr, avg_ptr, sq_ptr, steps_ptr, ids_ptr, grad_ptr, flags_ptr,
    param_stride, avg_stride, sq_stride, grad_stride, n, width,
    lr, keep, log_beta1, log_beta2, beta2, one_minus_beta1, one_minus_beta2, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if tl.load(flags_ptr + _BAD_ID) + tl.load(flags_ptr + _BAD_GRAD) + tl.load(flags_ptr + _NOT_RISING) == 0:
        slots = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mine = slots < n
        ids = tl.load(ids_ptr + slots, mask=mine, other=0)
        step = tl.load(steps_ptr + ids, mask=mine, other=0) + 1
        # float64: in float32 the first steps' 1 - beta2**step would be wrong by 1e-4
        time = step.to(tl.float64)
        correction1 = 1.0 - tl.exp(time * log_beta1)
        correction2 = 1.0 - tl.exp(time * log_beta2)
        rate = (lr / correction1).to(tl.float32)
        root2 = tl.sqrt(correction2).to(tl.float32)
        for start in range(0, width, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            mask = mine[:, None] & (cols < width)[None, :]
            grad = tl.load(grad_ptr + slots[:, None] * grad_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            avg_at = avg_ptr + ids[:, None] * avg_stride + cols[None, :]
            sq_at = sq_ptr + ids[:, None] * sq_stride + cols[None, :]
            param_at = param_ptr + ids[:, None] * param_stride + cols[None, :]
            avg = tl.load(avg_at, mask=mask, other=0.0)
            avg += (grad - avg) * one_minus_beta1
            sq = tl.load(sq_at, mask=mask, other=0.0) * beta2 + grad * grad * one_minus_beta2
            param = tl.load(param_at, mask=mask, other=0.0).to(tl.float32) * keep
            param -= rate[:, None] * tl.div_rn(avg, tl.div_rn(tl.sqrt_rn(sq), root2[:, None]) + eps)
            tl.store(avg_at, avg, mask=mask)
            tl.store(sq_at, sq, mask=mask)
            tl.store(param_at, param.to(param_ptr.dtype.element_ty), mask=mask)
        tl.store(steps_ptr + ids, step, mask=mine)


def unsupported(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor, ids: Tensor, grad: Tensor
) -> str | None:
    """Why these arguments cannot run here, or None."""
    for name, tensor in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("grad", grad)):
        if tensor.stride(-1) != 1:
            return f"each row of {name} must be contiguous, got strides {tensor.stride()}"
    if not steps.is_contiguous():
        return f"steps must be contiguous, got strides {steps.stride()}"
    return why_not(param, ids, exp_avg, exp_avg_sq, steps, grad)


def kernel(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor, ids: Tensor, grad: Tensor,
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One AdamW step of param [N, d] at the rows ids [n] with grad [n, d], in place.

    exp_avg, exp_avg_sq [N, d] float32 and steps [N] int32 advance for these rows only. Raises IndexError for an id
    outside 0..N-1 and ValueError for an id named twice or a gradient that is not finite, with nothing written. Waits
    for the device, so it cannot be captured in a CUDA graph (RuntimeError: a graph could not report a bad step).
    """
    if grad.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("row_adamw_ cannot be captured in a CUDA graph: a bad gradient could not be reported")
    n, width = grad.shape
    if n == 0:
        return
    ids = unit_stride(ids)
    block_d = min(512, max(16, next_power_of_2(width)))
    rows = max(1, TILE // block_d)
    grid = (cdiv(n, rows),)
    flags = torch.zeros(3, dtype=torch.int32, device=param.device)

    def update() -> None:
        _update[grid](
            param, exp_avg, exp_avg_sq, steps, ids, grad, flags,
            param.stride(0), exp_avg.stride(0), exp_avg_sq.stride(0), grad.stride(0), n, width,
            float(lr), 1.0 - lr * weight_decay, _log(beta1), _log(beta2), float(beta2), 1.0 - beta1, 1.0 - beta2,
            float(eps), ROWS=rows, BLOCK_D=block_d,
        )  # fmt: skip

    with torch.cuda.device_of(param):
        _check[grid](ids, grad, flags, param.shape[0], n, width, grad.stride(0), ROWS=rows, BLOCK_D=block_d)
        update()
        if any(flags.tolist()):
            check_values(ids, grad, param.shape[0])
            flags.zero_()  # nothing wrong but the order of the ids
            update()
    record(param, exp_avg, ids, grad)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf
