"""A cheap low-rank guess of which hidden units will be active, so that none of their matrices is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparingly.selection import Selection
from sparingly.selectors._weights import WeightFit
from sparingly.selectors.base import check_bank, check_count
from sparingly.selectors.threshold import SETTINGS

_RIDGE = 1e-4


class LowRank(WeightFit):
    """The units whose guessed activation is largest, a fixed share of them for each token.

    The guess is a regression of rank ``rank`` of the units' pre-activations on the input. They are a linear function
    of it, so the best one has a closed form: the singular vectors of W C^(1/2), where C is the inputs' second moment
    (reduced-rank regression; Izenman, Journal of Multivariate Analysis 1975). A setting is the percentage of units
    that run.

    Args:
        rank: at least 1. It costs rank * (in_features + num_units) MACs per token.

    Predicting the active units of a trained network: Liu, Wang, Dao, Zhou, Yuan, Song, Shrivastava, Zhang, Tian, Re,
    Chen, Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time, ICML 2023; from the SVD of the weights:
    Davis, Arel, Low-Rank Approximations for Conditional Feedforward Computation in Deep Neural Networks, 2013::

        @inproceedings{liu2023dejavu, title={Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time},
          author={Liu, Zichang and Wang, Jue and Dao, Tri and Zhou, Tianyi and Yuan, Binhang and Song, Zhao and
          Shrivastava, Anshumali and Zhang, Ce and Tian, Yuandong and Re, Christopher and Chen, Beidi},
          booktitle={ICML}, year={2023}}
    """

    inward: Tensor
    outward: Tensor
    offset: Tensor
    importance: Tensor

    def __init__(self, rank: int = 32):
        super().__init__()
        self.rank = check_count("rank", rank)
        self._setting = 100
        # [in_features, rank], [rank, num_units], [num_units], [num_units]
        for name, shape in (("inward", (0, 0)), ("outward", (0, 0)), ("offset", (0,)), ("importance", (0,))):
            self.register_buffer(name, torch.empty(shape))
        # In a tuple: a module of the network must not become a part of its selector too.
        self._activation: tuple[Callable[[Tensor], Tensor] | None] = (None,)

    @property
    def setting(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Percentage of units that run, 0..100; at least one does."""
        return self._setting

    @setting.setter
    def setting(self, percent: int) -> None:
        if not isinstance(percent, int) or not 0 <= percent <= 100:
            raise ValueError(f"setting must be a percentage in 0..100, got {percent!r}")
        self._setting = percent

    @property
    def activation(self) -> Callable[[Tensor], Tensor] | None:
        """By what units rank; not part of the state, see :meth:`rank_by`."""
        return self._activation[0]

    def rank_by(self, activation: Callable[[Tensor], Tensor] | None) -> None:
        """Rank units by |activation(guess)| from now on; for whoever loads a state."""
        self._activation = (activation,)

    @property
    def fitted(self) -> bool:
        """True after a fit."""
        return self.outward.numel() > 0

    @torch.no_grad()
    def fit(
        self,
        bank: Tensor,
        bias: Tensor | None = None,
        hidden: Tensor | None = None,
        importance: Tensor | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Fit the regression.

        Args:
            bank: [num_units, in_features], the rows that give the pre-activations, and their bias.
            hidden: finite [n, in_features], inputs like those to come; None: all directions count alike.
            importance: [num_units], how much a unit's activation moves; None: all alike.
            activation: elementwise; units rank by |activation(guess)| times importance. None: by the guess itself.

        Raises ValueError or TypeError if they do not fit; the old fit then stays.
        """
        check_bank(bank, bias)
        weight = bank.detach().double()
        units, width = weight.shape
        if hidden is not None and (hidden.dim() != 2 or hidden.shape[1] != width or not hidden.shape[0]):
            raise ValueError(f"hidden must be [n, {width}] with at least one token, got {list(hidden.shape)}")
        factors = torch.ones(units, device=weight.device) if importance is None else importance.detach().float()
        if factors.shape != (units,) or not bool((torch.isfinite(factors) & (factors >= 0)).all()):
            raise ValueError(f"importance must be finite and not negative [{units}], got {list(factors.shape)}")
        moment = torch.eye(width, dtype=torch.float64, device=weight.device)
        if hidden is not None:
            inputs = hidden.detach().double()
            if not bool(torch.isfinite(inputs).all()):
                raise ValueError("hidden must be finite, got infinity or NaN")
            moment = inputs.t() @ inputs / inputs.shape[0]
            # The least is there for inputs that are all zero.
            moment.diagonal().add_(max(_RIDGE * float(moment.diagonal().mean()), 1e-30))
        values, vectors = torch.linalg.eigh(moment)
        root = vectors * values.clamp_min(0).sqrt() @ vectors.t()
        # The best guess of W x of rank r is U U' W x, U the first left singular vectors of W C^(1/2).
        left = torch.linalg.svd(weight @ root, full_matrices=False).U[:, : self.rank]
        self.inward = (left.t() @ weight).t().float().contiguous()
        self.outward = left.t().float().contiguous()
        self.offset = self.outward.new_zeros(units) if bias is None else bias.detach().float().clone()
        self.importance = factors
        self.rank_by(activation)
        self.remember(bank, bias)
        self.num_units = units

    def select(self, hidden: Tensor) -> Selection:
        """hidden [tokens, in_features] -> ids [tokens, setting % of the units], in rising order."""
        self.check_fitted()
        units = self.outward.shape[1]
        k = max(1, round(units * self.setting / 100))
        if k == units:
            return Selection(torch.arange(units, device=hidden.device), units)
        guess = torch.addmm(self.offset, hidden.float() @ self.inward, self.outward)
        if self.activation is not None:
            guess = self.activation(guess).abs()
        ids = (guess * self.importance).topk(k, dim=1, sorted=False).indices
        return Selection(ids.sort(dim=1).values, units)

    def settings(self) -> list[int]:
        """Percentages of units that run, cheapest first."""
        return list(SETTINGS)

    def config(self) -> dict[str, Any]:
        """``rank``."""
        return {"rank": self.rank}
