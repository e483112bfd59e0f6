"""Two-layer perceptron of each token's own units: the others are neither read nor computed, in training too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparingly.ops import _arrays
from sparingly.ops._gradients import plain
from sparingly.ops._registry import Op
from sparingly.ops.mlp_rows import cpu
from sparingly.ops.mlp_rows._activations import ACTIVATIONS
from sparingly.ops.mlp_rows._arguments import Arguments
from sparingly.ops.mlp_rows._gradients import Saved, composed, grouped
from sparingly.ops.mlp_rows.reference import reference


def _check(*args: Any) -> None:
    hidden, up, bias, down, ids, weights, block, activation = Arguments._make(args)
    _arrays.check_rows(up, None)
    _arrays.check_rows(down, None)
    _arrays.check_matrix("hidden", hidden, up.shape[1])
    _arrays.check_ids(ids, hidden.shape[0])
    if up.dtype not in _arrays.FLOATS or down.dtype != up.dtype:
        raise TypeError(f"up and down must be floating and of one dtype, got {up.dtype} and {down.dtype}")
    if bias is not None and (bias.shape != up.shape[:1] or bias.dtype != up.dtype):
        raise ValueError(f"bias must be [{up.shape[0]}] of up's {up.dtype}, got {list(bias.shape)}, {bias.dtype}")
    if down.shape[0] != up.shape[0]:
        raise ValueError(f"up {list(up.shape)} and down {list(down.shape)} must have one row for each unit")
    if block < 1 or up.shape[0] % block:
        raise ValueError(f"block must divide the {up.shape[0]} units, got {block}")
    if weights is not None:
        _arrays.check_matrix("weights", weights)
        if weights.shape != ids.shape:
            raise ValueError(f"weights {list(weights.shape)} and ids {list(ids.shape)} must both be [tokens, k]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


OP = Op(
    "mlp_rows",
    "(Tensor hidden, Tensor up, Tensor? bias, Tensor down, Tensor ids, Tensor? weights, SymInt block, str activation, "
    "bool sparse_grad) -> (Tensor, Tensor)",
    reference,
    check=_check,
    kernel_args=8,
)
OP.kernel("cpu", cpu.kernel, unsupported=cpu.unsupported)


def mlp_rows(
    hidden: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down: Tensor,
    ids: Tensor,
    weights: Tensor | None = None,
    *,
    block: int = 1,
    activation: str = "gelu",
    sparse_grad: bool = False,
) -> Tensor:
    """``sum of weight * act(hidden . up_i + bias_i) * down_i`` over the units i of each token's own blocks.

    Args:
        hidden: [tokens, d_in], float32 or bfloat16 (float64: reference only).
        up: [num_units, d_in], float32 or bfloat16, a unit's incoming weights as its row.
        bias: [num_units], of up's dtype, or None.
        down: [num_units, d_out], of up's dtype, its outgoing weights as its row.
        ids: [tokens, k], int64 in 0..num_units / block - 1, which blocks each token runs; -1 is a pad.
        weights: [tokens, k], float32 or bfloat16, how much each block counts; ignored at pads; None: all 1.
        block: units per block: block b is the units ``b * block`` to ``(b + 1) * block - 1``.
        activation: "relu", "gelu" (with erf) or "silu".
        sparse_grad: gradients of up, bias and down are coalesced sparse tensors that hold only the selected rows, so
            that no pass over num_units happens; dense otherwise.

    Returns:
        [tokens, d_out], float32; 0 for a token that has only pads.

    Raises:
        IndexError: an id is neither -1 nor a block; names it and the range.
        ValueError, TypeError: shapes, dtypes or options do not fit.

    Differentiable in all floating arguments. CPU sums run in float32. Sources: units that are experts of one neuron:
    He, Mixture of A Million Experts, 2024, section 2; training by the active neurons only: Chen et al., SLIDE, MLSys
    2020::

        @article{he2024peer, title={Mixture of A Million Experts}, author={He, Xu Owen}, journal={arXiv:2407.04153},
          year={2024}}
    """
    return OP(hidden, up, bias, down, ids, weights, block, activation, sparse_grad)[0]


@OP.definition.register_fake
def _(hidden, up, bias, down, ids, weights, block, activation, sparse_grad):
    dtype = _arrays.accumulator(hidden, up)
    sums = hidden.new_empty((hidden.shape[0], down.shape[1]), dtype=dtype)
    return sums, hidden.new_empty((ids.shape[0], ids.shape[1] * block), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, up, _, down, ids, weights, ctx.block, ctx.activation, ctx.sparse_grad = inputs
    ctx.save_for_backward(hidden, up, down, ids, weights, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, of_scores: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * 3
    if grad is None and of_scores is None:
        return (None,) * 6 + none
    hidden, up, down, ids, weights, scores = ctx.saved_tensors
    saved = Saved(hidden, up, down, ids, weights, scores, ctx.block, ctx.activation)
    needs = ctx.needs_input_grad[:6]
    if ctx.sparse_grad and grad is not None and of_scores is None and plain(grad, *saved[:6]) and down.is_contiguous():
        return *grouped(saved, grad, needs), *none
    return *composed(saved, grad, of_scores, needs, ctx.sparse_grad), *none


OP.definition.register_autograd(_backward, setup_context=_setup)
