"""Controls: every unit, chance, and the truly best units. A claim for a selector stands beside all three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparingly.selection import Selection
from sparingly.selectors._exact import exact_topk
from sparingly.selectors.base import Selector, check_bank


def stratified(num_units: int, count: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """``count`` distinct random ids of ``num_units`` in rising order, int64 [*shape, count].

    One from each of ``count`` ranges of (nearly) equal width, so that nothing needs sorting or rejecting; the chance
    of a unit is 1 / (width of its range), see :func:`inclusion`.
    """
    bounds = _floor(torch.arange(count + 1, device=device) * num_units, count)
    # Numbers up to 2^63 modulo a width: not a whole multiple of it, but nobody could see the difference.
    place = torch.empty(*shape, count, dtype=torch.int64, device=device).random_()
    return place.remainder_(bounds[1:] - bounds[:-1]).add_(bounds[:-1])


def inclusion(ids: Tensor, num_units: int, count: int) -> Tensor:
    """The chance of each id [n] to be among ``count`` of ``num_units`` :func:`stratified` ones, float32 [n]."""
    group = _floor((ids + 1) * count - 1, num_units)
    return 1.0 / (_floor((group + 1) * num_units, count) - _floor(group * num_units, count))


def _floor(value: Tensor, by: int) -> Tensor:
    return torch.div(value, by, rounding_mode="floor")


def _check_budget(budget: int) -> int:
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    return budget


class Dense(Selector):
    """Every unit: the exact answer at the dense cost. Needs no fit for :meth:`topk`, only for :meth:`select`."""

    @property
    def fitted(self) -> bool:
        """Always True: there is nothing to learn."""
        return True

    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        """Remember how many units there are. See :meth:`Selector.fit`."""
        check_bank(bank, bias)
        self.num_units = bank.shape[0]

    @property
    def width(self) -> int:
        """See :attr:`Selector.width`."""
        return self.num_units

    def select(self, hidden: Tensor) -> Selection:
        """hidden [tokens, d] -> ids [num_units], shared by all tokens."""
        if self.num_units < 0:
            raise RuntimeError("Dense does not know how many units there are; call fit(bank) first")
        return Selection(torch.arange(self.num_units, device=hidden.device), self.num_units)

    def topk(
        self, hidden: Tensor, bank: Tensor, bias: Tensor | None, k: int, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Selector.topk`; in blocks, straight from the bank."""
        return exact_topk(hidden, bank, bias, k, scale)

    def config(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class Random(Selector):
    """``budget`` random units for each token, drawn afresh each time: the floor at that budget."""

    def __init__(self, budget: int):
        super().__init__()
        self.budget = _check_budget(budget)

    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        """Remember how many units there are. See :meth:`Selector.fit`."""
        check_bank(bank, bias)
        self.num_units = bank.shape[0]

    @property
    def width(self) -> int:
        """See :attr:`Selector.width`."""
        return min(self.budget, self.num_units)

    def select(self, hidden: Tensor) -> Selection:
        """hidden [tokens, d] -> ids [tokens, budget], distinct within a token."""
        self.check_fitted()
        count = min(self.budget, self.num_units)
        return Selection(stratified(self.num_units, count, (hidden.shape[0],), hidden.device), self.num_units)

    def config(self) -> dict[str, Any]:
        """``budget``."""
        return {"budget": self.budget}


class Oracle(Selector):
    """The ``budget`` truly best units for each token: the ceiling at that budget.

    It cheats: it computes every score to find them, and the ledger shows that. For comparisons of quality only. It
    looks at the bank that it was fitted to itself, not at a copy, and has to be fitted again after loading.
    """

    bank: Tensor
    bias: Tensor | None

    def __init__(self, budget: int):
        super().__init__()
        self.budget = _check_budget(budget)
        self.register_buffer("bank", torch.empty(0, 0), persistent=False)
        self.register_buffer("bias", None, persistent=False)

    @property
    def fitted(self) -> bool:
        """True after :meth:`fit`; the bank is not part of the saved state."""
        return 0 < self.num_units == self.bank.shape[0]

    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        """Look at this bank from now on. See :meth:`Selector.fit`."""
        check_bank(bank, bias)
        self.bank, self.bias = bank.detach(), None if bias is None else bias.detach()
        self.num_units = bank.shape[0]

    @property
    def width(self) -> int:
        """See :attr:`Selector.width`."""
        return min(self.budget, self.num_units)

    def select(self, hidden: Tensor) -> Selection:
        """hidden [tokens, d] -> ids [tokens, budget], best first."""
        self.check_fitted()
        return self.select_from(hidden, self.bank, self.bias)

    @torch.no_grad()
    def select_from(self, hidden: Tensor, bank: Tensor, bias: Tensor | None) -> Selection:
        """The same of a bank [num_units, d] as it is now."""
        _, ids = exact_topk(hidden, bank, bias, self.width)
        return Selection(ids, self.num_units)

    def config(self) -> dict[str, Any]:
        """``budget``."""
        return {"budget": self.budget}
