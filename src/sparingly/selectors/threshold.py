"""Run the units whose activation, or input, is large enough to matter."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from sparingly.selection import Selection
from sparingly.selectors.base import Selector, check_bank

S = TypeVar("S", bound=Selector)

SETTINGS = tuple(range(5, 101, 5))
"""Percentages of values that may be kept."""

SAMPLED = 1 << 18
"""Values that quantiles are taken from at most: they are then right to a tenth of a percentage point."""

_FLOOR = 1e-12


class Float32Fit(Selector):
    """A selector for trained weights: its fit stays float32 in a cast."""

    def _apply(self, fn: Any, recurse: bool = True) -> Selector:
        """As a module does, but floating buffers keep their dtype."""
        # Not named_buffers(), which names a tensor once that stands under two names (centre and middles).
        buffers = self._buffers.items()
        before = {name: value for name, value in buffers if value is not None and value.is_floating_point()}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self


class Threshold(Float32Fit):
    """Units whose activation is at least ``threshold`` in absolute value.

    For the hidden layer of a trained MLP: the activation (the gate's, where there is one) is computed for every unit,
    the other matrices only for those that pass. Without a ``threshold`` it takes one from calibration:

    * A setting is the percentage of activations that pass there, and each activation counts with its unit's
      ``importance`` (what it moves; the norm of its row unless told better), so that one number serves all units.
    * A unit that does not run counts as its ``centre``, the middle of the shortest interval that holds half of its
      activations, and what is cut are activations near to it. The smooth activations of today's networks lie around a
      value of their own rather than around zero (silu of a negative number is one), and a constant costs nothing. On
      layers 10 and 22 of SmolLM2 this leaves a quarter to a half of the error at the same bytes.
    * In a gated layer what a unit adds is known once its row of ``up`` has been read: a second cut then spares the row
      of ``down``, 8 to 11 % of both at the same loss.

    Args:
        threshold: not negative; 0 keeps every unit. None: found by ``sparingly.calibrate``; until then every unit runs.

    Attributes:
        cut: float32 [num_units], a unit runs unless its activation is nearer than this to its centre; empty before a
            fit.
        centre: float32 [num_units], what a unit that does not run counts as; empty for zero.
        cut_out: float32 [num_units], the second cut, on activation times factor; empty for none.

    Lee, Lee, Zhang, Tiwari, Mirhoseini, CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models,
    COLM 2024, section 4; the importance is that of Chen et al., WINA, 2025, section 3.2::

        @inproceedings{lee2024cats, title={CATS: Context-Aware Thresholding for Sparsity in Large Language Models},
          author={Lee, Donghyun and Lee, Jaeyong and Zhang, Genghan and Tiwari, Mo and Mirhoseini, Azalia},
          booktitle={COLM}, year={2024}}
        @article{chen2025wina, title={WINA: Weight Informed Neuron Activation for Accelerating Large Language Model
          Inference}, author={Chen, Sihan and Zhao, Dan and Ko, Jongwoo and Banbury, Colby and Zhuang, Huiping and
          Liang, Luming and Chen, Tianyi}, journal={arXiv:2505.19427}, year={2025}}
    """

    cut: Tensor
    centre: Tensor
    cut_out: Tensor
    importance: Tensor
    importance_out: Tensor
    quantiles: Tensor
    middles: Tensor

    def __init__(self, threshold: float | None = None):
        super().__init__()
        given = threshold is not None
        if given and not (isinstance(threshold, (int, float)) and 0 <= threshold < float("inf")):
            raise ValueError(f"threshold must be a number from 0, or None, got {threshold!r}")
        self.threshold = threshold
        for name in ("cut", "centre", "cut_out", "importance", "importance_out", "quantiles", "middles"):
            self.register_buffer(name, torch.empty(0))
        self._setting = 100

    @property
    def fitted(self) -> bool:
        """True once there is a threshold for each unit."""
        return self.cut.numel() > 0

    def prepare(self, num_units: int, device: torch.device | None = None) -> None:
        """Serve so many units with the ``threshold`` given; without one nothing changes."""
        if self.threshold is not None:
            self.cut = torch.full((num_units,), self.threshold, dtype=torch.float32, device=device)
            self.num_units = num_units

    @torch.no_grad()
    def fit(
        self,
        bank: Tensor,
        bias: Tensor | None = None,
        hidden: Tensor | None = None,
        importance: Tensor | None = None,
        importance_out: Tensor | None = None,
    ) -> None:
        """Learn how activations are spread.

        Args:
            bank: [num_units, d], a unit's row: what its activation is multiplied with.
            hidden: [n, num_units], finite activations; needed unless there is a ``threshold``.
            importance: float [num_units], not negative: what a unit's activation moves; None: the rows' norms.
            importance_out: [num_units], what its activation times its factor moves, for a second cut; None: no such.

        Raises ValueError or TypeError if they do not fit; the old fit then stays.
        """
        check_bank(bank, bias)
        units = bank.shape[0]
        if self.threshold is not None:
            self.prepare(units, bank.device)
            return
        if hidden is None or hidden.dim() != 2 or hidden.shape[1] != units or not hidden.shape[0]:
            got = None if hidden is None else list(hidden.shape)
            raise ValueError(f"hidden must be activations [n, {units}] with at least one token, got {got}")
        factors = bank.detach().float().norm(dim=1) if importance is None else importance.detach().float()
        factors_out = torch.empty(0) if importance_out is None else importance_out.detach().float()
        for given in (factors, factors_out):
            if (given.numel() and given.shape != (units,)) or not bool((torch.isfinite(given) & (given >= 0)).all()):
                raise ValueError(f"importance must be finite and not negative [{units}], got {list(given.shape)}")
        values = hidden.detach().float()
        if not bool(torch.isfinite(values).all()):
            raise ValueError("hidden must be finite, got infinity or NaN")
        middles = _middles(values)
        least = float(factors.max()) * 1e-6 + _FLOOR
        factors, factors_out = factors.clamp_min(least), factors_out.clamp_min(least)
        self.settle((values - middles).abs_().mul_(factors), factors, factors_out, middles)

    @torch.no_grad()
    def settle(self, sizes: Tensor, importance: Tensor, importance_out: Tensor, middles: Tensor) -> None:
        """Take what a fit found: what the first cut goes by, any shape, of which the quantiles are, and for each unit
        its importances (positive, or empty for no second cut) and its centre (empty for zero)."""
        sizes = sizes.flatten()
        if sizes.numel() > SAMPLED:
            chosen = torch.randint(sizes.numel(), (SAMPLED,), generator=torch.Generator().manual_seed(0))
            sizes = sizes[chosen.to(sizes.device)]
        ordered = sizes.sort().values
        # torch.quantile takes 16 million values at most.
        places = (torch.linspace(0, 1, 101, dtype=torch.float64) * (ordered.numel() - 1)).round().long()
        self.quantiles, self.middles = ordered[places.to(ordered.device)], middles
        self.importance, self.importance_out = importance, importance_out
        self.num_units = importance.shape[0]
        self.setting = self._setting

    @property
    def setting(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Percentage of activations that pass, 0..100; 100 lets all of them pass."""
        return self._setting

    @setting.setter
    def setting(self, percent: int) -> None:
        if not 0 <= percent <= 100:
            raise ValueError(f"setting must be a percentage in 0..100, got {percent}")
        self._setting = int(percent)
        if self.threshold is not None or not self.quantiles.numel():
            return
        if percent == 100:
            self.cut = torch.zeros_like(self.importance)
            self.centre = self.cut_out = self.cut[:0]
        else:
            size = self.quantiles[100 - int(percent)]
            self.cut, self.cut_out = size / self.importance, size / self.importance_out
            self.centre = self.middles

    def settings(self) -> list[int]:
        """Percentages, cheapest first; none where the threshold was given."""
        return [] if self.threshold is not None else list(SETTINGS)

    def centred(self, values: Tensor) -> Tensor:
        """values [..., num_units] less what units that do not run count as."""
        return values - self.centre if self.centre.numel() else values

    def sizes(self, values: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """values [..., num_units] -> what the first cut goes by, and what both together go by, of a fit from data."""
        centred = (values - self.middles).abs()
        first = centred * self.importance
        return first, first if factor is None else torch.minimum(first, (centred * factor).abs() * self.importance_out)

    def levels(self) -> Tensor:
        """The sizes at which :meth:`settings` cut, from the dearest to the cheapest, so that they rise; float32."""
        return self.quantiles[[100 - setting for setting in reversed(self.settings())]]

    def keeps(self, values: Tensor, factor: Tensor | None = None) -> Tensor:
        """values [..., num_units] -> bool of the same shape: which run. NaN always does, so that it shows.

        factor: [..., num_units], what they are multiplied with in a gated layer, for the second cut.
        """
        centred = self.centred(values)
        kept = ~(centred.abs() < self.cut)
        if factor is not None and self.cut_out.numel():
            kept &= ~((centred * factor).abs() < self.cut_out)
        return kept

    def masked(self, values: Tensor, factor: Tensor | None = None) -> Tensor:
        """values [..., num_units] with the centre in the place of what is not kept; arguments as :meth:`keeps`."""
        return torch.where(
            self.keeps(values, factor), values, self.centre.to(values.dtype) if self.centre.numel() else 0.0
        )

    def select(self, hidden: Tensor) -> Selection:
        """hidden [tokens, num_units], the activations -> ids [tokens, most that any token keeps], -1 is a pad."""
        self.check_fitted()
        keep = self.keeps(hidden)
        counts = keep.sum(dim=1)
        k = int(counts.max()) if counts.numel() else 0
        ids = torch.full((hidden.shape[0], k), -1, dtype=torch.int64, device=hidden.device)
        token, unit = keep.nonzero(as_tuple=True)
        place = torch.arange(token.shape[0], device=token.device) - (counts.cumsum(0) - counts)[token]
        ids[token, place] = unit
        return Selection(ids, self.num_units)

    def config(self) -> dict[str, Any]:
        """``threshold``."""
        return {"threshold": self.threshold}


class InputThreshold(Threshold):
    """Input channels of a linear layer that are at least ``threshold`` in absolute value.

    For any linear layer: a channel that does not pass leaves its column of the weights unread, for which the weights
    lie input-major. Options as in :class:`Threshold`.

    Liu, Ponnusamy, Cai, Guo, Kim, Athiwaratkun, Training-Free Activation Sparsity in Large Language Models (TEAL),
    ICLR 2025, section 4::

        @inproceedings{liu2025teal, title={Training-Free Activation Sparsity in Large Language Models},
          author={Liu, James and Ponnusamy, Pragaash and Cai, Tianle and Guo, Han and Kim, Yoon and Athiwaratkun, Ben},
          booktitle={ICLR}, year={2025}}
    """


class Zeros(Threshold):
    """Units whose activation is not zero: lossless for activations with exact zeros (ReLU and its relatives).

    Values below the smallest normal number (1.2e-38) count as zero. Mirzadeh et al., ReLU Strikes Back, ICLR 2024::

        @inproceedings{mirzadeh2024relu, title={ReLU Strikes Back: Exploiting Activation Sparsity in Large Language
          Models}, author={Mirzadeh, Iman and Alizadeh, Keivan and Mehta, Sachin and Del Mundo, Carlo C and Tuzel,
          Oncel and Samei, Golnoosh and Rastegari, Mohammad and Farajtabar, Mehrdad}, booktitle={ICLR}, year={2024}}
    """

    def __init__(self) -> None:
        super().__init__(torch.finfo(torch.float32).tiny)

    def config(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def _middles(values: Tensor) -> Tensor:
    """values [n, units] -> for each unit the middle of the shortest interval that holds half of its values."""
    ordered = values.sort(dim=0).values
    half = max(1, values.shape[0] // 2)
    first = (ordered[half - 1 :] - ordered[: values.shape[0] - half + 1]).argmin(dim=0, keepdim=True)
    return (ordered.gather(0, first) + ordered.gather(0, first + half - 1))[0] / 2
