"""A router over blocks of units, balanced by a bias instead of a loss. Learned with the net."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.selection import Selection
from sparingly.selectors._revive import near, partners
from sparingly.selectors.base import Selector, check_bank, check_count


class _Balance(torch.autograd.Function):
    """weights as they are; backward gives ``bias`` how much more or less each block is used than their mean."""

    @staticmethod
    def forward(weights: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, ids = inputs
        ctx.save_for_backward(ids)
        ctx.like = bias.shape[0], bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (ids,) = ctx.saved_tensors
        blocks, dtype = ctx.like
        load = torch.bincount(ids.flatten(), minlength=blocks).to(torch.float32)
        # As small as other gradients: clipping by the norm of all of them together must not see it.
        excess = (load / load.mean().clamp_min(1e-30) - 1) * (1e-4 / blocks)
        return grad, excess.to(dtype), None


class Experts(Selector):
    """The ``k`` blocks of a layer whose vectors fit the token best.

    Use it for fine-grained experts, ``SelectiveFFN(..., block=32)``: a choice costs ``num_blocks * d`` MACs, and the
    tokens of a batch that share a block read it once.

    Args:
        k: how many blocks each token runs. A block's weight is its share of the chosen ones' scores, times k.

    Attributes:
        setting: ``k``; a smaller one than in training runs fewer blocks.
        bias: [num_blocks], added to the scores for the choice only. Its gradient is not that of the loss: it is how
            much more than others a block was used, so that any optimiser moves busy blocks down and idle ones up, also
            over accumulated batches and several processes.

    Sigmoid scores and fine-grained experts: DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, section 2.1.2. Balance
    without a loss: Wang, Gao, Zhao, Sun, Dai, Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts,
    2024::

        @article{wang2024auxiliary, title={Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts},
          author={Wang, Lean and Gao, Huazuo and Zhao, Chenggang and Sun, Xu and Dai, Damai},
          journal={arXiv:2408.15664}, year={2024}}
    """

    vectors: nn.Parameter
    bias: nn.Parameter

    def __init__(self, k: int = 2):
        super().__init__()
        self.k = self.setting = check_count("k", k)
        self.vectors = nn.Parameter(torch.empty(0, 0))
        self.bias = nn.Parameter(torch.empty(0))

    @property
    def fitted(self) -> bool:
        """True once vectors were drawn."""
        return self.vectors.shape[0] > 0

    @torch.no_grad()
    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        """Draw a vector for each row of bank [num_blocks, d]; what they hold does not matter.

        Raises ValueError if there are fewer than k; the old fit then stays.
        """
        check_bank(bank, bias)
        blocks, d = bank.shape
        if self.k > blocks:
            raise ValueError(f"k must be in 1..num_blocks ({blocks}), got {self.k}")
        self.vectors = nn.Parameter(torch.randn(blocks, d, device=bank.device, dtype=bank.dtype) * d**-0.5)
        self.bias = nn.Parameter(torch.zeros(blocks, device=bank.device, dtype=torch.float32))
        self.num_units = blocks

    def select(self, hidden: Tensor) -> Selection:
        """hidden [tokens, d] -> ids [tokens, k] of blocks, best first, with weights, differentiable."""
        self.check_fitted()
        scores = F.linear(hidden, self.vectors.to(hidden.dtype)).float().sigmoid()
        ids = (scores.detach() + self.bias.detach()).topk(self.setting, dim=1).indices
        chosen = scores.gather(1, ids)
        weights = chosen / chosen.mean(dim=1, keepdim=True).clamp_min(1e-20)
        if torch.is_grad_enabled() and self.bias.requires_grad:
            weights = _Balance.apply(weights, self.bias, ids)
        return Selection(ids, self.vectors.shape[0], weights)

    @torch.no_grad()
    def revive(self, used: Tensor) -> Tensor:
        """Vectors of blocks that never ran become copies of those that did, a tenth of them drawn anew."""
        self.check_fitted()
        dead, chosen = partners(used)
        self.vectors[dead] = near(self.vectors[chosen])
        self.bias[dead] = self.bias[chosen]
        return torch.full_like(used, -1, dtype=torch.int64).index_copy_(0, dead, chosen)

    def settings(self) -> list[int]:
        """Numbers of blocks, cheapest first."""
        return list(range(1, self.k + 1))

    def config(self) -> dict[str, Any]:
        """``k``."""
        return {"k": self.k}
