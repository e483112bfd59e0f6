"""What a product of groups of rows does, each group with a matrix of its own: how PyTorch runs experts of a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def grouped_mm(values: Mapping[str, Any]) -> tuple[int, int, int]:
    """Arguments of ``aten::_grouped_mm`` by name -> (MACs, 0 other operations, bytes read).

    With rows [n, in] and matrices [groups, in, out], a group ends before row ``offs[group]``; a group without rows
    reads nothing of its matrix. With two matrices (the gradient of such matrices) groups are parts of the inner
    dimension; three dimensions each are a batch.
    """
    left, right, ends = values["self"], values["mat2"], values.get("offs")
    if left.dim() == 2 and right.dim() == 3 and ends is not None:
        rows = ends.diff(prepend=ends.new_zeros(1)).clamp_min(0)
        read = _size(left) + _size(right) * int((rows > 0).sum()) // right.shape[0] + _size(ends)
        return int(rows.sum()) * right.shape[1] * right.shape[2], 0, read
    read = _size(left) + _size(right) + (0 if ends is None else _size(ends))
    return left.numel() * right.shape[-1], 0, read


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
