"""Rows rounded to int8 with a scale each."""

from __future__ import annotations

import torch
from torch import Tensor


def int8_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [rows, d] -> int8 [rows, d] and scale float32 [rows], row = scale * int8.

    Rounded to nearest, the largest element of each row to 127.
    """
    scale = values.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    return (values / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale
