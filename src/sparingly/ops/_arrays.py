"""From tensors to what Numba kernels take, and the checks that all operators share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._numba import kernel

FLOATS = (torch.float32, torch.bfloat16, torch.float64)
NO_FLOATS = np.empty(0, dtype=np.float32)


def as_numpy(tensor: Tensor) -> Any:
    """The tensor's memory as an array; bfloat16 as its bits in uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_vector(tensor: Tensor | None) -> Any:
    """An optional float32 vector; empty for None, so that a kernel needs no second signature."""
    return NO_FLOATS if tensor is None else as_numpy(tensor.contiguous())


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype that sums are kept in and returned as: float64 if any operand is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@kernel
def scan_ids(ids, num_rows):
    """(position of the first id that is neither -1 nor in 0..num_rows-1, or -1; how many are not pads)."""
    valid = 0
    bad = 0
    for position in range(ids.size):
        valid += ids[position] >= 0
        bad += (ids[position] < -1) | (ids[position] >= num_rows)
    if bad:
        for position in range(ids.size):
            if ids[position] < -1 or ids[position] >= num_rows:
                return position, valid
    return -1, valid


@kernel
def _scan_finite(rows):
    """The first row of rows [n, d] with an infinity or NaN, or -1."""
    for row in range(rows.shape[0]):
        total = np.float32(0.0)
        for j in range(rows.shape[1]):
            total += rows[row, j] * np.float32(0.0)
        if total != 0.0:
            return row
    return -1


def first_not_finite(rows: Tensor) -> int:
    """The first row of detached floating rows [n, d] with an infinity or NaN, or -1."""
    # For one row PyTorch's own check and .item() take 10 us, which is what a good selector needs for its answer.
    if type(rows) is Tensor and rows.is_cpu and rows.dtype == torch.float32 and rows.is_contiguous():
        return int(_scan_finite(rows.numpy()))
    bad = (~torch.isfinite(rows).all(dim=1)).nonzero()
    return int(bad[0]) if bad.numel() else -1


def check_finite(name: str, rows: Tensor) -> None:
    """Raise ValueError if floating rows [tokens, d] hold infinity or NaN; names the first such token."""
    bad = first_not_finite(rows.detach() if rows.requires_grad else rows)
    if bad >= 0:
        raise ValueError(f"{name} must be finite, got infinity or NaN for token {bad}")


def check_range(ids: Tensor, num_rows: int) -> int:
    """How many ids are not pads. Raises IndexError for an id outside 0..num_rows-1 that is not -1."""
    if ids.is_cpu:
        flat = ids.detach().contiguous().view(-1).numpy()
        position, valid = scan_ids(flat, num_rows)
        bad = int(flat[position]) if position >= 0 else None
    else:
        outside = ids[(ids < -1) | (ids >= num_rows)]
        valid = int((ids >= 0).sum())
        bad = int(outside[0]) if outside.numel() else None
    if bad is not None:
        raise IndexError(f"ids must be in 0..{num_rows - 1}, or -1 for a pad, got {bad}")
    return valid


def check_rows(rows: Tensor, scale: Tensor | None, bias: Tensor | None = None) -> None:
    """Raise TypeError or ValueError unless rows is [num_rows, d] with fitting scale and bias [num_rows]."""
    if rows.dim() != 2:
        raise ValueError(f"rows must be [num_rows, d], got {list(rows.shape)}")
    if rows.dtype not in FLOATS and rows.dtype != torch.int8:
        raise TypeError(f"rows must be float32, bfloat16, int8 or float64, got {rows.dtype}")
    if scale is not None and rows.dtype != torch.int8:
        raise ValueError(f"scale goes with int8 rows only, got rows of {rows.dtype}")
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None and (vector.dim() != 1 or vector.shape[0] != rows.shape[0]):
            raise ValueError(f"{name} must be [num_rows] = [{rows.shape[0]}], got {list(vector.shape)}")
        if vector is not None and vector.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {vector.dtype}")


def check_ids(ids: Tensor, tokens: int) -> None:
    """Raise TypeError or ValueError unless ids is int64 [tokens, k]."""
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[0] != tokens:
        raise ValueError(f"ids must be [tokens, k] with tokens = {tokens}, got {list(ids.shape)}")


def check_matrix(name: str, value: Tensor, width: int | None = None) -> None:
    """Raise TypeError or ValueError unless ``value`` is a floating [tokens, width]."""
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float64, got {value.dtype}")
    if value.dim() != 2 or (width is not None and value.shape[1] != width):
        raise ValueError(f"{name} must be [tokens, {'d' if width is None else width}], got {list(value.shape)}")


def not_for_numba(*tensors: Tensor | None, contiguous: tuple[Tensor, ...] = ()) -> str | None:
    """Why the Numba kernels cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return "float64 is served by the reference"
    for tensor in contiguous:
        if not tensor.is_contiguous():
            return f"rows of strides {tuple(tensor.stride())} are not contiguous"
    return None
