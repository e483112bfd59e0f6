"""One AdamW step on the named rows on the CPU: each row is read, updated and written once."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sparingly.ops._arrays import as_numpy, not_for_numba
from sparingly.ops._numba import FAST, from_f32, near_rows, prefetch_ahead, to_f32
from sparingly.ops._threads import run_chunks
from sparingly.ops.row_adamw._checks import check_values, record


# Python's check for a division by zero would keep the loop over a row from being vectorised: 2.8 ns an element
# instead of 0.7.
@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _step(start, stop, param, exp_avg, exp_avg_sq, steps, ids, grad, lr, beta1, beta2, eps, weight_decay):
    """Update the rows ids[start..stop]."""
    keep1, new1 = np.float32(beta1), np.float32(1.0 - beta1)
    keep2, new2 = np.float32(beta2), np.float32(1.0 - beta2)
    decay, small = np.float32(1.0 - lr * weight_decay), np.float32(eps)
    near = near_rows(exp_avg)
    for position in range(start, stop):
        prefetch_ahead(param, ids, position, stop, near)
        prefetch_ahead(exp_avg, ids, position, stop, near)
        prefetch_ahead(exp_avg_sq, ids, position, stop, near)
        row = ids[position]
        count = steps[row] + 1
        steps[row] = count
        rate = np.float32(lr / (1.0 - beta1**count))
        unbias = np.float32(1.0 / math.sqrt(1.0 - beta2**count))
        for j in range(param.shape[1]):
            slope = grad[position, j]
            first = keep1 * exp_avg[row, j] + new1 * slope
            second = keep2 * exp_avg_sq[row, j] + new2 * slope * slope
            exp_avg[row, j] = first
            exp_avg_sq[row, j] = second
            value = decay * to_f32(param[row, j]) - rate * first / (np.sqrt(second) * unbias + small)
            param[row, j] = from_f32(value, param[row, j])


def unsupported(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor, ids: Tensor, grad: Tensor
) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    return not_for_numba(param, exp_avg, exp_avg_sq, grad, contiguous=(param, exp_avg, exp_avg_sq, steps))


def kernel(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    ids: Tensor,
    grad: Tensor,
    **options: float,
) -> None:
    """See :func:`sparingly.ops.row_adamw.row_adamw_`."""
    check_values(ids, grad, param.shape[0])
    update(param, exp_avg, exp_avg_sq, steps, ids, grad, **options)


def update(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The same for ids and gradients that :func:`check_values` has passed."""
    ids = ids.contiguous()
    slope = grad.detach().float().contiguous()
    # Read and written: twelve bytes of float32 state and gradient each way, beside the row.
    work_bytes = ids.shape[0] * param.shape[1] * 24
    run_chunks(
        _step,
        ids.shape[0],
        work_bytes,
        as_numpy(param),
        as_numpy(exp_avg),
        as_numpy(exp_avg_sq),
        as_numpy(steps),
        as_numpy(ids),
        slope.numpy(),
        float(lr),
        float(beta1),
        float(beta2),
        float(eps),
        float(weight_decay),
    )
    torch.autograd.graph.increment_version([param, exp_avg, exp_avg_sq, steps])
    record(param, exp_avg, ids, grad)
