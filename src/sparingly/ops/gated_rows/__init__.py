"""Gated feed-forward layer of the units whose gate is not small, reading the rows of no other."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops import _arrays
from sparingly.ops._registry import Op, nothing_to_dispatch
from sparingly.ops.gated_rows import cpu
from sparingly.ops.gated_rows._arguments import Arguments
from sparingly.ops.gated_rows.reference import reference
from sparingly.ops.threshold_accumulate import check_ran, check_vector, refuse_gradients


def _check(*args: Tensor | None) -> None:
    gate, hidden, up, down, cut, cut_out, up_bias, up_scale, down_scale, bias, ran = Arguments._make(args)
    _arrays.check_rows(up, up_scale, up_bias)
    _arrays.check_rows(down, down_scale)
    n, d_in = up.shape
    if down.shape[0] != n:
        raise ValueError(f"up {list(up.shape)} and down {list(down.shape)} must have one row for each of n units")
    _arrays.check_matrix("gate", gate, n)
    _arrays.check_matrix("hidden", hidden, d_in)
    if hidden.shape[0] != gate.shape[0]:
        raise ValueError(f"gate has {gate.shape[0]} tokens and hidden {hidden.shape[0]}")
    check_vector("cut", cut, n)
    check_vector("cut_out", cut_out, n)
    check_vector("bias", bias, down.shape[1])
    check_ran(ran)


OP = Op(
    "gated_rows",
    "(Tensor gate, Tensor hidden, Tensor up, Tensor down, Tensor cut, Tensor? cut_out, Tensor? up_bias, "
    "Tensor? up_scale, Tensor? down_scale, Tensor? bias, Tensor(a!) ran) -> Tensor",
    reference,
    check=_check,
    kernel_args=11,
    mutates_args=("ran",),
)
OP.kernel("cpu", cpu.kernel, unsupported=cpu.unsupported)
OP.kernel("cuda", module="sparingly.ops.gated_rows.triton")


def gated_rows(
    gate: Tensor,
    hidden: Tensor,
    up: Tensor,
    down: Tensor,
    cut: Tensor,
    cut_out: Tensor | None,
    up_bias: Tensor | None,
    up_scale: Tensor | None,
    down_scale: Tensor | None,
    bias: Tensor | None,
    ran: Tensor,
) -> Tensor:
    """``bias + sum of gate_i * (hidden . up_i + up_bias_i) * down_i`` over the units i that pass their cut.

    Unit i passes if ``not |gate_i| < cut_i``. Rows of units that are cut are not read, neither in up nor in down.

    Args:
        gate: [tokens, n], float32 or bfloat16 (float64: reference only), after the activation. NaN is never cut.
        hidden: [tokens, d_in], float32 or bfloat16, the layer's input.
        up: [n, d_in], float32, bfloat16 or int8, one row for each unit.
        down: [n, d_out], likewise: the transposed weight of the down projection.
        cut: [n], float32, in the units of gate; 0 keeps all.
        cut_out: [n], float32, or None: of the units that passed, those with ``|gate_i * (hidden . up_i + up_bias_i)|``
            below it add nothing, and their row of down is not read. NaN is never cut.
        up_bias: [n], float32.
        up_scale, down_scale: [n], float32, for int8 rows: a row stands for ``scale * row``.
        bias: [d_out], float32, what a token starts from; None for zeros.
        ran: [4], int64, changed in place: ``ran[0]`` grows by tokens, ``ran[1]`` by the units whose row of up was read,
            ``ran[3]`` by those whose row of down was read.

    Returns:
        [tokens, d_out], float32.

    Raises:
        RuntimeError: an input requires a gradient, which this operator has not, and gradients are on.
        ValueError, TypeError: shapes or dtypes do not fit.

    On the CPU sums run in float32 in the order that vector units give. Source of the idea, a threshold on the gate's
    activation, and up and down of what passes: Lee et al., CATS, COLM 2024::

        @inproceedings{lee2024cats, title={{CATS}: Context-Aware Thresholding for Sparsity in Large Language Models},
          author={Lee, Donghyun and Lee, Jaeyong and Zhang, Genghan and Tiwari, Mo and Mirhoseini, Azalia},
          booktitle={COLM}, year={2024}}
    """
    args = Arguments(gate, hidden, up, down, cut, cut_out, up_bias, up_scale, down_scale, bias, ran)
    if not torch.compiler.is_compiling() and nothing_to_dispatch(args) and cpu.fits(args):
        return cpu.run(args)
    refuse_gradients("gated_rows", *args)
    return OP(*args)


@OP.definition.register_fake
def _(gate, hidden, up, down, *rest):
    _check(gate, hidden, up, down, *rest)
    return gate.new_empty((gate.shape[0], down.shape[1]), dtype=_arrays.accumulator(gate, hidden, up, down))
