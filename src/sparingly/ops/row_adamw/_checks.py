"""What must hold before the first row is written, and what a step puts on the ledger."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._arrays import FLOATS, first_not_finite
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import tensor_bytes

# Per element: decay 1, both moments 3 each beyond their MACs, root, two divisions, epsilon, update.
OTHER_PER_ELEMENT = 12


def check(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor, ids: Tensor, grad: Tensor) -> None:
    """Raise TypeError or ValueError unless shapes and dtypes fit."""
    if param.dim() != 2 or param.dtype not in FLOATS:
        raise ValueError(f"param must be floating [num_rows, d], got {param.dtype} {list(param.shape)}")
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if state.shape != param.shape or state.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 {list(param.shape)}, got {state.dtype} {list(state.shape)}")
    if steps.dtype != torch.int32 or steps.shape != param.shape[:1]:
        raise ValueError(f"steps must be int32 [{param.shape[0]}], got {steps.dtype} {list(steps.shape)}")
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"ids must be int64 [n], got {ids.dtype} {list(ids.shape)}")
    if grad.dtype not in FLOATS or grad.shape != (ids.shape[0], param.shape[1]):
        raise ValueError(
            f"grad must be floating [n, d] = [{ids.shape[0]}, {param.shape[1]}], got {grad.dtype} {list(grad.shape)}"
        )


@compiled
def _scan(ids, num_rows):
    """(a position out of range or -1, whether ids rise strictly)."""
    rising = True
    for position in range(ids.size):
        if ids[position] < 0 or ids[position] >= num_rows:
            return position, rising
        rising &= position == 0 or ids[position] > ids[position - 1]
    return -1, rising


def rises(ids: Tensor) -> bool:
    """True if each of ids [n] is larger than the one before, as the rows of a coalesced gradient are."""
    if ids.is_cpu:
        return bool(_scan(ids.detach().contiguous().numpy(), np.iinfo(np.int64).max)[1])
    return bool((ids[1:] > ids[:-1]).all())


def check_values(ids: Tensor, grad: Tensor, num_rows: int) -> None:
    """Raise IndexError for an id out of range, ValueError for one named twice or whose gradient is not finite.

    ids [n] int64, grad [n, d]. Ids that rise strictly, as those of a coalesced gradient do, need no sorting.
    """
    if ids.is_cpu:
        flat = ids.detach().contiguous().numpy()
        position, rising = _scan(flat, num_rows)
        bad = int(flat[position]) if position >= 0 else None
    else:
        outside = ids[(ids < 0) | (ids >= num_rows)]
        bad = int(outside[0]) if outside.numel() else None
        rising = rises(ids)
    if bad is not None:
        raise IndexError(f"ids must be in 0..{num_rows - 1}, got {bad}")
    if not rising:
        ordered = ids.sort().values
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if twice.numel():
            raise ValueError(f"ids must be unique, got {int(twice[0])} more than once; coalesce the gradient first")
    infinite = first_not_finite(grad.detach())
    if infinite >= 0:
        raise ValueError(
            f"grad must be finite, got infinity or NaN for row {int(ids[infinite])}; nothing was changed. "
            "Lower the learning rate or clip the gradient"
        )


def record(param: Tensor, exp_avg: Tensor, ids: Tensor, grad: Tensor) -> None:
    """Record one step: the rows, both moments and the counts are read and written, the gradient is read twice."""
    if not ledger.active():
        return
    rows = ids.shape[0] * param.shape[1]
    state = rows * (param.element_size() + 2 * exp_avg.element_size()) + ids.shape[0] * 4
    ledger.record(
        "sparingly::row_adamw_",
        dtype=param.dtype,
        macs=2 * rows,
        other=OTHER_PER_ELEMENT * rows,
        bytes_read=state + tensor_bytes(ids) + 2 * tensor_bytes(grad),
        bytes_written=state,
    )
