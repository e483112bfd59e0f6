"""A feed-forward layer with far more units than any token uses, trained by touching only those that ran."""

from __future__ import annotations

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.nn.selective import share_of
from sparingly.ops import mlp_rows
from sparingly.ops._arrays import FLOATS, check_finite
from sparingly.ops.mlp_rows import ACTIVATIONS
from sparingly.selectors import Oracle, ProductKey, Selector
from sparingly.selectors.base import check_count


class SelectiveFFN(nn.Module):
    """``sum of weight_i * act(x . up_i + bias_i) * down_i`` over the units i that the selector names for x.

    Stands in for the MLP block of any network: ``Linear(d_model, num_units)``, activation,
    ``Linear(num_units, d_model)``, with ``num_units`` in the tens of thousands and the running cost of a few of them.

    Args:
        d_model: width of input and output.
        num_units: how many hidden units there are.
        selector: which units run. None: ``ProductKey()``, 64 units by 4 heads. :class:`Dense` runs all of them.
        activation: "relu", "gelu" or "silu".
        block: units that are chosen together, the ``block`` rows from ``block * i`` on; the selector chooses blocks.

    Attributes:
        up: [num_units, d_model], bias: [num_units], down: [num_units, d_model]: a unit's weights are its rows.
        selector: fitted for ``num_units / block`` units; those that learn are trained with the layer.
        used: bool [num_units / block], which blocks have run in training since the layer was made or :meth:`revive`.
        ran: int64 [4]: tokens that ran selectively, units that they ran, tokens that ran every unit, and units again.

    A large memory of units of which few run as the feed-forward layer: Lample et al., Large Memory Layers with Product
    Keys, NeurIPS 2019; He, Mixture of A Million Experts, 2024; Berges, Oguz, Haziza, Yih, Zettlemoyer, Ghosh, Memory
    Layers at Scale, 2024::

        @article{berges2024memory, title={Memory Layers at Scale}, author={Berges, Vincent-Pierre and O{\\u{g}}uz,
          Barlas and Haziza, Daniel and Yih, Wen-tau and Zettlemoyer, Luke and Ghosh, Gargi},
          journal={arXiv:2412.09764}, year={2024}}
    """

    used: Tensor
    ran: Tensor
    # What explain() asks of every selective layer: this one has neither int8 rows nor anything that made it dense.
    reads_together, rows, why_dense = False, None, MappingProxyType({})

    def __init__(
        self,
        d_model: int,
        num_units: int,
        *,
        selector: Selector | None = None,
        activation: str = "gelu",
        block: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (("d_model", d_model), ("num_units", num_units), ("block", block)):
            check_count(name, value)
        if num_units % block:
            raise ValueError(f"block must divide num_units ({num_units}), got {block}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if block > 1 and isinstance(selector, Oracle):
            raise ValueError(f"Oracle finds single units; block must be 1, got {block}")
        self.d_model, self.num_units, self.block, self.activation = d_model, num_units, block, activation
        place = {"device": device, "dtype": dtype}
        self.up = nn.Parameter(torch.empty(num_units, d_model, **place))
        self.bias = nn.Parameter(torch.empty(num_units, **place))
        self.down = nn.Parameter(torch.empty(num_units, d_model, **place))
        self.register_buffer("used", torch.zeros(num_units // block, dtype=torch.bool, device=device))
        self.register_buffer("ran", torch.zeros(4, dtype=torch.int64, device=device), persistent=False)
        self.selector = ProductKey() if selector is None else selector
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw everything anew: outputs have about the same size however many units run."""
        nn.init.normal_(self.up, std=self.d_model**-0.5)
        nn.init.zeros_(self.bias)
        self.selector.fit(self._first_of_blocks()[0])
        nn.init.normal_(self.down, std=(self.selector.width * self.block) ** -0.5)
        self.used.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model], of x's dtype.

        The gradients of ``up``, ``bias`` and ``down`` are coalesced sparse tensors of the units that ran, which
        ``sparingly.optimizer`` takes; dense where every unit ran, and inside ``torch.compile``. Raises ValueError for
        another width or dtype, or where x holds infinity or NaN.
        """
        if not x.is_floating_point() or x.shape[-1:] != (self.d_model,):
            raise ValueError(f"x must be floating [..., d_model] with d_model = {self.d_model}, got {list(x.shape)}")
        hidden = x.reshape(-1, self.d_model)
        if hidden.dtype not in FLOATS:
            hidden = hidden.float()
        compiling = torch.compiler.is_compiling()
        if not compiling:
            check_finite("x", hidden)
        selection = self.selector.select_from(hidden, *self._first_of_blocks())
        if selection.shared:
            out = self._every(hidden)
        else:
            out = mlp_rows(
                hidden,
                self.up,
                self.bias,
                self.down,
                selection.ids,
                selection.weights,
                block=self.block,
                activation=self.activation,
                sparse_grad=not compiling,
            )
        if not compiling:
            self._count(selection.ids, hidden.shape[0])
        return out.to(x.dtype).view(x.shape)

    @property
    def share_used(self) -> float:
        """Share of the units that have run in training since the layer was made or :meth:`revive`, 0..1."""
        return float(self.used.float().mean())

    @torch.no_grad()
    def revive(self) -> int:
        """Give units that have not run since the last call a new start; returns how many.

        The selector makes them findable beside units that run, whose rows they take. Call it every few hundred steps
        of training, while :attr:`share_used` is far from 1. The moments that an optimiser keeps of their rows stay.
        """
        donors = self.selector.revive(self.used)
        blocks = (donors >= 0).nonzero().squeeze(1)
        for rows in (self.up, self.bias, self.down):
            parts = rows.view(-1, self.block, *rows.shape[1:])
            parts[blocks] = parts[donors[blocks]]
        self.used.zero_()
        return blocks.numel() * self.block

    def _first_of_blocks(self) -> tuple[Tensor, Tensor]:
        """The bank that a selector sees: each block's first row and bias."""
        up, bias = self.up.detach(), self.bias.detach()
        return (up, bias) if self.block == 1 else (up[:: self.block], bias[:: self.block])

    def _every(self, hidden: Tensor) -> Tensor:
        """The dense answer, every unit with a weight of one."""
        scores = F.linear(hidden, self.up.to(hidden.dtype), self.bias.to(hidden.dtype))
        return ACTIVATIONS[self.activation][0](scores) @ self.down.to(scores.dtype)

    def _count(self, ids: Tensor, tokens: int) -> None:
        if ids.dim() == 1:
            self.ran[2] += tokens
            return
        units = ids.shape[1] * self.block * tokens
        self.ran += torch.tensor([tokens, units, 0, units], device=self.ran.device)
        if self.training and torch.is_grad_enabled():
            self.used[ids[ids >= 0]] = True

    def share_run(self) -> float | None:
        """Share of the units that ran per token, 0..1; None before the first token."""
        return share_of(self.ran, self.num_units)

    def operators(self) -> tuple[str, ...]:
        """Names of the operators that run what is selected."""
        return ("mlp_rows",)

    def dense_bytes(self) -> int:
        """Bytes of weights for a token that runs every unit."""
        return self.num_units * self._unit_bytes()

    def bytes_read(self, first: float, second: float) -> float:
        """Bytes of weights for a token that runs ``first`` units, those of the selector included."""
        choice = sum(one.numel() * one.element_size() for one in self.selector.parameters())
        return choice + first * self._unit_bytes()

    def _unit_bytes(self) -> int:
        return (self.up.shape[1] + self.down.shape[1] + 1) * self.up.element_size()

    def extra_repr(self) -> str:
        return f"{self.d_model}, {self.num_units}, block={self.block}, activation={self.activation!r}"
