"""Rows of a bank that a picture's patches name: what a patch says is looked up instead of computed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.nn import CompiledPlan, SelectiveBag, compile_plan
from sparingly.nn._program_kernels import linear
from sparingly.ops._numba import EIGHT, axpy, axpy_eight, eight, kernel, prefetch_row

SIDE, PATCH, STRIDE = 28, 3, 2
PLACES = ((SIDE - PATCH) // STRIDE + 1) ** 2
PATTERNS = 1 << PATCH * PATCH
GAIN = 2.0
"""Rows count so much: with one rate for everything they learn at twice the others'. Tried 4: the same."""


class PatchBank(nn.Module):
    """A row for every pattern of bright and dark pixels at every place: a picture reads 169 of 86,528.

    Patches are 3 by 3, every second pixel; bright is above ``level``. Rows are summed, divided by the root of their
    number. Tuples of pixels that address a memory: Bledsoe and Browning, Pattern Recognition and Reading by Machine,
    1959; learned by gradient, as here, an embedding of n-grams.

    Args:
        width: of a row.
        level: a brighter pixel is bright.
        unseen: share of the patches that training leaves out of each picture, other ones at each step: without it
            rows learn pictures by heart.

    Attributes:
        bag: the rows, [PLACES * PATTERNS, width].
    """

    names: Tensor
    first: Tensor

    def __init__(self, width: int, level: float, unseen: float = 0.5):
        super().__init__()
        self.level, self.unseen = level, unseen
        self.bag = SelectiveBag(PLACES * PATTERNS, width)
        with torch.no_grad():
            self.bag.weight.mul_(1e-3 * width**0.5)
        weights = 2.0 ** torch.arange(PATCH * PATCH).view(1, 1, PATCH, PATCH)
        self.register_buffer("names", weights, persistent=False)
        self.register_buffer("first", torch.arange(PLACES) * PATTERNS, persistent=False)

    @torch.no_grad()
    def ids(self, x: Tensor) -> Tensor:
        """Pictures [n, 784] -> the rows that they name, int64 [n, PLACES]."""
        bright = (x > self.level).float().view(-1, 1, SIDE, SIDE)
        return nn.functional.conv2d(bright, self.names, stride=STRIDE).flatten(1).long() + self.first

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [n, 784] -> [n, width]."""
        ids = self.ids(x)
        if self.training:
            ids = ids.masked_fill(torch.rand(ids.shape) < self.unseen, -1)
        return GAIN * self.bag(ids)


class Looking(nn.Module):
    """``enter`` and what the bank says of the picture, summed, then ``rest``: [n, 784] -> scores."""

    def __init__(self, enter: nn.Linear, level: float, rest: nn.Module):
        super().__init__()
        self.enter, self.bank, self.rest = enter, PatchBank(enter.out_features, level), rest

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.enter(x) + self.bank(x))


@kernel
def _enter(pictures, level, weight, bias, rows, share, moved, out):
    """pictures [n, 784] -> out [n, width]: the linear layer and ``share`` times the rows that the patches name."""
    side = (SIDE - PATCH) // STRIDE + 1
    ids = np.empty(PLACES, np.int64)
    shares = (share, share, share, share, share, share, share, share)
    for one in range(pictures.shape[0]):
        linear(pictures[one : one + 1], weight, bias, moved)
        for j in range(out.shape[1]):
            out[one, j] = moved[0, j]
        for place in range(PLACES):
            top, left = STRIDE * (place // side), STRIDE * (place % side)
            name = 0
            for bit in range(PATCH * PATCH):
                at = (top + bit // PATCH) * SIDE + left + bit % PATCH
                name |= np.int64(pictures[one, at] > level) << bit
            ids[place] = place * PATTERNS + name
            prefetch_row(rows, ids[place])
        for place in range(0, PLACES - EIGHT + 1, EIGHT):
            axpy_eight(shares, eight(ids, place, 1), rows, out, one)
        for place in range(PLACES - PLACES % EIGHT, PLACES):
            axpy(share, rows, ids[place], out, one)


class CompiledLooking:
    """A :class:`Looking` in evaluation mode as two compiled calls; it reads the model's own parameters."""

    def __init__(self, model: Looking):
        self._model = model
        self._rest: CompiledPlan = compile_plan(model.rest)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [n, 784], contiguous -> scores."""
        model, share = self._model, np.float32(GAIN * PLACES**-0.5)
        width = model.enter.out_features
        hidden, moved = np.empty((x.shape[0], width), np.float32), np.empty((1, width), np.float32)
        weights = (model.enter.weight, model.enter.bias, model.bank.bag.weight)
        weight, bias, rows = (one.detach().numpy() for one in weights)
        _enter(x.numpy(), np.float32(model.bank.level), weight, bias, rows, share, moved, hidden)
        return self._rest(torch.from_numpy(hidden))
