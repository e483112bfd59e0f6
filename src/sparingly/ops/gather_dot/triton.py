# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's launch syntax and language carry no types that fit; kernels are checked by running and compiling them.
"""Scores of selected rows on a GPU (Triton), and what the other Triton kernels share with it.

One program scores ``BLOCK_K`` rows for one token: it reads their ids, loads those rows and no others (whole rows, so
that a warp reads neighbouring bytes), keeps one float32 partial product per loaded column and reduces once at the end.
No tensor cores and no atomics: the sum has one fixed order, so equal inputs give equal bits.

Ids are checked on the device. A row outside the bank is never loaded: its score is NaN and a flag is raised, and
reading that flag costs one wait for the device per call, after the launch, so that the kernel itself is not held up.
Where waiting is impossible (a CUDA graph is being captured) or pointless (``check_ids=False``, for ids that one of
our own selectors made), nothing is read and the NaN remains as the sign.

The layout (a few rows per program, loads masked by the id) follows the embedding-bag kernels of FBGEMM:

    @article{khudia2021fbgemm, title={{FBGEMM}: Enabling High-Performance Low-Precision Deep Learning Inference},
      author={Khudia, Daya and Huang, Jianyu and Basu, Protonu and others}, journal={arXiv:2101.05615}, year={2021}}
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._record import record_rows

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "GPU kernels need Triton, which the CUDA builds of torch bring along; elsewhere: pip install triton==3.7.1"
    ) from error

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
TILE = 4096  # loaded numbers per program and step: 32 per thread, eight 16-byte float32 loads in flight


@triton.jit
def _score_rows(
    hidden_ptr, rows_ptr, scale_ptr, bias_ptr, ids, valid, row_stride, width,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """ids, valid [BLOCK_K] -> float32 scores [BLOCK_K]; rows that are not valid are not loaded."""
    rows = tl.where(valid, ids, 0)
    partial = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        inside = cols < width
        hidden = tl.load(hidden_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(
            rows_ptr + rows[:, None] * row_stride + cols[None, :], mask=valid[:, None] & inside[None, :], other=0
        )
        partial += values.to(tl.float32) * hidden[None, :]
    scores = tl.sum(partial, 1)
    if HAS_SCALE:
        scores *= tl.load(scale_ptr + rows, mask=valid, other=0.0)
    if HAS_BIAS:
        scores += tl.load(bias_ptr + rows, mask=valid, other=0.0)
    return scores


@triton.jit
def _load_ids(ids_ptr, slots, end, num_rows, flag_ptr):
    """(ids, valid, wrong) of the slots before `end`; raises the flag where an id is neither a row nor the pad -1."""
    ids = tl.load(ids_ptr + slots, mask=slots < end, other=-1).to(tl.int64)
    wrong = (ids < -1) | (ids >= num_rows)
    if tl.max(wrong.to(tl.int32), 0) > 0:
        tl.store(flag_ptr, 1)
    return ids, (ids >= 0) & (ids < num_rows), wrong


@triton.jit
def _gather_dot(
    hidden_ptr, rows_ptr, ids_ptr, scale_ptr, bias_ptr, scores_ptr, flag_ptr,
    hidden_stride, row_stride, ids_stride, num_rows, width, k, blocks_k,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = (program // blocks_k).to(tl.int64)
    slots = (program % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    ids, valid, wrong = _load_ids(ids_ptr + token * ids_stride, slots, k, num_rows, flag_ptr)
    scores = _score_rows(
        hidden_ptr + token * hidden_stride, rows_ptr, scale_ptr, bias_ptr, ids, valid, row_stride, width,
        BLOCK_K, BLOCK_D, HAS_SCALE, HAS_BIAS,
    )  # fmt: skip
    scores = tl.where(valid, scores, tl.where(wrong, float("nan"), float("-inf")))
    tl.store(scores_ptr + token * k + slots, scores, mask=slots < k)


INTERPRETED = not isinstance(_gather_dot, triton.JITFunction)  # Triton's interpreter: the same kernels on CPU tensors


def cdiv(total: int, part: int) -> int:
    """total / part, rounded up."""
    return -(-total // part)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below number (at least 1)."""
    return 1 << max(0, number - 1).bit_length()


