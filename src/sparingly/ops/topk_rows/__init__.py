"""Best k among the selected rows of a bank, fused: no row of scores is written out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparingly.ops import _arrays, _gradients
from sparingly.ops._registry import Op
from sparingly.ops.topk_rows import cpu
from sparingly.ops.topk_rows.reference import reference


def _check(
    hidden: Tensor, rows: Tensor, ids: Tensor, k: int, scale: Tensor | None = None, bias: Tensor | None = None
) -> None:
    _arrays.check_rows(rows, scale, bias)
    _arrays.check_matrix("hidden", hidden, rows.shape[1])
    _arrays.check_ids(ids, hidden.shape[0])
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


OP = Op(
    "topk_rows",
    "(Tensor hidden, Tensor rows, Tensor ids, SymInt k, Tensor? scale, Tensor? bias, "
    "bool sparse_grad) -> (Tensor, Tensor)",
    reference,
    check=_check,
    kernel_args=6,
)
OP.kernel("cpu", cpu.kernel, unsupported=cpu.unsupported)
OP.kernel("cuda", module="sparingly.ops.topk_rows.triton")


def topk_rows(
    hidden: Tensor,
    rows: Tensor,
    ids: Tensor,
    k: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k rows with the largest dot products among each token's own candidates.

    Args:
        hidden: [tokens, d], float32 or bfloat16 (float64: reference only).
        rows: [num_rows, d], float32, bfloat16 or int8, the bank.
        ids: [tokens, m], int64, the candidates; -1 is a pad. Each counts as often as it is named.
        k: how many to return, at least 1; may exceed m.
        scale: [num_rows], float32, for int8 rows: a row stands for ``scale * row``.
        bias: [num_rows], float32, added to the scores.
        sparse_grad: gradients of rows and bias are coalesced sparse tensors of the k rows returned.

    Returns:
        scores [tokens, k], float32, best first, and classes [tokens, k], int64. Of equal scores the one that comes
        first in ids wins; NaN ranks above everything, as in ``torch.topk``. With fewer than k candidates the rest is
        -inf and -1.

    Raises:
        IndexError: an id is neither -1 nor in 0..num_rows-1; names the id and the range.
        ValueError, TypeError: shapes, dtypes or k do not fit.

    Scores are differentiable in hidden, rows (unless int8) and bias.
    """
    return OP(hidden, rows, ids, k, scale, bias, sparse_grad)


@OP.definition.register_fake
def _(hidden, rows, ids, k, scale=None, bias=None, sparse_grad=False):
    _check(hidden, rows, ids, k, scale, bias)
    shape = (ids.shape[0], k)
    return hidden.new_empty(shape, dtype=_arrays.accumulator(hidden, rows)), ids.new_empty(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, rows, _, _, scale, _, ctx.sparse_grad = inputs
    classes = output[1]
    ctx.mark_non_differentiable(classes)
    ctx.save_for_backward(hidden, rows, classes, scale)


def _backward(ctx: Any, grad: Tensor, _grad_of_classes: Tensor | None) -> tuple[Tensor | None, ...]:
    from sparingly.ops.gather_accumulate import gather_accumulate

    hidden, rows, classes, scale = ctx.saved_tensors
    need_hidden, need_rows, _, _, need_scale, need_bias, _ = ctx.needs_input_grad
    if need_scale:
        raise NotImplementedError("topk_rows has no gradient for scale: int8 rows are for inference")
    grad = grad.contiguous()
    of_hidden = of_rows = of_bias = None
    if need_hidden:
        of_hidden = gather_accumulate(grad, rows, classes, scale).to(hidden.dtype)
    if need_rows or need_bias:
        of_rows, of_bias = _gradients.of_rows_and_bias(
            grad, hidden, classes, rows, need_rows=need_rows, need_bias=need_bias, sparse=ctx.sparse_grad
        )
    return of_hidden, of_rows, None, None, None, of_bias, None


OP.definition.register_autograd(_backward, setup_context=_setup)
