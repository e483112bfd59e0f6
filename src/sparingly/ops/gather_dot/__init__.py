"""Scores of the selected rows of a bank, and nothing of the others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparingly.ops import _arrays, _gradients
from sparingly.ops._registry import Op
from sparingly.ops.gather_dot import cpu
from sparingly.ops.gather_dot.reference import reference


def _check(hidden: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
    _arrays.check_rows(rows, scale, bias)
    _arrays.check_matrix("hidden", hidden, rows.shape[1])
    _arrays.check_ids(ids, hidden.shape[0])


OP = Op(
    "gather_dot",
    "(Tensor hidden, Tensor rows, Tensor ids, Tensor? scale, Tensor? bias, bool sparse_grad) -> Tensor",
    reference,
    check=_check,
    kernel_args=5,
)
OP.kernel("cpu", cpu.kernel, unsupported=cpu.unsupported)
OP.kernel("cuda", module="sparingly.ops.gather_dot.triton")


def gather_dot(
    hidden: Tensor,
    rows: Tensor,
    ids: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    sparse_grad: bool = False,
) -> Tensor:
    """Dot product of each hidden state with its own selected rows.

    Args:
        hidden: [tokens, d], float32 or bfloat16 (float64: reference only).
        rows: [num_rows, d], float32, bfloat16 or int8, the bank.
        ids: [tokens, k], int64, which rows each token scores; -1 is a pad.
        scale: [num_rows], float32, for int8 rows: a row stands for ``scale * row``.
        bias: [num_rows], float32, added to the scores.
        sparse_grad: as in ``torch.gather``: gradients of rows and bias are coalesced sparse tensors that hold only
            the selected rows, so that no pass over num_rows happens; dense otherwise.

    Returns:
        scores [tokens, k], float32; -inf at pads.

    Raises:
        IndexError: an id is neither -1 nor in 0..num_rows-1; names the id and the range.
        ValueError, TypeError: shapes or dtypes do not fit.

    Differentiable in hidden, rows (unless int8) and bias; pads pass no gradient. CPU sums run in float32 in the order
    that vector units give. Source of the idea, output scores of selected classes only: Chen et al., SLIDE, MLSys 2020::

        @inproceedings{chen2020slide, title={SLIDE: In Defense of Smart Algorithms over Hardware Acceleration for
          Large-Scale Deep Learning Systems}, author={Chen, Beidi and Medini, Tharun and Farwell, James and Gobriel,
          Sameh and Tai, Charlie and Shrivastava, Anshumali}, booktitle={MLSys}, year={2020}}
    """
    return OP(hidden, rows, ids, scale, bias, sparse_grad)


@OP.definition.register_fake
def _(hidden, rows, ids, scale=None, bias=None, sparse_grad=False):
    _check(hidden, rows, ids, scale, bias)
    return hidden.new_empty(ids.shape, dtype=_arrays.accumulator(hidden, rows))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, rows, ids, scale, bias, ctx.sparse_grad = inputs
    ctx.save_for_backward(hidden, rows, ids, scale)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from sparingly.ops.gather_accumulate import gather_accumulate

    hidden, rows, ids, scale = ctx.saved_tensors
    need_hidden, need_rows, _, need_scale, need_bias, _ = ctx.needs_input_grad
    if need_scale:
        raise NotImplementedError("gather_dot has no gradient for scale: int8 rows are for inference")
    grad = grad.contiguous()
    of_hidden = of_rows = of_bias = None
    if need_hidden:
        of_hidden = gather_accumulate(grad, rows, ids, scale).to(hidden.dtype)
    if need_rows or need_bias:
        of_rows, of_bias = _gradients.of_rows_and_bias(
            grad, hidden, ids, rows, need_rows=need_rows, need_bias=need_bias, sparse=ctx.sparse_grad
        )
    return of_hidden, of_rows, None, None, of_bias, None


OP.definition.register_autograd(_backward, setup_context=_setup)
