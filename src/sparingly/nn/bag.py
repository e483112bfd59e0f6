"""A bag of selected rows: an embedding whose training touches only the rows that were used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparingly.ops import gather_accumulate


class SelectiveBag(nn.Module):
    """Sum of the selected rows of a table, divided by the root of their number.

    The root keeps the variance of the output the same for few and many rows.

    Args:
        num_rows: how many rows the table has.
        dim: their width.

    Attributes:
        weight: [num_rows, dim]. Starts normal with a standard deviation of 1 / sqrt(dim).
    """

    def __init__(
        self, num_rows: int, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        if num_rows < 1 or dim < 1:
            raise ValueError(f"num_rows and dim must be at least 1, got {num_rows} and {dim}")
        self.num_rows, self.dim = num_rows, dim
        self.weight = nn.Parameter(torch.empty(num_rows, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [tokens, k], -1 is a pad -> [tokens, dim], float32; 0 where there are only pads.

        The gradient of ``weight`` is a coalesced sparse tensor of the rows that ids name. Raises IndexError for an id
        out of range, TypeError or ValueError for another dtype or shape.
        """
        if ids.dtype != torch.int64 or ids.dim() != 2:
            raise TypeError(f"ids must be int64 [tokens, k], got {ids.dtype} {list(ids.shape)}")
        share = (ids >= 0).sum(dim=1, keepdim=True).clamp_min(1).rsqrt()
        sparse = not torch.compiler.is_compiling()
        return gather_accumulate(share.expand(ids.shape).contiguous(), self.weight, ids, sparse_grad=sparse)

    def extra_repr(self) -> str:
        return f"{self.num_rows}, {self.dim}"
