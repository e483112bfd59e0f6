"""AdamW on the rows that took part, and on no other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparingly.ops._registry import Op, nothing_to_dispatch
from sparingly.ops.row_adamw import cpu
from sparingly.ops.row_adamw._checks import check, check_values, rises
from sparingly.ops.row_adamw.reference import reference

__all__ = ["OP", "check_values", "rises", "row_adamw_", "update_checked"]

OP = Op(
    "row_adamw_",
    "(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) steps, Tensor ids, Tensor grad, *, "
    "float lr, float beta1, float beta2, float eps, float weight_decay) -> ()",
    reference,
    check=check,
    kernel_args=6,
    mutates_args=("param", "exp_avg", "exp_avg_sq", "steps"),
)
OP.kernel("cpu", cpu.kernel, unsupported=cpu.unsupported)
OP.kernel("cuda", module="sparingly.ops.row_adamw.triton")


def row_adamw_(
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
    """One AdamW step on the rows ``ids``, in place; all other rows, their moments and their bytes stay untouched.

    Bias is corrected by each row's own number of steps. Weight decay is decoupled and also only reaches rows that
    take part. Sums run in float32, a bfloat16 row is rounded to nearest once, at the end.

    Args:
        param: [num_rows, d], float32 or bfloat16 (float64: reference only).
        exp_avg, exp_avg_sq: [num_rows, d], float32, the moments.
        steps: [num_rows], int32, how many steps each row has made; counted up here.
        ids: [n], int64, unique, in 0..num_rows-1.
        grad: [n, d], float32 or bfloat16, the gradient of those rows.
        lr, beta1, beta2, eps, weight_decay: as in ``torch.optim.AdamW``.

    Raises:
        IndexError: an id is out of range. ValueError: an id is named twice, a gradient is not finite, or shapes or
        dtypes do not fit. Nothing has been written then.

    Equals ``torch.optim.AdamW`` for rows that take part in every step. Source: Loshchilov and Hutter, Decoupled
    Weight Decay Regularization, ICLR 2019, algorithm 2; lazy rows as in ``torch.optim.SparseAdam``::

        @inproceedings{loshchilov2019adamw, title={Decoupled Weight Decay Regularization}, author={Loshchilov, Ilya
          and Hutter, Frank}, booktitle={ICLR}, year={2019}}
    """
    options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    OP(param, exp_avg, exp_avg_sq, steps, ids, grad, **options)


def update_checked(*tensors: Tensor, **options: Any) -> None:
    """:func:`row_adamw_` without a second look at ids and gradient: the caller has had :func:`check_values` do it.

    For an optimiser that has to know all gradients good before it writes the first one.
    """
    check(*tensors)
    if nothing_to_dispatch(tensors) and cpu.unsupported(*tensors) is None:
        cpu.update(*tensors, **options)
    else:
        OP(*tensors, **options)


@OP.definition.register_fake
def _(param, exp_avg, exp_avg_sq, steps, ids, grad, *, lr, beta1, beta2, eps, weight_decay):
    check(param, exp_avg, exp_avg_sq, steps, ids, grad)
