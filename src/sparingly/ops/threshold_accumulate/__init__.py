"""Product of a layer with those of its inputs that are not small, reading the rows of no other."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops import _arrays
from sparingly.ops._registry import Op, nothing_to_dispatch
from sparingly.ops.threshold_accumulate import cpu
from sparingly.ops.threshold_accumulate.reference import reference

VECTORS = (torch.float32, torch.float64)


def check_vector(name: str, vector: Tensor | None, size: int) -> None:
    """Raise TypeError or ValueError unless ``vector`` is None or float32 (float64) [size]."""
    if vector is None:
        return
    if vector.shape != (size,):
        raise ValueError(f"{name} must be [{size}], got {list(vector.shape)}")
    if vector.dtype not in VECTORS:
        raise TypeError(f"{name} must be float32 or float64, got {vector.dtype}")


def check_ran(ran: Tensor) -> None:
    """Raise TypeError or ValueError unless ``ran`` is int64 [4]."""
    if ran.dtype != torch.int64:
        raise TypeError(f"ran must be int64, got {ran.dtype}")
    if ran.shape != (4,):
        raise ValueError(f"ran must be [4], got {list(ran.shape)}")


def refuse_gradients(name: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if autograd would record what has no gradient."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{name} has no gradient and an input requires one; run under torch.no_grad(), "
                    "or use the dense layer to train"
                )


def _check(x: Tensor, rows: Tensor, cut: Tensor, scale: Tensor | None, bias: Tensor | None, ran: Tensor) -> None:
    _arrays.check_rows(rows, scale)
    n, d = rows.shape
    _arrays.check_matrix("x", x, n)
    check_vector("cut", cut, n)
    check_vector("bias", bias, d)
    check_ran(ran)


OP = Op(
    "threshold_accumulate",
    "(Tensor x, Tensor rows, Tensor cut, Tensor? scale, Tensor? bias, Tensor(a!) ran) -> Tensor",
    reference,
    check=_check,
    kernel_args=6,
    mutates_args=("ran",),
)
OP.kernel("cpu", cpu.kernel, unsupported=cpu.unsupported)
OP.kernel("cuda", module="sparingly.ops.threshold_accumulate.triton")


def threshold_accumulate(
    x: Tensor, rows: Tensor, cut: Tensor, scale: Tensor | None, bias: Tensor | None, ran: Tensor
) -> Tensor:
    """``bias + sum of x_i * rows_i`` over the units i whose ``x_i`` passes its cut: all i with ``not |x_i| < cut_i``.

    Rows of units that are cut are not read.

    Args:
        x: [tokens, n], float32 or bfloat16 (float64: reference only). NaN is never cut.
        rows: [n, d], float32, bfloat16 or int8: a layer's weight, one row for each of its inputs.
        cut: [n], float32, in the units of x; 0 keeps all.
        scale: [n], float32, for int8 rows: a row stands for ``scale * row``.
        bias: [d], float32, what a token starts from; None for zeros.
        ran: [4], int64, changed in place: ``ran[0]`` grows by tokens, ``ran[1]`` by the units that ran.

    Returns:
        [tokens, d], float32.

    Raises:
        RuntimeError: an input requires a gradient, which this operator has not, and gradients are on.
        ValueError, TypeError: shapes or dtypes do not fit.

    On the CPU sums run in float32 in the order that vector units give. Source of the idea, cutting the small inputs of
    trained layers without training: Liu et al., TEAL, ICLR 2025::

        @inproceedings{liu2025teal, title={Training-Free Activation Sparsity in Large Language Models}, author={Liu,
          James and Ponnusamy, Pragaash and Cai, Tianle and Guo, Han and Kim, Yoon and Athiwaratkun, Ben},
          booktitle={ICLR}, year={2025}}
    """
    args = (x, rows, cut, scale, bias, ran)
    if not torch.compiler.is_compiling() and nothing_to_dispatch(args) and cpu.fits(*args):
        return cpu.run(*args)
    refuse_gradients("threshold_accumulate", *args)
    return OP(*args)


@OP.definition.register_fake
def _(x, rows, cut, scale, bias, ran):
    _check(x, rows, cut, scale, bias, ran)
    return x.new_empty((x.shape[0], rows.shape[1]), dtype=_arrays.accumulator(x, rows))
