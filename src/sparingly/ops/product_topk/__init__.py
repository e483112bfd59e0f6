"""The best sums of one score from each of two lists: the units of a product of two small sets of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparingly.ops import _arrays
from sparingly.ops._registry import Op
from sparingly.ops.product_topk import cpu
from sparingly.ops.product_topk.reference import reference


def _check(left: Tensor, right: Tensor, k: int) -> None:
    _arrays.check_matrix("left", left)
    _arrays.check_matrix("right", right)
    if left.shape[0] != right.shape[0] or left.dtype != right.dtype:
        raise ValueError(
            f"left {list(left.shape)} {left.dtype} and right {list(right.shape)} {right.dtype} must have as many rows "
            "and one dtype"
        )
    most = left.shape[1] * right.shape[1]
    if not 1 <= k <= most:
        raise ValueError(f"k must be in 1..{most}, the number of sums, got {k}")


OP = Op(
    "product_topk",
    "(Tensor left, Tensor right, SymInt k) -> (Tensor, Tensor)",
    reference,
    check=_check,
    kernel_args=3,
)
OP.kernel("cpu", cpu.kernel, unsupported=cpu.unsupported)


def product_topk(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ``left[t, i] + right[t, j]``, found without forming all of these sums.

    Args:
        left: [rows, n], float32 or bfloat16 (float64: reference only).
        right: [rows, m], of the same dtype.
        k: in 1..n*m.

    Returns:
        sums [rows, k], float32, best first, and ids [rows, k], int64: ``i * m + j``. NaN counts as largest.

    Raises ValueError or TypeError if shapes or dtypes do not fit. Differentiable in left and right.

    The best k sums are of the best k of each list. Source: Lample, Sablayrolles, Ranzato, Denoyer, Jegou, Large Memory
    Layers with Product Keys, NeurIPS 2019, section 3.2; of the sorted lists only pairs with
    ``(i + 1) * (j + 1) <= k`` are looked at, some k log k of them instead of k * k.
    """
    return OP(left, right, k)


@OP.definition.register_fake
def _(left, right, k):
    shape = (left.shape[0], k)
    return left.new_empty(shape, dtype=_arrays.accumulator(left)), left.new_empty(shape, dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    left, right, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.sizes, ctx.dtype = (left.shape[1], right.shape[1]), left.dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    n, m = ctx.sizes
    places = (torch.div(ids, m, rounding_mode="floor"), ids.remainder(m))
    found = [
        grad.new_zeros(ids.shape[0], size).scatter_add(1, place, grad).to(ctx.dtype) if needed else None
        for size, place, needed in zip((n, m), places, ctx.needs_input_grad, strict=False)
    ]
    return *found, None


OP.definition.register_autograd(_backward, setup_context=_setup)