def tile(width: int, k: int) -> tuple[int, int]:
    """(rows, columns) that one program holds at a time, powers of two."""
    block_d = min(512, max(16, next_power_of_2(width)))
    return min(64, max(1, TILE // block_d), next_power_of_2(k)), block_d


def new_flag(like: Tensor) -> Tensor:
    """A zero that a kernel sets to 1 when it meets an id outside the bank: int32 [1] on the device of `like`."""
    return torch.zeros(1, dtype=torch.int32, device=like.device)


def raise_flagged(flag: Tensor, ids: Tensor, num_rows: int) -> None:
    """Wait for the kernel and raise IndexError where it flagged an id; no wait while a CUDA graph is being captured."""
    if flag.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if flag.item():
        wrong = ids[(ids < -1) | (ids >= num_rows)][0].item()
        raise IndexError(f"ids must be in 0..{num_rows - 1}, or -1 for a pad, got {wrong}")


def why_not(rows: Tensor, ids: Tensor, *others: Tensor | None) -> str | None:
    """What all kernels need of their tensors: one CUDA (or ROCm) device, known dtypes, rows that are contiguous."""
    tensors = [rows, ids, *(t for t in others if t is not None)]
    if len({t.device for t in tensors}) > 1:
        return f"tensors are on several devices: {sorted({str(t.device) for t in tensors})}"
    if not (rows.is_cuda or INTERPRETED):
        return f"Triton kernels need a CUDA device, got {rows.device}"
    if rows.dtype not in ROW_DTYPES:
        return f"rows must be float32, bfloat16 or int8, got {rows.dtype}"
    if rows.dim() != 2 or rows.stride(1) != 1:
        return f"each row must be contiguous, got shape {tuple(rows.shape)} with strides {rows.stride()}"
    if any(t.dtype == torch.float64 for t in others if t is not None):
        return "Triton kernels add up in float32, got float64"
    return None


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` itself where its last dimension is contiguous (expanded leading dimensions stay), else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def count_valid(ids: Tensor) -> int:
    """How many ids are not pads; waits for the device, so kernels ask only while a ledger counts."""
    return int((ids >= 0).sum())


def unsupported(
    hidden: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> str | None:
    """Why these arguments cannot run here, or None."""
    return why_not(rows, ids, hidden, scale, bias)


def kernel(
    hidden: Tensor, rows: Tensor, ids: Tensor, scale: Tensor | None = None, bias: Tensor | None = None,
    *, check_ids: bool = True,
) -> Tensor:  # fmt: skip
    """hidden [tokens, d], rows [N, d], ids [tokens, k] -> scores [tokens, k] float32; pads (-1) score -inf.

    Reads the selected rows once per use, one hidden row per program, and no other row. Raises IndexError for an id
    outside -1..N-1 (after one wait for the device; `check_ids=False` skips the wait and leaves NaN there).
    """
    tokens, k = ids.shape
    width = rows.shape[1]
    scores = torch.empty(tokens, k, dtype=torch.float32, device=hidden.device)
    if scores.numel() == 0:
        return scores
    hidden, ids = unit_stride(hidden), unit_stride(ids)
    block_k, block_d = tile(width, k)
    blocks_k = cdiv(k, block_k)
    flag = new_flag(ids)
    with torch.cuda.device_of(rows):
        _gather_dot[(tokens * blocks_k,)](
            hidden, rows, ids, scale, bias, scores, flag,
            hidden.stride(0), rows.stride(0), ids.stride(0), rows.shape[0], width, k, blocks_k,
            BLOCK_K=block_k, BLOCK_D=block_d, HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
        )  # fmt: skip
    if check_ids:
        raise_flagged(flag, ids, rows.shape[0])
    if ledger.active():
        record_rows("gather_dot", count_valid(ids), rows, scale, bias, read=(hidden, ids), written=(scores,))
    return scores
