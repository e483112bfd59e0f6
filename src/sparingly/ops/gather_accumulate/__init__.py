"""Weighted sum of the selected rows of a bank, and nothing of the others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparingly.ops import _arrays, _gradients
from sparingly.ops._registry import Op
from sparingly.ops.gather_accumulate import cpu
from sparingly.ops.gather_accumulate.reference import reference


def _check(weights: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None) -> None:
    _arrays.check_rows(rows, scale)
    _arrays.check_matrix("weights", weights)
    _arrays.check_ids(ids, weights.shape[0])
    if ids.shape != weights.shape:
        raise ValueError(f"weights {list(weights.shape)} and ids {list(ids.shape)} must both be [tokens, k]")


OP = Op(
    "gather_accumulate",
    "(Tensor weights, Tensor rows, Tensor ids, Tensor? scale, bool sparse_grad) -> Tensor",
    reference,
    check=_check,
    kernel_args=4,
)
OP.kernel("cpu", cpu.kernel, unsupported=cpu.unsupported)
OP.kernel("cuda", module="sparingly.ops.gather_accumulate.triton")


def gather_accumulate(
    weights: Tensor,
    rows: Tensor,
    ids: Tensor,
    scale: Tensor | None = None,
    *,
    sparse_grad: bool = False,
) -> Tensor:
    """Sum of each token's own selected rows, weighted.

    Args:
        weights: [tokens, k], float32 or bfloat16 (float64: reference only); ignored at pads.
        rows: [num_rows, d], float32, bfloat16 or int8, the bank.
        ids: [tokens, k], int64, which rows each token sums; -1 is a pad and adds nothing.
        scale: [num_rows], float32, for int8 rows: a row stands for ``scale * row``.
        sparse_grad: the gradient of rows is a coalesced sparse tensor that holds only the selected rows.

    Returns:
        sums [tokens, d], float32; 0 for a token that has only pads.

    Raises:
        IndexError: an id is neither -1 nor in 0..num_rows-1; names the id and the range.
        ValueError, TypeError: shapes or dtypes do not fit.

    Differentiable in weights (0 at pads) and rows (unless int8). With one token and weights of an activation this is
    the second half of a sparse feed-forward layer: Liu et al., Deja Vu, ICML 2023::

        @inproceedings{liu2023dejavu, title={Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time},
          author={Liu, Zichang and Wang, Jue and Dao, Tri and Zhou, Tianyi and Yuan, Binhang and Song, Zhao and
          Shrivastava, Anshumali and Zhang, Ce and Tian, Yuandong and Re, Christopher and Chen, Beidi},
          booktitle={ICML}, year={2023}}
    """
    return OP(weights, rows, ids, scale, sparse_grad)


@OP.definition.register_fake
def _(weights, rows, ids, scale=None, sparse_grad=False):
    _check(weights, rows, ids, scale)
    return weights.new_empty((ids.shape[0], rows.shape[1]), dtype=_arrays.accumulator(weights, rows))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, rows, ids, scale, ctx.sparse_grad = inputs
    ctx.save_for_backward(weights, rows, ids, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from sparingly.ops.gather_dot import gather_dot

    weights, rows, ids, scale = ctx.saved_tensors
    need_weights, need_rows, _, need_scale, _ = ctx.needs_input_grad
    if need_scale:
        raise NotImplementedError("gather_accumulate has no gradient for scale: int8 rows are for inference")
    grad = grad.contiguous()
    of_weights = of_rows = None
    if need_weights:
        of_weights = gather_dot(grad, rows, ids, scale).masked_fill(ids < 0, 0.0).to(weights.dtype)
    if need_rows:
        of_rows, _ = _gradients.of_rows_and_bias(
            weights, grad, ids, rows, need_rows=True, need_bias=False, sparse=ctx.sparse_grad
        )
    return of_weights, of_rows, None, None, None


OP.definition.register_autograd(_backward, setup_context=_setup)
