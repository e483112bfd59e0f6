"""One AdamW step on the named rows in plain PyTorch; also serves float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops.row_adamw._checks import check_values, record


def reference(
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
    """See :func:`sparingly.ops.row_adamw.row_adamw_`."""
    check_values(ids, grad, param.shape[0])
    with torch.no_grad():
        dtype = exp_avg.dtype
        gradient = grad.to(dtype)
        count = steps[ids] + 1
        first = exp_avg[ids].lerp(gradient, 1 - beta1)
        second = exp_avg_sq[ids] * beta2 + gradient.square() * (1 - beta2)
        exponent = count.to(torch.float64).unsqueeze(1)
        correction1 = (1 - beta1**exponent).to(dtype)
        correction2 = (1 - beta2**exponent).sqrt().to(dtype)
        value = param[ids].to(dtype) * (1 - lr * weight_decay)
        value = value - (lr / correction1) * first / (second.sqrt() / correction2 + eps)
        param[ids] = value.to(param.dtype)
        exp_avg[ids], exp_avg_sq[ids], steps[ids] = first, second, count
    record(param, exp_avg, ids, grad)
