"""Selectors whose fit holds for the weights that it was made from, and for no others."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.selectors.threshold import Float32Fit

_CASTS = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 4096
_SLACK = 2.0**-16
"""Of a row's length: float32 sums over 1,000 to 30,000 elements in another order differ by a tenth of it."""


class WeightFit(Float32Fit):
    """A selector that reads the weights when it is fitted, instead of when it selects.

    Attributes:
        fitted_to: float32 [3, num_units], a number for each row that it was fitted to, as it was and as a cast to
            bfloat16 or float16 leaves it; [3, 0] before a fit. In the state, so that copies and files know it.
    """

    fitted_to: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fitted_to", torch.empty(3, 0))

    @torch.no_grad()
    def remember(self, bank: Tensor, bias: Tensor | None) -> None:
        """Note the weights of a fit: bank [num_units, d], bias [num_units] or None."""
        self.fitted_to = torch.stack([_numbers(bank, bias, dtype)[0] for dtype in _CASTS])

    @torch.no_grad()
    def holds_for(self, bank: Tensor, bias: Tensor | None) -> bool:
        """True if these weights are those of the fit, or what a cast has made of them. One pass over the bank."""
        if self.fitted_to.shape[1] != bank.shape[0]:
            return False
        numbers, lengths = _numbers(bank, bias, torch.float32)
        return bool(((numbers - self.fitted_to).abs() <= _SLACK * lengths).all(dim=1).any())


def _numbers(bank: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row's sum with signs of its own for each column, and its length, as a cast leaves them; float32."""
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (bank.shape[1],), generator=generator) * 2 - 1).float().to(bank.device)
    found, lengths = [], []
    for place in range(0, bank.shape[0], _ROWS):  # A float32 copy of a whole bank may be too much.
        part = bank[place : place + _ROWS].to(dtype).float()
        offset = 0.0 if bias is None else bias[place : place + _ROWS].to(dtype).float()
        found.append(part @ signs + offset)
        lengths.append((part.square().sum(dim=1) + torch.as_tensor(offset).square()).sqrt())
    return torch.cat(found), torch.cat(lengths)
