"""Product keys: the best of many units found by two searches through the root of their number. Learned with the net."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.ops.product_topk import product_topk
from sparingly.selection import Selection
from sparingly.selectors._revive import near, partners
from sparingly.selectors.base import Selector, check_bank, check_count


class ProductKey(Selector):
    """Unit ``i * m + j`` has the sum of key i's and key j's scores; the best ``k`` of each head run.

    Use it for hidden layers of thousands to millions of single units (``block=1``): a choice costs some
    ``heads * 2 * key_dim * (d + sqrt(num_units))`` MACs. Batches read many rows; where that matters more, choose
    blocks by :class:`Experts`.

    Args:
        heads: how many independent choices each token makes; two of them may name the same unit.
        k: units per choice. A unit's weight is its share in the softmax over the choice's k scores, times k.
        key_dim: width of each half of a query.

    Attributes:
        setting: ``k``; a smaller one than in training runs fewer units.

    It has no weights before :meth:`fit` draws them, and learns by gradient afterwards. Lample, Sablayrolles, Ranzato,
    Denoyer, Jegou, Large Memory Layers with Product Keys, NeurIPS 2019, section 3; units with incoming weights of
    their own: He, Mixture of A Million Experts, 2024. In place of batch normalisation, which mixes the tokens of a
    batch, each half of a query is scaled to a root mean square of one::

        @inproceedings{lample2019large, title={Large Memory Layers with Product Keys}, author={Lample, Guillaume and
          Sablayrolles, Alexandre and Ranzato, Marc'Aurelio and Denoyer, Ludovic and J{\\'e}gou, Herv{\\'e}},
          booktitle={NeurIPS}, year={2019}}
    """

    query: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter

    def __init__(self, heads: int = 4, k: int = 16, key_dim: int = 32):
        super().__init__()
        self.heads, self.key_dim = check_count("heads", heads), check_count("key_dim", key_dim)
        self.k = self.setting = check_count("k", k)
        # [heads * 2 * key_dim, d], [heads, n, key_dim], [heads, m, key_dim]
        self.query = nn.Parameter(torch.empty(heads * 2 * key_dim, 0))
        self.left = nn.Parameter(torch.empty(heads, 0, key_dim))
        self.right = nn.Parameter(torch.empty(heads, 0, key_dim))

    @property
    def fitted(self) -> bool:
        """True once keys were drawn."""
        return self.left.shape[1] > 0

    @property
    def width(self) -> int:
        """See :attr:`Selector.width`."""
        return self.heads * self.setting

    @torch.no_grad()
    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        """Draw queries and keys for as many units as bank [num_units, d] has rows; what they hold does not matter.

        Raises ValueError if num_units is no product of two numbers of which one is at most four times the other, or
        smaller than k; the old fit then stays.
        """
        check_bank(bank, bias)
        num_units, d = bank.shape
        n = next(size for size in range(math.isqrt(num_units), 0, -1) if num_units % size == 0)
        m = num_units // n
        if m > 4 * n and num_units > 3:
            near = math.isqrt(num_units) ** 2
            raise ValueError(
                f"num_units must be a product of two numbers of like size, such as {near}; got {num_units}"
            )
        if self.k > num_units:
            raise ValueError(f"k must be in 1..num_units ({num_units}), got {self.k}")
        place = {"device": bank.device, "dtype": bank.dtype}
        self.query = nn.Parameter(torch.randn(self.heads * 2 * self.key_dim, d, **place) * d**-0.5)
        self.left = nn.Parameter(torch.randn(self.heads, n, self.key_dim, **place) * self.key_dim**-0.5)
        self.right = nn.Parameter(torch.randn(self.heads, m, self.key_dim, **place) * self.key_dim**-0.5)
        self.num_units = num_units

    def select(self, hidden: Tensor) -> Selection:
        """hidden [tokens, d] -> ids [tokens, heads * k], head by head, best first, with weights, differentiable."""
        self.check_fitted()
        tokens, k = hidden.shape[0], self.setting
        queries = F.linear(hidden, self.query.to(hidden.dtype)).view(tokens, self.heads, 2, self.key_dim).float()
        queries = F.rms_norm(queries, (self.key_dim,))
        scores = [
            torch.einsum("thd,hnd->thn", queries[:, :, half], keys.float()).flatten(0, 1)
            for half, keys in enumerate((self.left, self.right))
        ]
        best, ids = product_topk(scores[0], scores[1], k)
        shape = (tokens, self.heads * k)
        return Selection(
            ids.view(shape), self.left.shape[1] * self.right.shape[1], (best.softmax(dim=1) * k).view(shape)
        )

    @torch.no_grad()
    def revive(self, used: Tensor) -> Tensor:
        """Keys of which no unit ran become copies of keys that are in use, a tenth of them drawn anew.

        See :meth:`Selector.revive`; a unit that never ran though both of its keys are in use stays.
        """
        self.check_fitted()
        sizes = (self.left.shape[1], self.right.shape[1])
        grid, donors = used.view(sizes), torch.arange(used.numel(), device=used.device).view(sizes)
        for axis, keys in enumerate((self.left, self.right)):
            dead, chosen = partners(grid.any(dim=1 - axis))
            keys[:, dead] = near(keys[:, chosen])
            donors.index_copy_(axis, dead, donors.index_select(axis, chosen))
        donors = donors.flatten()
        # A pair of keys in use whose unit never ran has no rows worth taking.
        moved = (donors != torch.arange(used.numel(), device=used.device)) & used[donors]
        return donors.masked_fill(~moved, -1)

    def settings(self) -> list[int]:
        """Numbers of units per choice, cheapest first."""
        return [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < self.k] + [self.k]

    def config(self) -> dict[str, Any]:
        """``heads``, ``k`` and ``key_dim``."""
        return {"heads": self.heads, "k": self.k, "key_dim": self.key_dim}
