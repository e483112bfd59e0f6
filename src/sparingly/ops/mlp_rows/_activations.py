"""Activations of units and their derivatives, as PyTorch functions and, by number, inside compiled code."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparingly.ops._numba import inlined


def _of_relu(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _of_gelu(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * density


def _of_silu(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


Function = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "relu": (F.relu, _of_relu),
    "gelu": (F.gelu, _of_gelu),
    "silu": (F.silu, _of_silu),
}
"""Name -> (function, its derivative), both elementwise."""
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_ROOT_HALF, _DENSITY = np.float32(0.5**0.5), np.float32((2 * math.pi) ** -0.5)
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1.0), np.float32(0.0)


@inlined
def activate(number, x):
    """The activation of that number at float32 x."""
    if number == 0:
        return _ZERO if x < _ZERO else x
    if number == 1:
        return _HALF * x * (_ONE + np.float32(math.erf(x * _ROOT_HALF)))
    return x / (_ONE + np.float32(math.exp(-x)))


@inlined
def slope(number, x):
    """Its derivative at float32 x."""
    if number == 0:
        return _ONE if x > _ZERO else _ZERO
    if number == 1:
        density = _DENSITY * np.float32(math.exp(-_HALF * x * x))
        return _HALF * (_ONE + np.float32(math.erf(x * _ROOT_HALF))) + x * density
    gate = _ONE / (_ONE + np.float32(math.exp(-x)))
    return gate * (_ONE + x * (_ONE - gate))
