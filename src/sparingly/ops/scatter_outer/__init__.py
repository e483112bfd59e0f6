"""Weighted vectors added into slots: the transpose of both gathers, that is the gradient of a bank's rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparingly.ops import _arrays
from sparingly.ops._registry import Op
from sparingly.ops.scatter_outer import cpu
from sparingly.ops.scatter_outer.reference import reference


def _check(weights: Tensor, vectors: Tensor, slots: Tensor, num_slots: int) -> None:
    _arrays.check_matrix("weights", weights)
    _arrays.check_matrix("vectors", vectors)
    _arrays.check_ids(slots, weights.shape[0])
    if slots.shape != weights.shape or vectors.shape[0] != weights.shape[0]:
        raise ValueError(
            f"weights {list(weights.shape)} and slots {list(slots.shape)} must both be [tokens, k], "
            f"vectors [tokens, d], got {list(vectors.shape)}"
        )


OP = Op(
    "scatter_outer",
    "(Tensor weights, Tensor vectors, Tensor slots, SymInt num_slots) -> Tensor",
    reference,
    check=_check,
    kernel_args=4,
)
OP.kernel("cpu", cpu.kernel, unsupported=cpu.unsupported)


def scatter_outer(weights: Tensor, vectors: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """Add ``weights[t, j] * vectors[t]`` to ``sums[slots[t, j]]`` for every token t and place j.

    Args:
        weights: [tokens, k], float32 or bfloat16 (float64: reference only); ignored at pads.
        vectors: [tokens, d], float32 or bfloat16 (float64: reference only).
        slots: [tokens, k], int64 in 0..num_slots-1; -1 is a pad and adds nothing.
        num_slots: how many sums there are.

    Returns:
        sums [num_slots, d], float32.

    Raises:
        IndexError: a slot is neither -1 nor in 0..num_slots-1; names it and the range.
        ValueError, TypeError: shapes or dtypes do not fit.
    """
    return OP(weights, vectors, slots, num_slots)


@OP.definition.register_fake
def _(weights, vectors, slots, num_slots):
    _check(weights, vectors, slots, num_slots)
    return vectors.new_empty((num_slots, vectors.shape[1]), dtype=_arrays.accumulator(weights, vectors))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, vectors, slots, _ = inputs
    ctx.save_for_backward(weights, vectors, slots)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from sparingly.ops.gather_accumulate import gather_accumulate
    from sparingly.ops.gather_dot import gather_dot

    weights, vectors, slots = ctx.saved_tensors
    need_weights, need_vectors, _, _ = ctx.needs_input_grad
    grad = grad.contiguous()
    of_weights = of_vectors = None
    if need_weights:
        of_weights = gather_dot(vectors, grad, slots).masked_fill(slots < 0, 0.0).to(weights.dtype)
    if need_vectors:
        of_vectors = gather_accumulate(weights, grad, slots).to(vectors.dtype)
    return of_weights, of_vectors, None, None


OP.definition.register_autograd(_backward, setup_context=_setup)
