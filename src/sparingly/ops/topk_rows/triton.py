# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's launch syntax and language carry no types that fit; kernels are checked by running and compiling them.
"""Best k among the selected rows on a GPU, fused (Triton): scores live in registers and are never written out.

Each program walks through its share of one token's candidates, scores a block of them and keeps the best so far as
sorted 64-bit keys (score in the high half, earlier position wins ties in the low half). A block is sorted only when
its best key beats the worst one kept, which after the first few blocks is rare. A second, small kernel merges the
shares of a token. Sorting networks: Batcher, "Sorting networks and their applications", AFIPS 1968; the running merge
of two sorted lists: Johnson et al., "Billion-scale similarity search with GPUs", section 4.

    @article{johnson2019billion, title={Billion-scale similarity search with {GPU}s}, author={Johnson, Jeff and
      Douze, Matthijs and J{\'e}gou, Herv{\'e}}, journal={IEEE Transactions on Big Data}, year={2019}}
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._record import record_rows
from sparingly.ops.gather_dot.triton import (
    TILE,
    _load_ids,
    _score_rows,
    cdiv,
    count_valid,
    new_flag,
    next_power_of_2,
    raise_flagged,
    tile,
    unit_stride,
    why_not,
)

MAX_K = 64  # the kept keys and the block they are merged with stay in registers
PROGRAMS = 1024  # aimed at when a token's candidates are split, as in gather_accumulate
_EMPTY = tl.constexpr(-(2**63))  # below the key of every real score, -inf included
_LOW = tl.constexpr(2**31 - 1)  # x ^ _LOW is _LOW - x for x in 0.._LOW: turns an ascending order round


@triton.jit
def _to_keys(scores, slots):
    """float32 scores -> int64 keys in the same order; NaN is largest (as in torch.topk) and -0 equals 0."""
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(scores != scores, _LOW, tl.where(bits < 0, bits ^ _LOW, bits))
    return (bits.to(tl.int64) << 32) | (slots ^ _LOW).to(tl.int64)


@triton.jit
def _merge(best, keys, K_PAD: tl.constexpr):
    """Sorted best [K_PAD] and unsorted keys -> the best K_PAD of both, sorted; often nothing to do."""
    if tl.max(keys, 0) > tl.min(best, 0):
        best = tl.sort(tl.maximum(best, tl.flip(tl.topk(keys, K_PAD), 0)), descending=True)
    return best


@triton.jit
def _store_best(best, ids_ptr, scores_ptr, classes_ptr, k, K_PAD: tl.constexpr):
    bits = (best >> 32).to(tl.int32)
    scores = tl.where(bits < 0, bits ^ _LOW, bits).to(tl.float32, bitcast=True)
    filled = best != _EMPTY
    classes = tl.load(ids_ptr + ((best & _LOW) ^ _LOW), mask=filled, other=-1).to(tl.int64)
    places = tl.arange(0, K_PAD)
    tl.store(scores_ptr + places, tl.where(filled, scores, float("-inf")), mask=places < k)
    tl.store(classes_ptr + places, classes, mask=places < k)


@triton.jit
def _topk_rows(
    hidden_ptr, rows_ptr, ids_ptr, scale_ptr, bias_ptr, scores_ptr, classes_ptr, parts_ptr, flag_ptr,
    hidden_stride, row_stride, ids_stride, num_rows, width, m, k, splits, chunk,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, K_PAD: tl.constexpr, WHOLE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)  # token * splits + split
    token = part // splits
    first = (part % splits).to(tl.int32) * chunk
    last = tl.minimum(first + chunk, m)
    token_ids = ids_ptr + token * ids_stride
    best = tl.full([K_PAD], _EMPTY, tl.int64)
    for start in range(first, last, BLOCK_M):
        slots = start + tl.arange(0, BLOCK_M)
        ids, valid, wrong = _load_ids(token_ids, slots, last, num_rows, flag_ptr)
        scores = _score_rows(
            hidden_ptr + token * hidden_stride, rows_ptr, scale_ptr, bias_ptr, ids, valid, row_stride, width,
            BLOCK_M, BLOCK_D, HAS_SCALE, HAS_BIAS,
        )  # fmt: skip
        scores = tl.where(wrong, float("nan"), scores)
        best = _merge(best, tl.where(valid | wrong, _to_keys(scores, slots), _EMPTY), K_PAD)
    if WHOLE:
        _store_best(best, token_ids, scores_ptr + token * k, classes_ptr + token * k, k, K_PAD)
    else:
        tl.store(parts_ptr + part * K_PAD + tl.arange(0, K_PAD), best)


@triton.jit
def _merge_parts(
    parts_ptr, ids_ptr, scores_ptr, classes_ptr, ids_stride, count, k, BLOCK: tl.constexpr, K_PAD: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    best = tl.full([K_PAD], _EMPTY, tl.int64)
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        best = _merge(best, tl.load(parts_ptr + token * count + places, mask=places < count, other=_EMPTY), K_PAD)
    _store_best(best, ids_ptr + token * ids_stride, scores_ptr + token * k, classes_ptr + token * k, k, K_PAD)


def unsupported(
    hidden: Tensor, rows: Tensor, ids: Tensor, k: int, scale: Tensor | None = None, bias: Tensor | None = None
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if not hasattr(tl, "topk"):
        return f"the fused GPU kernel needs Triton 3.4 or newer, got {triton.__version__}"
    if k > MAX_K:
        return f"the fused GPU kernel keeps at most k = {MAX_K}, got {k}"
    return why_not(rows, ids, hidden, scale, bias)


def kernel(
    hidden: Tensor, rows: Tensor, ids: Tensor, k: int, scale: Tensor | None = None, bias: Tensor | None = None,
    *, check_ids: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """hidden [tokens, d], rows [N, d], ids [tokens, m] -> (scores [tokens, k] float32, classes [tokens, k] int64).

    Best first; ties go to the lower position in ids; fewer than k valid ids end in (-inf, -1). k is at most 64.
    Raises IndexError for an id outside -1..N-1 (after one wait for the device; `check_ids=False` skips the wait, and
    such an id then comes first with a NaN score).
    """
    tokens, m = ids.shape
    scores = torch.full((tokens, k), float("-inf"), dtype=torch.float32, device=hidden.device)
    classes = torch.full((tokens, k), -1, dtype=torch.int64, device=hidden.device)
    if tokens == 0 or m == 0 or k == 0:
        return scores, classes
    hidden, ids = unit_stride(hidden), unit_stride(ids)
    k_pad = max(2, next_power_of_2(k))
    block_m, block_d = tile(rows.shape[1], m)
    block_m = max(block_m, k_pad)
    block_d = max(16, min(block_d, TILE // block_m))
    steps = cdiv(m, block_m)
    chunk = cdiv(steps, min(steps, cdiv(PROGRAMS, tokens))) * block_m
    splits = cdiv(m, chunk)
    parts = torch.empty(tokens, splits, k_pad, dtype=torch.int64, device=hidden.device) if splits > 1 else None
    flag = new_flag(ids)
    with torch.cuda.device_of(rows):
        _topk_rows[(tokens * splits,)](
            hidden, rows, ids, scale, bias, scores, classes, parts, flag,
            hidden.stride(0), rows.stride(0), ids.stride(0), rows.shape[0], rows.shape[1], m, k, splits, chunk,
            BLOCK_M=block_m, BLOCK_D=block_d, K_PAD=k_pad, WHOLE=parts is None,
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
        )  # fmt: skip
        if parts is not None:
            block = max(k_pad, min(1024, next_power_of_2(splits * k_pad)))
            _merge_parts[(tokens,)](
                parts, ids, scores, classes, ids.stride(0), splits * k_pad, k, BLOCK=block, K_PAD=k_pad
            )
    if check_ids:
        raise_flagged(flag, ids, rows.shape[0])
    if ledger.active():
        valid = count_valid(ids)
        copied = 0 if parts is None else parts.nbytes
        record_rows(
            "topk_rows", valid, rows, scale, bias,
            read=(hidden, ids), written=(scores, classes), copied=copied, other=valid,
        )  # fmt: skip
    return scores, classes
