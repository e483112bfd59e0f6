"""Sums of one row from each of many small tables, in groups: training of bags whose rows are named table by table."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparingly.ops import _arrays, _gradients
from sparingly.ops._registry import Op
from sparingly.ops.table_sums import cpu
from sparingly.ops.table_sums.reference import reference


def _check(factors: Tensor, rows: Tensor, ids: Tensor) -> None:
    _arrays.check_rows(rows, None)
    _arrays.check_matrix("factors", factors)
    _arrays.check_ids(ids, factors.shape[0])
    if rows.dtype not in _arrays.FLOATS:
        raise TypeError(f"rows must be floating, got {rows.dtype}")
    k, groups = ids.shape[1], factors.shape[1]
    if not k or rows.shape[0] % k:
        raise ValueError(f"each place of ids has a table of its own: {k} must divide the {rows.shape[0]} rows")
    if not groups or k % groups:
        raise ValueError(f"the {groups} groups of factors must divide the {k} places of ids")


OP = Op(
    "table_sums",
    "(Tensor factors, Tensor rows, Tensor ids, bool sparse_grad) -> Tensor",
    reference,
    check=_check,
    kernel_args=3,
)
OP.kernel("cpu", cpu.kernel, unsupported=cpu.unsupported)


def table_sums(factors: Tensor, rows: Tensor, ids: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """``factors[t, g]`` times the sum of the rows that ids names at the places of group g.

    Like :func:`gather_accumulate`, for ids of which place j names a row of table j, the j-th of k equal parts of the
    bank. Table by table a batch finds them in the first cache, forwards and backwards; worth it where a table is small.

    Args:
        factors: [tokens, groups], float32 or bfloat16 (float64: reference only).
        rows: [num_rows, d], float32 or bfloat16; k divides num_rows.
        ids: [tokens, k], int64; at place j from ``j * num_rows / k`` up to below ``(j + 1) * num_rows / k``, or -1, a
            pad. ``k / groups`` places follow one another in each group.
        sparse_grad: the gradient of rows is a coalesced sparse tensor that holds only the selected rows.

    Returns:
        [tokens, groups * d], float32; 0 where a group has only pads.

    Raises:
        IndexError: an id is neither -1 nor of its table; names the place.
        ValueError, TypeError: shapes or dtypes do not fit.

    Differentiable in rows.
    """
    return OP(factors, rows, ids, sparse_grad)


@OP.definition.register_fake
def _(factors, rows, ids, sparse_grad=False):
    _check(factors, rows, ids)
    width = factors.shape[1] * rows.shape[1]
    return factors.new_empty((ids.shape[0], width), dtype=_arrays.accumulator(factors, rows))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    factors, rows, ids, ctx.sparse_grad = inputs
    ctx.save_for_backward(factors, rows, ids)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    factors, rows, ids = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        raise NotImplementedError("table_sums has no gradient for factors: use gather_accumulate")
    if not ctx.needs_input_grad[1]:
        return None, None, None, None
    (tokens, groups), d = factors.shape, rows.shape[1]
    if ctx.sparse_grad and _gradients.plain(factors, grad, ids, rows):
        touched, values = cpu.gradient(factors, grad, ids, rows.shape[0])
        return None, _gradients.sparse_rows(values.to(rows.dtype), touched, rows.shape[0]), None, None
    weights = factors.reshape(-1, 1).expand(-1, ids.shape[1] // groups).contiguous()
    of_rows, _ = _gradients.of_rows_and_bias(
        weights,
        grad.reshape(tokens * groups, d),
        ids.reshape(tokens * groups, -1),
        rows,
        need_rows=True,
        need_bias=False,
        sparse=ctx.sparse_grad,
    )
    return None, of_rows, None, None


OP.definition.register_autograd(_backward, setup_context=_setup)
