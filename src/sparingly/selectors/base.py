"""The selector: decides, for each token, which units run, for far less than running them would cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparingly.ops import topk_rows
from sparingly.ops._arrays import FLOATS
from sparingly.selection import Selection
from sparingly.selectors._exact import exact_topk

S = TypeVar("S", bound="Selector")

FIT_KEY = "fitted_units"
"""Name of the buffer that says for how many units a selector was fitted; present in every selector's state."""


class Selector(nn.Module, ABC):
    """Chooses units of a bank.

    A selector keeps what :meth:`fit` learned in registered buffers (or parameters), so that ``.to()``,
    ``state_dict``, ``deepcopy`` and safetensors work; buffers may change shape with a fit, and take the shape of a
    state that is loaded. A subclass sets ``self.num_units`` as the last act of its ``fit``, so that a fit that failed
    leaves the old one in place.

    Attributes:
        num_units: how many units the last fit saw; -1 before.
        setting: how hard to look, one of :meth:`settings`; dearer ones find more.
    """

    setting: int = 0
    fitted_units: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(FIT_KEY, torch.tensor(-1, dtype=torch.int64))

    @property
    def num_units(self) -> int:
        """How many units the last fit saw; -1 before."""
        return int(self.fitted_units)

    @num_units.setter
    def num_units(self, value: int) -> None:
        self.fitted_units.fill_(value)

    @property
    def fitted(self) -> bool:
        """True after :meth:`fit`, or after loading the state of a fitted selector."""
        return self.num_units >= 0

    @abstractmethod
    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        """Fit to a bank [num_units, d], any float dtype, and its bias [num_units].

        hidden: finite [n, d], inputs like those to come; selectors that have no use for them ignore them.

        Raises ValueError or TypeError for a bad bank (see :func:`check_bank`); the old fit then stays.
        """

    @abstractmethod
    def select(self, hidden: Tensor) -> Selection:
        """hidden [tokens, d] -> which units run. Raises RuntimeError before a fit."""

    def select_from(self, hidden: Tensor, bank: Tensor, bias: Tensor | None) -> Selection:
        """:meth:`select`, with the bank [num_units, d] and bias [num_units] at hand, for those that look at them."""
        return self.select(hidden)

    @property
    def width(self) -> int:
        """How many places a token's selection has, ids [tokens, width]; those of :attr:`setting` units unless said."""
        return self.setting

    def topk(
        self, hidden: Tensor, bank: Tensor, bias: Tensor | None, k: int, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k best units among those selected: scores [tokens, k] float32, classes [tokens, k] int64, best first.

        hidden [tokens, d], bank [num_units, d], bias [num_units] float32, scale [num_units] float32 for int8 rows.
        Where fewer than k units were selected, the rest is (-inf, -1).
        """
        selection = self.select(hidden)
        if not selection.shared:
            return topk_rows(hidden, bank, selection.ids, k, scale, bias)
        ids = selection.ids[selection.ids >= 0]
        pick = [None if vector is None else vector[ids] for vector in (bias, scale)]
        scores, places = exact_topk(hidden, bank[ids], pick[0], min(k, ids.shape[0]), pick[1])
        missing = (0, k - scores.shape[1])
        pad = nn.functional.pad
        return pad(scores, missing, value=float("-inf")), pad(ids[places], missing, value=-1)

    def negatives(self, hidden: Tensor, target: Tensor, count: int) -> Tensor | None:
        """Up to ``count`` hard negatives that the batch shares, int64 [<= count], repeats allowed; None: has none.

        hidden [tokens, d], detached; target [tokens, m], int64, -1 is a pad.
        """
        return None

    def routing_loss(self, hidden: Tensor, target: Tensor) -> Tensor | None:
        """What the selector itself learns from a training step, a scalar that is added to the loss; None: nothing.

        hidden [tokens, d], detached; target [tokens, m], int64, -1 is a pad.
        """
        return None

    def revive(self, used: Tensor) -> Tensor:
        """Make units findable that never run, beside units that do.

        used: bool [num_units], which ones ran lately. Returns int64 [num_units]: for a unit that can be found now the
        one whose place in the choice it shares, -1 for all others. Selectors that cannot do it change nothing.
        """
        return torch.full_like(used, -1, dtype=torch.int64)

    def settings(self) -> list[int]:
        """Values that :attr:`setting` may take, cheapest first; empty if there is nothing to choose."""
        return []

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor, and ``setting``; holds only what JSON can."""

    @classmethod
    def from_config(cls: type[S], config: dict[str, Any]) -> S:
        """A new, unfitted selector like the one that gave :meth:`config`."""
        arguments = dict(config)
        setting = arguments.pop("setting", None)
        selector = cls(**arguments)
        if setting is not None:
            selector.setting = setting
        return selector

    def check_fitted(self) -> None:
        """Raise RuntimeError unless the selector is fitted."""
        if not self.fitted:
            raise RuntimeError(f"{type(self).__name__} is not fitted; call fit(bank), or refresh() of its head, first")

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.config().items())
        return f"{options}, num_units={self.num_units}".removeprefix(", ")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take on the sizes of the state first: how large a fit is depends on what it was fitted to."""
        for name, buffer in list(self.named_buffers()):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape != buffer.shape:
                owner, _, leaf = name.rpartition(".")
                self.get_submodule(owner)._buffers[leaf] = buffer.new_empty(value.shape)
        for name, parameter in self.named_parameters():
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or value.dim() != parameter.dim() or value.dim() == 0:
                continue
            # How many groups there are may come from a fit; how wide their rows are may not.
            if value.shape[0] != parameter.shape[0] and value.shape[1:] == parameter.shape[1:]:
                parameter.data = parameter.data.new_empty(value.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_count(name: str, value: int) -> int:
    """The value. Raises ValueError unless it is a whole number from 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
    return value


def check_bank(bank: Tensor, bias: Tensor | None = None) -> None:
    """Raise unless bank is a finite floating [num_units, d] with at least one unit, and bias a finite [num_units].

    One pass over the bank. ValueError names the first bad unit; TypeError the dtype.
    """
    if bank.dtype not in (*FLOATS, torch.float16):
        raise TypeError(f"bank must be float32, bfloat16, float16 or float64, got {bank.dtype}")
    if bank.dim() != 2 or bank.shape[0] < 1:
        raise ValueError(f"bank must be [num_units, d] with at least one unit, got {list(bank.shape)}")
    if bias is not None and bias.shape != bank.shape[:1]:
        raise ValueError(f"bias must be [num_units] = [{bank.shape[0]}], got {list(bias.shape)}")
    for name, value in () if bank.is_meta else (("bank", bank), ("bias", bias)):
        # A sum is finite only if every term is; it may overflow though, so a bad sum is only a reason to look.
        if value is not None and not torch.isfinite(value.detach().float().sum()):
            good = torch.isfinite(value.detach()).reshape(value.shape[0], -1).all(dim=1)
            if not good.all():
                raise ValueError(f"{name} must be finite, got infinity or NaN for unit {int((~good).nonzero()[0])}")
