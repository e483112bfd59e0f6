"""Trees of units: each unit on a token's path from root to leaf runs, and its sign says where the path goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._arrays import NO_FLOATS, as_numpy
from sparingly.ops._gradients import plain
from sparingly.ops._numba import dot, to_f32
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import row_bytes, tensor_bytes
from sparingly.ops._threads import run_chunks
from sparingly.selection import Selection
from sparingly.selectors.base import Selector, check_bank, check_count


@compiled
def descend(start, stop, trees, depth, block, hidden, bank, bias, ids):
    """Paths of the tokens start..stop; ids [tokens, trees * depth], -1 where a path has ended.

    The first of ``block`` rows of bank and bias is that of a unit.
    """
    size = bank.shape[0] // block // trees
    for token in range(start, stop):
        for tree in range(trees):
            node = 0
            for level in range(depth):
                unit = tree * size + node
                ids[token, tree * depth + level] = unit if node < size else -1
                if node < size and 2 * node + 1 < size and level + 1 < depth:
                    score = dot(bank, unit * block, hidden, token)
                    if bias.size:
                        score += to_f32(bias[unit * block])
                    node = 2 * node + 1 + (score > np.float32(0.0))
                else:
                    node = size


class Tree(Selector):
    """``trees`` paths through units that are arranged as balanced binary trees.

    Use it where the choice itself must cost next to nothing: ``log2(num_units / trees)`` units of each tree run, and
    their own scores choose. In turn few units take part, so that it needs more trees than feels natural. With blocks
    the first unit of each stands for it.

    Args:
        trees: how many trees the units are split into, equally large.

    Attributes:
        setting: how many levels of each tree run at most.

    Belcak, Wattenhofer, Fast Feedforward Networks, 2023; without leaves of their own, as here: Belcak, Wattenhofer,
    Exponentially Faster Language Modelling, 2023, section 2::

        @article{belcak2023exponentially, title={Exponentially Faster Language Modelling}, author={Belcak, Peter and
          Wattenhofer, Roger}, journal={arXiv:2311.10770}, year={2023}}
    """

    def __init__(self, trees: int = 4):
        super().__init__()
        self.trees = check_count("trees", trees)
        self.setting = 64

    @property
    def fitted(self) -> bool:
        """Always True: there is nothing to learn."""
        return True

    @property
    def width(self) -> int:
        """See :attr:`Selector.width`."""
        return self.trees * self._depth(self.num_units)

    def _depth(self, units: int) -> int:
        """Levels of each tree that run."""
        return min(self.setting, (units // self.trees).bit_length())

    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        """Remember how many units there are. Raises ValueError if trees do not divide them; the old fit then stays."""
        check_bank(bank, bias)
        if bank.shape[0] % self.trees:
            raise ValueError(f"trees must divide num_units ({bank.shape[0]}), got {self.trees}")
        self.num_units = bank.shape[0]

    def select(self, hidden: Tensor) -> Selection:
        """Raises RuntimeError: paths go by the units themselves, see :meth:`select_from`."""
        raise RuntimeError("Tree chooses by the units' own rows: call select_from(hidden, bank, bias)")

    @torch.no_grad()
    def select_from(self, hidden: Tensor, bank: Tensor, bias: Tensor | None) -> Selection:
        """hidden [tokens, d], bank [num_units, d] -> ids [tokens, trees * depth], root first, -1 below short paths."""
        tokens, units = hidden.shape[0], bank.shape[0]
        depth, size = self._depth(units), units // self.trees
        if not torch.compiler.is_compiling() and plain(hidden, bank, bias):
            ids = torch.empty(tokens, self.trees * depth, dtype=torch.int64)
            biases = NO_FLOATS if bias is None else as_numpy(bias)
            places = (as_numpy(hidden.float().contiguous()), as_numpy(bank), biases, as_numpy(ids))
            work = tokens * ids.shape[1] * bank.shape[1] * bank.element_size()
            run_chunks(descend, tokens, work, self.trees, depth, 1, *places)
            self._record(ids.view(-1, depth), hidden, bank, bias)
            return Selection(ids, units)
        roots = torch.arange(self.trees, device=hidden.device) * size
        node = torch.zeros(tokens, self.trees, dtype=torch.int64, device=hidden.device)
        paths = []
        for _ in range(depth):
            ended = node >= size
            path = (node + roots).masked_fill(ended, -1)
            paths.append(path)
            rows = path.clamp(min=0)
            scores = torch.einsum("td,tjd->tj", hidden, bank[rows].to(hidden.dtype))
            if bias is not None:
                scores = scores + bias[rows]
            below = 2 * node + 1 + (scores > 0).long()
            node = torch.where(ended | (2 * node + 1 >= size), size, below)
        return Selection(torch.stack(paths, dim=2).flatten(1), units)

    def _record(self, ids: Tensor, hidden: Tensor, bank: Tensor, bias: Tensor | None) -> None:
        if not ledger.active():
            return
        # The last unit of a path is not asked where to go.
        asked = int((ids >= 0).sum(dim=1).sub(1).clamp(min=0).sum())
        ledger.record(
            "sparingly::tree",
            dtype=bank.dtype,
            macs=asked * bank.shape[1],
            other=asked,
            bytes_read=asked * row_bytes(bank, bias) + tensor_bytes(hidden),
            bytes_written=tensor_bytes(ids),
        )

    def settings(self) -> list[int]:
        """Numbers of levels, cheapest first."""
        return list(range(1, (self.num_units // self.trees).bit_length() + 1))

    def config(self) -> dict[str, Any]:
        """``trees``."""
        return {"trees": self.trees}
