"""Tensors' memory as arrays inside compiled code, from plain addresses.

Turning a tensor into a NumPy array takes 0.7-1.2 us in Python, and an operator has six of them; an address takes
0.1 us. Whoever passes addresses keeps the tensors alive until the compiled call has returned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import register_jitable
from numba.np.numpy_support import carray
from torch import Tensor

from sparingly.ops._numba import intrinsic

# An empty array of the elements that a tensor's memory holds; tells compiled code their type. bfloat16 as its bits.
LIKE: dict[torch.dtype, Any] = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.int8: np.empty(0, np.int8),
}


# Fresh tensors name their device: compiled code must not be handed the address of one made under another default.
CPU = torch.device("cpu")


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """Where the first elements of contiguous CPU tensors lie; 0 for None.

    RuntimeError for a tensor that has no memory of its own (sparse) or stands for the negative of what it holds.
    """
    found = tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
    if any([tensor is not None and tensor.is_neg() for tensor in tensors]):
        raise RuntimeError("a tensor has its negative bit set; give it as tensor.resolve_neg()")
    return found


def packed(vector: Tensor | None) -> Tensor | None:
    """The vector with its elements side by side in memory."""
    return None if vector is None else vector.contiguous()


@intrinsic
def _pointer(typingctx, number):
    if not isinstance(number, types.Integer):
        return None

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), codegen


@register_jitable
def matrix_at(number, rows, columns, dtype):
    """The [rows, columns] elements at an address."""
    return carray(_pointer(number), (rows, columns), dtype)


@register_jitable
def vector_at(number, size, dtype):
    """The ``size`` elements at an address; none at address 0, which stands for a vector that is not there."""
    return carray(_pointer(number), (size if number else 0,), dtype)
