"""What a selector hands on: which units run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Which units run, for each token.

    Attributes:
        ids: int64, [tokens, k] with -1 for a pad, or [k] where all tokens share the same units.
        num_units: how many units there are to choose from.
        weights: floating [tokens, k], how much each unit counts, or None for all alike.

    Raises TypeError or ValueError if shapes or dtypes do not fit. The values of ids are not looked at: the operators
    that read them check their range.
    """

    ids: Tensor
    num_units: int
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64, got {self.ids.dtype}")
        if self.ids.dim() not in (1, 2):
            raise ValueError(f"ids must be [tokens, k] or [k], got {list(self.ids.shape)}")
        if self.num_units < 0:
            raise ValueError(f"num_units must not be negative, got {self.num_units}")
        if self.weights is not None and (self.weights.shape != self.ids.shape or self.ids.dim() != 2):
            raise ValueError(
                f"weights must be [tokens, k] like ids, got {list(self.weights.shape)} for {list(self.ids.shape)}"
            )
        if self.weights is not None and not self.weights.is_floating_point():
            raise TypeError(f"weights must be floating, got {self.weights.dtype}")

    @property
    def shared(self) -> bool:
        """True if all tokens use the same units, ids [k]."""
        return self.ids.dim() == 1

    @property
    def k(self) -> int:
        """How many places each token has, pads included."""
        return self.ids.shape[-1]

    def per_token(self, tokens: int) -> Tensor:
        """ids as [tokens, k]; a view where they are shared. Raises ValueError for another number of tokens."""
        if self.shared:
            return self.ids.expand(tokens, -1)
        if self.ids.shape[0] != tokens:
            raise ValueError(f"the selection is for {self.ids.shape[0]} tokens, got {tokens}")
        return self.ids
