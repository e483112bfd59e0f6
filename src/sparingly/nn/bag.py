"""A bag of selected rows: an embedding whose training touches only the rows that were used."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

from sparingly.nn._fern_rows import look_up
from sparingly.nn.selective import share_of
from sparingly.ops import gather_accumulate, table_sums
from sparingly.ops._arrays import FLOATS, check_finite
from sparingly.selectors import Ferns, Selector
from sparingly.selectors.base import check_count


class SelectiveBag(nn.Module):
    """Sum of the selected rows of a table, divided by the root of their number.

    The root keeps the variance of the output the same for few and many rows. Which rows: those whose ids it is given,
    or, with a selector, those that the selector names for the features it is given.

    Args:
        num_rows: how many rows the table has.
        dim: their width.
        selector: names rows from features, such as :class:`Ferns`.
        groups: the ids of a token are split into so many equal runs; each run's sum is a part of the output of its own,
            ``groups * dim`` wide in all. Four times as many rows then cost as much as without.
        gain: how much a row counts. With one learning rate for everything, rows learn at ``gain`` times the others'.
        std: standard deviation that the rows start with; None: 1 / sqrt(dim).
        dropout: in training, each token leaves out a share of its rows, drawn evenly from 0..dropout. Without it rows
            that name much of a training example learn it by heart.

    Attributes:
        weight: [num_rows, dim].
        ran: int64 [4]: tokens, rows that they read, 0, and rows again; counted where there is a selector.

    Raises ValueError if an option is out of range, or the selector chooses among another number of rows.
    """

    ran: Tensor
    # What explain() asks of every selective layer: this one has neither int8 rows nor anything that made it dense.
    reads_together, rows, why_dense = False, None, MappingProxyType({})

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        selector: Selector | None = None,
        groups: int = 1,
        gain: float = 1.0,
        std: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_rows < 1 or dim < 1:
            raise ValueError(f"num_rows and dim must be at least 1, got {num_rows} and {dim}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in 0..1, got {dropout}")
        check_count("groups", groups)
        self.num_rows, self.dim, self.groups, self.gain, self.dropout = num_rows, dim, groups, gain, dropout
        self.std = dim**-0.5 if std is None else std
        self.weight = nn.Parameter(torch.empty(num_rows, dim, device=device, dtype=dtype))
        self.register_buffer("ran", torch.zeros(4, dtype=torch.int64, device=device), persistent=False)
        self.selector = selector
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=self.std)
        if self.selector is not None:
            self.selector.fit(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """ids int64 [tokens, k], -1 is a pad -> [tokens, groups * dim], float32; 0 where there are only pads.

        With a selector x is what that takes, floating [tokens, d].

        The gradient of ``weight`` is a coalesced sparse tensor of the rows that ids name. Raises IndexError for an id
        out of range, TypeError or ValueError for another dtype or shape, or features that are not finite.
        """
        compiling = torch.compiler.is_compiling()
        if self.selector is None:
            return self._sum(x, compiling)[0]
        if x.dtype not in FLOATS or x.dim() != 2:
            raise TypeError(f"x must be floating [tokens, d], got {x.dtype} {list(x.shape)}")
        if not compiling:
            check_finite("x", x)
        if isinstance(self.selector, Ferns) and not compiling and self._plain(x):
            self._check_groups(self.selector.setting)
            self.selector.check(x)
            sums, read = look_up(self.selector, x.float().contiguous(), self.weight.detach(), self.groups, self.gain)
        else:
            sums, read = self._sum(self.selector.select(x.detach()).per_token(x.shape[0]), compiling)
        if not compiling:
            self.ran += torch.tensor([x.shape[0], read, 0, read], device=self.ran.device)
        return sums

    def _plain(self, x: Tensor) -> bool:
        """True where no gradient, no dropout and no other kernel is asked for."""
        learns = self.training or (torch.is_grad_enabled() and self.weight.requires_grad)
        return not learns and x.is_cpu and self.weight.dtype == torch.float32 and self.weight.is_contiguous()

    def _check_groups(self, k: int) -> None:
        if k % self.groups:
            raise ValueError(f"groups ({self.groups}) must divide the rows that each token names, got {k}")

    def _sum(self, ids: Tensor, compiling: bool) -> tuple[Tensor, int]:
        """The sums, and how many rows were read; 0 where that is not counted."""
        if ids.dtype != torch.int64 or ids.dim() != 2:
            raise TypeError(f"ids must be int64 [tokens, k], got {ids.dtype} {list(ids.shape)}")
        tokens, k = ids.shape
        self._check_groups(k)
        if self.training and self.dropout:
            share = torch.rand(tokens, 1, device=ids.device) * self.dropout
            ids = ids.masked_fill(torch.rand(ids.shape, device=ids.device) < share, -1)
        used = (ids >= 0).view(tokens, self.groups, k // self.groups).sum(dim=2)
        share = used.clamp_min(1).rsqrt() * self.gain
        if isinstance(self.selector, Ferns) and k == self.selector.ferns and not compiling:
            sums = table_sums(share, self.weight, ids, sparse_grad=True)
        else:
            ids = ids.reshape(tokens * self.groups, k // self.groups)
            share = share.view(-1, 1).expand(ids.shape).contiguous()
            sums = gather_accumulate(share, self.weight, ids, sparse_grad=not compiling)
        read = 0 if self.selector is None or compiling else int(used.sum())
        return sums.view(tokens, self.groups * self.dim), read

    @property
    def num_units(self) -> int:
        """Rows."""
        return self.num_rows

    def operators(self) -> tuple[str, ...]:
        """Names of the operators that sum what is selected."""
        return ("table_sums",) if isinstance(self.selector, Ferns) else ("gather_accumulate",)

    def dense_bytes(self) -> int:
        """Bytes of the whole table."""
        return self.weight.nbytes

    def bytes_read(self, first: float, second: float) -> float:
        """Bytes of weights for a token that reads ``first`` rows, those of the selector included."""
        assert self.selector is not None
        choice = sum(one.nbytes for one in (*self.selector.parameters(), *self.selector.buffers()))
        return choice + first * self.dim * self.weight.element_size()

    def share_run(self) -> float | None:
        """Share of the rows that a token read, 0..1; None before the first token."""
        return share_of(self.ran, self.num_rows)

    def extra_repr(self) -> str:
        options = {"groups": (self.groups, 1), "gain": (self.gain, 1.0), "dropout": (self.dropout, 0.0)}
        told = "".join(f", {name}={value}" for name, (value, usual) in options.items() if value != usual)
        return f"{self.num_rows}, {self.dim}{told}"
