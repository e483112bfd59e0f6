# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's launch syntax and language carry no types that fit; kernels are checked by running and compiling them.
"""Gated feed-forward layer of the units that pass their cut on a GPU (Triton).

Two launches: the first finds what each unit's row of ``down`` is multiplied by, the second is that of
``threshold_accumulate``. Between them lie tokens * n numbers; a fused launch would need one program for all units of
a token, or atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops.gated_rows._arguments import Arguments
from sparingly.ops.gated_rows._count import record
from sparingly.ops.gather_dot.triton import _score_rows, cdiv, tile, unit_stride, why_not
from sparingly.ops.threshold_accumulate.triton import _load_kept, accumulate, count_ran


@triton.jit
def _gated_factors(
    gate_ptr, hidden_ptr, up_ptr, cut_ptr, bias_ptr, scale_ptr, factors_ptr,
    gate_stride, hidden_stride, up_stride, width, n, blocks_k,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = (program // blocks_k).to(tl.int64)
    units = (program % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    gates, kept = _load_kept(gate_ptr + token * gate_stride, cut_ptr, units, n)
    scores = _score_rows(
        hidden_ptr + token * hidden_stride, up_ptr, scale_ptr, bias_ptr, units.to(tl.int64), kept, up_stride, width,
        BLOCK_K, BLOCK_D, HAS_SCALE, HAS_BIAS,
    )  # fmt: skip
    tl.store(factors_ptr + token * n + units, tl.where(kept, gates * scores, 0.0), mask=units < n)


def unsupported(*args: Tensor | None) -> str | None:
    """Why these arguments cannot run here, or None."""
    gate, hidden, up, down, cut, cut_out, up_bias, up_scale, down_scale, bias, ran = Arguments._make(args)
    others = (gate, hidden, cut, cut_out, up_bias, up_scale, down_scale, bias)
    return why_not(up, ran, down, *others) or why_not(down, ran, *others)


def kernel(*args: Tensor | None) -> Tensor:
    """gate [tokens, n], hidden [tokens, d_in], up [n, d_in], down [n, d_out] -> [tokens, d_out] float32.

    Rows of cut units are not loaded.
    """
    gate, hidden, up, down, cut, cut_out, up_bias, up_scale, down_scale, bias, ran = Arguments._make(args)
    (tokens, n), width = gate.shape, up.shape[1]
    gate, hidden, cut = unit_stride(gate), unit_stride(hidden), cut.contiguous()
    vectors = [None if vector is None else vector.contiguous() for vector in (up_bias, up_scale, down_scale)]
    factors = torch.empty(tokens, n, dtype=torch.float32, device=gate.device)
    if tokens and n:
        block_k, block_d = tile(width, n)
        blocks_k = cdiv(n, block_k)
        with torch.cuda.device_of(up):
            _gated_factors[(tokens * blocks_k,)](
                gate, hidden, up, cut, vectors[0], vectors[1], factors,
                gate.stride(0), hidden.stride(0), up.stride(0), width, n, blocks_k,
                BLOCK_K=block_k, BLOCK_D=block_d, HAS_SCALE=up_scale is not None, HAS_BIAS=up_bias is not None,
            )  # fmt: skip
    if cut_out is None:
        chooser, weights, least = gate, factors, cut
    else:
        # A unit that the first cut took has the factor 0.
        chooser, weights, least = factors, None, cut_out.float().clamp_min(torch.finfo(torch.float32).tiny)
    sums = accumulate(chooser, weights, down, least, vectors[2], bias)
    before = ran.clone() if ledger.active() else None
    count_ran(ran, gate, cut)
    ran[3] += (~(chooser.abs() < least)).sum()
    if before is not None:
        visited, passed = (int((ran - before)[place]) for place in (1, 3))
        read = (gate, hidden, cut, cut_out, bias)
        of_up, copied = (up_bias, up_scale), factors.nbytes
        record(visited, passed, up, down, of_up, (down_scale,), read, sums, copied=copied)
    return sums
