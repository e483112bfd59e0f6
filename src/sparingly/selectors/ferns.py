"""Ferns: comparisons of pairs of features name rows, so that what they say is looked up instead of computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._arrays import as_numpy
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import tensor_bytes
from sparingly.ops._threads import run_chunks
from sparingly.selection import Selection
from sparingly.selectors.base import Selector, check_bank, check_count

MOST_TESTS = 16


@compiled
def name_patterns(start, stop, hidden, first, second, cut, blank, ids):
    """The unit that each fern names for tokens start..stop, -1 where it sees nothing.

    hidden [tokens, d]; first, second uint32 and cut float32 [tests, ferns]; blank int64 [ferns]; ids int64
    [tokens, ferns].
    """
    tests, ferns = first.shape
    # Ferns in the inner loop, differences by themselves, places without a sign: of 2.1 us 1.3 are left.
    apart, pattern = np.empty(ferns, np.float32), np.empty(ferns, np.int32)
    for token in range(start, stop):
        for fern in range(ferns):
            pattern[fern] = 0
        for test in range(tests):
            for fern in range(ferns):
                apart[fern] = hidden[token, first[test, fern]] - hidden[token, second[test, fern]]
            for fern in range(ferns):
                pattern[fern] |= np.int32(apart[fern] > cut[test, fern]) << np.int32(test)
        for fern in range(ferns):
            ids[token, fern] = -1 if pattern[fern] == blank[fern] else (fern << tests) + pattern[fern]


class Ferns(Selector):
    """Each of ``ferns`` compares ``tests`` pairs of features and names one of its own ``2 ** tests`` units.

    Use it with :class:`SelectiveBag` at the entrance of a network of pictures, signals or tables: a choice costs
    subtractions only, and what a pattern means is one row read. There is nothing to learn; the rows learn. A fern for
    which every comparison comes out as on features that are all equal sees nothing and names no unit: an empty corner
    of a picture costs no row, nor does one that is covered.

    Args:
        shape: of the features, row by row: ``(28, 28)`` for pictures of 784 pixels, an int for a vector.
        ferns: how many units run at most.
        tests: comparisons of each, in 1..16.
        window: a fern compares features within so many steps along every axis, or fewer where the shape is smaller;
            None: any features.
        margin: a comparison asks whether one feature exceeds the other by an amount, each its own, drawn evenly from
            -margin..margin, in the features' unit. 0 makes ferns blind to it, and unsure wherever features are equal.
        noise: in training, half of the tokens are looked at through normal noise of a standard deviation of up to
            ``noise``, in the features' unit, mostly much less. The rows then learn what nearby patterns mean: without
            it a network whose entrance are ferns is upset by noise more than a dense one.
        seed: of the comparisons.

    Attributes:
        setting: how many ferns are asked; the first of them.

    Ozuysal, Calonder, Lepetit, Fua, Fast Keypoint Recognition Using Random Ferns, PAMI 2010, section 3 (comparisons,
    and tables that are summed); tuples of pixels that address a memory: Bledsoe, Browning, Pattern Recognition and
    Reading by Machine, 1959; noise in a choice: Shazeer et al., Outrageously Large Neural Networks, ICLR 2017,
    section 2.1::

        @article{ozuysal2010fast, title={Fast Keypoint Recognition Using Random Ferns}, author={{\\"O}zuysal, Mustafa
          and Calonder, Michael and Lepetit, Vincent and Fua, Pascal}, journal={IEEE Transactions on Pattern Analysis
          and Machine Intelligence}, year={2010}}
    """

    first: Tensor
    second: Tensor
    cut: Tensor
    blank: Tensor

    def __init__(
        self,
        shape: int | tuple[int, ...] | list[int],
        ferns: int = 256,
        tests: int = 8,
        *,
        window: int | None = 7,
        margin: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.shape = tuple(check_count("shape", size) for size in ([shape] if isinstance(shape, int) else shape))
        self.in_features = math.prod(self.shape)
        if self.in_features < 2:
            raise ValueError(f"shape must hold at least 2 features to compare, got {list(self.shape)}")
        self.ferns, self.tests = check_count("ferns", ferns), check_count("tests", tests)
        if tests > MOST_TESTS:
            raise ValueError(f"tests must be in 1..{MOST_TESTS}, for a fern has 2 ** tests units, got {tests}")
        if window is not None and (check_count("window", window) < 2):
            raise ValueError(f"window must be None or at least 2, got {window}")
        for name, value in (("margin", margin), ("noise", noise)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        self.window, self.margin, self.noise, self.seed = window, margin, noise, seed
        self.setting = ferns
        first, second, cut = self._drawn()
        self.register_buffer("first", first.int())
        self.register_buffer("second", second.int())
        self.register_buffer("cut", cut)
        self.register_buffer("blank", _joined(cut < 0))

    def _drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is compared, int64 [tests, ferns] twice, and by how much, float32."""
        random = torch.Generator().manual_seed(self.seed)
        spans = [size if self.window is None else min(size, self.window) for size in self.shape]
        # Windows that follow one another lie far apart, so that any run of ferns covers the whole input.
        corners = torch.quasirandom.SobolEngine(len(spans), scramble=True, seed=self.seed).draw(self.ferns)
        inside = math.prod(spans)
        one = torch.randint(0, inside, (self.tests, self.ferns), generator=random)
        # Never the same feature twice.
        other = (one + torch.randint(1, inside, (self.tests, self.ferns), generator=random)) % inside
        rest = torch.stack((one, other))
        stride, parts = 1, []
        for size, span, corner in zip(reversed(self.shape), reversed(spans), reversed(corners.unbind(1)), strict=True):
            start = (corner * (size - span + 1)).long().clamp(max=size - span)
            parts.append((start + rest % span) * stride)
            rest, stride = rest // span, stride * size
        places = torch.stack(parts).sum(dim=0)
        cut = (torch.rand(self.tests, self.ferns, generator=random) * 2 - 1) * self.margin
        return places[0], places[1], cut

    @property
    def fitted(self) -> bool:
        """Always True: there is nothing to learn."""
        return True

    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        """Check that bank [num_units, d] has a row for every pattern. Raises ValueError if not."""
        check_bank(bank, bias)
        if bank.shape[0] != self.ferns << self.tests:
            wanted = f"{self.ferns} ferns * 2 ** {self.tests} tests = {self.ferns << self.tests}"
            raise ValueError(f"the bank must have {wanted} rows, got {bank.shape[0]}")
        self.num_units = bank.shape[0]

    @torch.no_grad()
    def select(self, hidden: Tensor) -> Selection:
        """hidden [tokens, in_features], finite -> ids [tokens, setting], -1 for a fern that sees nothing.

        Raises ValueError for another width.
        """
        self.check(hidden)
        tokens, asked = hidden.shape[0], self.setting
        if self.training and self.noise:
            hidden = noisy(hidden, self.noise)
        tests = self.asked()
        if not torch.compiler.is_compiling() and hidden.is_cpu:
            ids = torch.empty(tokens, asked, dtype=torch.int64)
            work = tokens * asked * self.tests * 16
            run_chunks(
                name_patterns, tokens, work, as_numpy(hidden.float().contiguous()), *arrays(tests), as_numpy(ids)
            )
        else:
            first, second, cut, blank = tests
            pattern = _joined(hidden[:, first.long()] - hidden[:, second.long()] > cut)
            offset = torch.arange(asked, device=hidden.device) << self.tests
            ids = (pattern + offset).masked_fill(pattern == blank, -1)
        if ledger.active():
            ledger.record(
                "sparingly::ferns",
                dtype=torch.float32,
                macs=0,
                other=2 * tokens * asked * self.tests,
                bytes_read=tensor_bytes(hidden, *tests),
                bytes_written=tensor_bytes(ids),
            )
        return Selection(ids, self.ferns << self.tests)

    def check(self, hidden: Tensor) -> None:
        """Raise ValueError unless hidden is [tokens, in_features]."""
        if hidden.dim() != 2 or hidden.shape[1] != self.in_features:
            raise ValueError(f"hidden must be [tokens, {self.in_features}], got {list(hidden.shape)}")

    def asked(self) -> list[Tensor]:
        """first, second, cut and blank of the ferns that :attr:`setting` asks."""
        parts = (self.first, self.second, self.cut.float(), self.blank)
        return [part[..., : self.setting].contiguous() for part in parts]

    def settings(self) -> list[int]:
        """Numbers of ferns, cheapest first."""
        return [self.ferns >> shift for shift in range(self.ferns.bit_length() - 1, -1, -1)]

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("ferns", "tests", "window", "margin", "noise", "seed")
        return {"shape": list(self.shape)} | {name: getattr(self, name) for name in names}


def arrays(tests: list[Tensor]) -> list[Any]:
    """What :meth:`Ferns.asked` gives, for kernels: places without a sign, which spares them a comparison each."""
    first, second, cut, blank = (as_numpy(part) for part in tests)
    return [first.view(np.uint32), second.view(np.uint32), cut, blank]


def noisy(hidden: Tensor, most: float) -> Tensor:
    """hidden [tokens, d]; half of the tokens with normal noise whose deviation is ``most`` times the square of an even
    number in 0..1: little noise is the rule."""
    chosen = (torch.rand(hidden.shape[0], device=hidden.device) < 0.5).nonzero().squeeze(1)
    spread = torch.rand(chosen.numel(), 1, device=hidden.device).square() * most
    noise = torch.randn(chosen.numel(), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    return hidden.index_add(0, chosen, noise * spread.to(hidden.dtype))


def _joined(bits: Tensor) -> Tensor:
    """bool [..., tests, ferns] -> the numbers whose digits they are, int64 [..., ferns]."""
    weights = 1 << torch.arange(bits.shape[-2], device=bits.device)
    return (bits * weights[:, None]).sum(dim=-2)
