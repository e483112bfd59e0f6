"""A bank whose rows are the weights themselves, or the weights rounded to int8 with a scale for each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = (None, "int8")
"""What selected units may run from: the weights as they are, or their rows in int8."""


class Bank(NamedTuple):
    """Rows as operators take them: ``scale * rows * outputs``, or without a scale ``rows`` themselves.

    ``rows`` [n, d], int8 where there is a ``scale`` float32 [n]; ``outputs`` float32 [d], or None for ones.
    """

    rows: Tensor
    scale: Tensor | None = None
    outputs: Tensor | None = None

    @classmethod
    def int8(cls, values: Tensor) -> Bank:
        """Floating [n, d], a row of which is one output's, as :func:`int8_rows`."""
        return cls(*int8_rows(values))

    @classmethod
    def int8_of_inputs(cls, values: Tensor) -> Bank:
        """Floating [n, d], a column of which is one output's: each is first brought to the same size.

        Outputs differ so much in size that a scale for each row of inputs alone rounds the small ones away: the layers
        of SmolLM2-135M lost 4.0 % of perplexity by that, and 0.4 % with a scale for each output too.
        """
        values = values.float()
        outputs = values.square().mean(dim=0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return cls(*int8_rows(values / outputs), outputs)

    def values(self, dtype: torch.dtype) -> Tensor:
        """[n, d] of ``dtype``, what the rows stand for; made anew by each call where they are int8."""
        if self.scale is None:
            return self.rows.to(dtype)
        wide = self.rows.to(torch.promote_types(dtype, torch.float32)).mul_(self.scale[:, None])
        return (wide if self.outputs is None else wide.mul_(self.outputs)).to(dtype)

    def begin(self, start: Tensor | None) -> Tensor | None:
        """What sums over rows begin with; see :meth:`end`."""
        return start if self.outputs is None else None

    def end(self, sums: Tensor, start: Tensor | None) -> Tensor:
        """Sums [tokens, d] over rows that began with :meth:`begin` -> those of what the rows stand for, and start."""
        if self.outputs is None:
            return sums
        return sums.mul_(self.outputs) if start is None else torch.addcmul(start, sums, self.outputs)


def int8_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Floating [n, d] -> int8 [n, d] and scale float32 [n], row = scale * int8.

    Rounded to nearest, the largest element of each row to 127.
    """
    values = values.float()
    scale = values.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    return (values / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def check_kind(kind: str | None) -> None:
    """Raise ValueError unless there are such rows."""
    if kind not in KINDS:
        raise ValueError(f"rows must be None (the weights as they are) or 'int8', got {kind!r}")


def row_bytes(width: int, weight: Tensor, kind: str | None) -> int:
    """Bytes of one row of ``width`` values: as in ``weight``, or int8 with its scale."""
    return width * weight.element_size() if kind is None else width + torch.float32.itemsize
