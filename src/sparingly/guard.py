"""Accuracy contracts: how sparing a model may be so that, with a stated confidence, it loses no more than was allowed.

Learn then Test (Angelopoulos and others 2021): the guard sees, for each calibration example, how much worse a
configuration did than the dense model (its *drop*), and tests the hypothesis "the mean drop over all such examples is
more than ``max_drop``". Configurations are tried in an order fixed beforehand, from dense to sparse, until one fails;
each test may therefore use the whole error budget (fixed-sequence testing, their section 3.2).

Which test:

* Drops of 0 and 1 (boolean): the exact binomial test (Clopper and Pearson 1934).
* Drops in a known range: a betting test (Waudby-Smith and Ramdas 2023) whose bets aim at the wealth that is still
  missing (STaR, Voracek and Orabona 2025). Nothing is assumed about the distribution. It passed at least as often as
  the predictable plug-in bets of 2023, to 0.2 % of 2,000 repetitions, in 39 settings (normal, t3, -1/0/1 and beta
  drops, 100 to 5,000 examples; at most 0.54 against 0.41 of the time). Hoeffding-Bentkus is not here: it does not see
  the variance. With drops in -1..1 it never passed, and with 2,000 shares that average half of what is allowed 0.64 of
  the time, against 1.00.
* Drops without a range (log-loss): the same test on drops clipped to ±``clip`` times the limit.

What clipping guarantees: the mean of the *clipped* drop is at most the limit. Clipping from below only makes a drop
look worse. Clipping from above hides what an example loses beyond the clip: the promise leaves out
E[max(drop - clip, 0)]. Three things stand against that: the contract counts the clipped examples and bounds their share
(``clipped_upper``), it holds the plain mean, and a configuration whose plain mean is above the limit never passes. No
test without assumptions does better: a loss of B in one example of n moves the mean by B ÷ n and is missing from most
samples of n. Mixing the predictions with a uniform distribution gives log-loss a range, but at 17.7 nats it takes over
5,300 windows to pass 1 % even if nothing changes; Catoni's mean takes a known bound of the variance, self-normalised
bounds take symmetry, and data cannot show either. More windows allow a wider clip.

All of it holds for examples drawn independently from what the model will meet, and not seen when the path was built.
Neighbouring windows of one document are alike and count for less than their number. Each example counts the same,
whatever its length::

    @article{angelopoulos2021learn, title={Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control},
      author={Angelopoulos, Anastasios N. and Bates, Stephen and Candes, Emmanuel J. and Jordan, Michael I. and
      Lei, Lihua}, journal={arXiv:2110.01052}, year={2021}}
    @article{waudbysmith2023estimating, title={Estimating means of bounded random variables by betting},
      author={Waudby-Smith, Ian and Ramdas, Aaditya}, journal={Journal of the Royal Statistical Society Series B},
      year={2023}}
    @inproceedings{voracek2025star, title={STaR-Bets: Sequential Target-Recalculating Bets for Tighter Confidence
      Intervals}, author={Voracek, Vaclav and Orabona, Francesco}, booktitle={NeurIPS}, year={2025}}
    @article{clopper1934use, title={The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial},
      author={Clopper, C. J. and Pearson, E. S.}, journal={Biometrika}, year={1934}}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Promise", "Step", "Walk", "betting_p", "binomial_p", "binomial_upper", "walk"]

_LARGEST_BET = 0.98
"""Share of the wealth that one example may cost: 0.9 passed 0.89 of the time where this passed 1.00 (500 shares that
average a third of the limit), and at 1 a single example can leave nothing."""


def binomial_p(ones: int, n: int, limit: float) -> float:
    """P(X <= ones) for X binomial(n, limit): the exact p-value of "the share of ones is more than limit"."""
    if ones >= n:
        return 1.0
    x = torch.arange(ones + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    terms = ways + x * math.log(limit) + (n - x) * math.log1p(-limit)
    return min(1.0, math.exp(float(torch.logsumexp(terms, dim=0))))


def binomial_upper(ones: int, n: int, confidence: float) -> float:
    """The exact one-sided upper confidence bound of a share (Clopper and Pearson): where ``binomial_p`` is the rest."""
    return 1.0 if ones >= n else _crossing(lambda m: binomial_p(ones, n, m) <= 1 - confidence, ones / n, 1.0)


def betting_p(drops: np.ndarray, limit: float, high: float, confidence: float, n: int | None = None) -> float:
    """The p-value of "the mean is more than limit" for drops float64 [n], none of them above ``high``.

    Wealth starts at 1 and is multiplied by ``1 + bet * (limit - drop)`` for each drop. If the mean were more than the
    limit, wealth would be a non-negative supermartingale, and the chance that it ever reaches w at most 1 ÷ w (Ville);
    so 1 ÷ its highest value is a p-value, and one may stop whenever it is low enough. Bets aim at a p-value of
    1 - confidence, and once they are there at half of that and so on. Examples are taken in a fixed shuffled order, so
    that a file that is sorted by kind of document counts as its mixture. With ``n`` the drops are the first of n, in
    an order that was shuffled before.
    """
    if n is None:
        n, drops = len(drops), _shuffled(drops)
    target, room = -math.log1p(-confidence), high - limit
    largest, wealth, best = _LARGEST_BET / room, 0.0, 0.0
    # The second moment about the limit, from the past alone; it starts as if one drop had been half the room away.
    squares, seen = 0.25 * room * room, 1
    for drop in drops.tolist():
        bet = min(math.sqrt(2 * (target - wealth) * seen / ((n - seen + 1) * squares)), largest)
        gain = limit - drop
        wealth += math.log1p(bet * gain)
        best = max(best, wealth)
        if wealth >= target:
            target = wealth + math.log(2)
        squares += gain * gain
        seen += 1
    return math.exp(-best)


def _shuffled(drops: np.ndarray) -> np.ndarray:
    return drops[np.random.default_rng(0).permutation(len(drops))]


def _crossing(rejects: Callable[[float], bool], low: float, high: float) -> float:
    """The least mean in low..high that is rejected, to 1e-6 of the range; high counts as rejected."""
    for _ in range(20):
        middle = (low + high) / 2
        if rejects(middle):
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True)
class Step:
    """One configuration of a path: its plain mean drop over the ``n`` examples that it took to decide, the test's
    p-value, how many of their drops were clipped from above."""

    drop: float
    p_value: float
    clipped: int
    passed: bool
    n: int


@dataclass(frozen=True)
class Promise:
    """What a configuration has to keep: a mean drop of at most ``max_drop``, at this ``confidence``.

    Args:
        max_drop: more than 0. 0.01 is one point of accuracy, or with ``relative`` one per cent of perplexity.
        confidence: in 0..1, both left out.
        bounds: the least and greatest drop that there can be; None if there are none. Boolean drops need none.
        relative: drops are differences of log-loss, and ``exp(mean drop) <= 1 + max_drop`` is promised.
        clip: without bounds, no drop counts for more than so many times the limit, in either direction. The worst
            of 160 windows of 128 tokens lost 3.8 times log(1.01) when SmolLM2 kept 70 % of its units, and 11.7 at 60 %.

    Raises ValueError for values that make no sense.
    """

    max_drop: float
    confidence: float = 0.95
    bounds: tuple[float, float] | None = None
    relative: bool = False
    clip: float = 10.0

    def __post_init__(self) -> None:
        if not 0.0 < self.confidence < 1.0:
            raise ValueError(f"confidence must be between 0 and 1, both left out, got {self.confidence}")
        if not 0.0 < self.max_drop < math.inf:
            raise ValueError(
                f"max_drop must be more than 0, got {self.max_drop}: no data can show that nothing is lost"
            )
        if not 1.0 < self.clip < math.inf:
            raise ValueError(f"clip must be more than 1 (times the limit), got {self.clip}")
        if self.bounds and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds must be (least, greatest) drop, got {self.bounds}")
        if self.bounds and self.limit >= self.bounds[1]:
            raise ValueError(
                f"max_drop must be less than the greatest drop there can be ({self.bounds[1]:g}), got {self.max_drop}"
            )

    @property
    def limit(self) -> float:
        """The greatest mean drop allowed, in the units of the drops: ``log(1 + max_drop)`` if relative."""
        return math.log1p(self.max_drop) if self.relative else self.max_drop

    def as_drop(self, mean: float) -> float:
        """A mean of drops in the units of ``max_drop``."""
        return math.expm1(mean) if self.relative else mean

    @property
    def _range(self) -> tuple[float, float]:
        return self.bounds or (-self.clip * self.limit, self.clip * self.limit)

    def bound(self, binary: bool = False) -> str:
        """The test's name: "binomial", "betting" or "clipped betting"."""
        return "binomial" if binary else "betting" if self.bounds else "clipped betting"

    def needed(self, binary: bool = False) -> int:
        """How many examples it takes for a configuration that changes nothing to pass."""
        if binary:
            return math.ceil(math.log1p(-self.confidence) / math.log1p(-self.limit))
        room = self._range[1] - self.limit
        few = math.ceil(-math.log1p(-self.confidence) / math.log1p(_LARGEST_BET * self.limit / room)) - 1
        many = 2 * few + 2
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if self.test(np.zeros(middle)).passed else (middle, many)
        return many

    def check(self, n: int, binary: bool = False) -> None:
        """Raise ValueError if n examples are too few for anything to pass. ``binary``: their drops are 0 or 1."""
        if not n:
            raise ValueError("there are no examples: give calibration data")
        if binary and self.limit >= 1:
            raise ValueError(f"max_drop must be less than 1 for drops of 0 and 1, got {self.max_drop}")
        if not self.test(np.zeros(n, dtype=bool if binary else float)).passed:
            raise ValueError(
                f"a drop of at most {self.max_drop:g} at confidence {self.confidence:g} takes at least "
                f"{self.needed(binary)} examples, even if nothing is lost; got {n}. Give more, or ask for less"
            )

    def _p_value(self, drops: np.ndarray, limit: float, n: int | None) -> float:
        if drops.dtype == bool:
            # The number of ones has a binomial distribution only where nobody stopped because of it.
            return binomial_p(int(drops.sum()), len(drops), limit) if n in (None, len(drops)) else 1.0
        low, high = self._range
        return betting_p(np.clip(drops, low, high), limit, high, self.confidence, n)

    def test(self, drops: np.ndarray, n: int | None = None) -> Step:
        """drops, float64 or bool, finite and inside ``bounds`` -> what the test says of them. ``n``: they are the first
        of n in an order that was shuffled before; None: they are all, in any order."""
        mean, p_value = float(drops.mean()), self._p_value(drops, self.limit, n)
        clipped = 0 if self.bounds or drops.dtype == bool else int((drops > self._range[1]).sum())
        passed = p_value <= 1 - self.confidence and mean <= self.limit
        return Step(self.as_drop(mean), p_value, clipped, passed, len(drops))

    def hopeless(self, drops: np.ndarray, n: int) -> bool:
        """True if the first drops of n cannot pass any more, even if the rest of the examples loses nothing."""
        return not self.test(np.concatenate([drops, np.zeros(n - len(drops), drops.dtype)]), n).passed

    def upper(self, drops: np.ndarray) -> float:
        """The upper confidence bound of the mean (clipped) drop of drops that passed, in the units of ``max_drop``;
        they come in an order that was shuffled before."""

        def rejects(mean: float) -> bool:
            return self._p_value(drops, mean, len(drops)) <= 1 - self.confidence

        return self.as_drop(_crossing(rejects, float(drops.mean()), self.limit))


@dataclass(frozen=True)
class Walk:
    """What was tried, densest first; ``chosen``: the index of the last that passed, None if the first one failed.

    ``upper``: upper confidence bound of the chosen one's drop, None without one. ``bound``: the test's name.
    """

    tried: tuple[Step, ...]
    chosen: int | None
    n: int
    bound: str
    upper: float | None


class _Trial:
    """The drops of one configuration, of which no more are asked for than it takes to decide."""

    def __init__(self, given: Any, promise: Promise, index: int, n: int | None):
        whole = isinstance(given, (Tensor, np.ndarray))
        self._promise, self._index = promise, index
        self._parts: Iterator[np.ndarray] = iter([_shuffled(self._check(given))] if whole else map(self._check, given))
        first = next(self._parts, np.empty(0))
        self.n = len(first) if whole or n is None else n
        self.drops = first

    def _check(self, values: Any) -> np.ndarray:
        return _checked(values, self._promise, self._index)

    def decide(self) -> Step:
        """What the test says as soon as it says something."""
        while not (step := self._promise.test(self.drops, self.n)).passed:
            if self._promise.hopeless(self.drops, self.n) or not self._more():
                break
        return step

    def finish(self) -> Step:
        """What the test says of all examples."""
        while self._more():
            pass
        return self._promise.test(self.drops, self.n)

    def _more(self) -> bool:
        part = next(self._parts, None)
        if part is not None:
            self.drops = np.concatenate([self.drops, part])
        if len(self.drops) > self.n or (part is None and len(self.drops) < self.n):
            raise ValueError(f"configuration {self._index} gave drops of {len(self.drops)} examples, not of {self.n}")
        return part is not None


def walk(
    path: Sequence[Any],
    evaluate: Callable[[Any], Tensor | np.ndarray | Iterable[Tensor | np.ndarray]],
    promise: Promise,
    n: int | None = None,
) -> Walk:
    """Test the configurations of ``path`` from the densest to the sparsest, and stop at the first that fails.

    The chance that the chosen one breaks the promise is at most ``1 - promise.confidence``, provided that path and
    order were fixed before these examples were seen.

    Args:
        evaluate: configuration -> how much worse than dense it did on each example, floating or bool [n]; or an
            iterable of such parts, n in all, in an order shuffled beforehand. Of parts no more are asked for than it
            takes to decide (a betting test may stop at any time), and all of them of the configuration that is chosen.
        n: how many examples there are; needed for parts.

    Raises:
        ValueError: an empty path; no examples, or too few for anything to pass; a drop that is NaN, infinite or out of
            bounds; another number of examples than before.
    """
    if not len(path):
        raise ValueError("path is empty: give at least one configuration")
    tried: list[Step] = []
    first = last = None
    for index, configuration in enumerate(path):
        trial = _Trial(evaluate(configuration), promise, index, n)
        if first is None:
            first = trial
            promise.check(trial.n, trial.drops.dtype == bool)
        given, before = (f"{one.n} of {one.drops.dtype}" for one in (trial, first))
        if given != before:
            raise ValueError(f"configuration {index} gave drops of other examples: {given}, the first {before}")
        tried.append(trial.decide())
        if not tried[-1].passed:
            break
        last = trial
    assert first is not None
    chosen = sum(step.passed for step in tried) - 1
    # All that passed may be chosen: one whose plain mean over all examples is above the limit is not.
    while last is not None:
        tried[chosen] = last.finish()
        if tried[chosen].passed:
            break
        tried = tried[: chosen + 1]
        chosen -= 1
        last = _Trial(evaluate(path[chosen]), promise, chosen, n) if chosen >= 0 else None
    upper = None if last is None else promise.upper(last.drops)
    bound = promise.bound(first.drops.dtype == bool)
    return Walk(tuple(tried), None if last is None else chosen, first.n, bound, upper)


def _checked(values: Tensor | np.ndarray, promise: Promise, index: int) -> np.ndarray:
    """float64 or bool [n]; raises ValueError that names the first bad example."""
    if isinstance(values, Tensor):
        values = (values.double() if values.is_floating_point() else values).detach().cpu().numpy()
    drops = np.asarray(values)
    if drops.ndim != 1 or not (drops.dtype == bool or np.issubdtype(drops.dtype, np.floating)):
        raise ValueError(f"drops must be floating or bool [n], got {drops.dtype} {list(drops.shape)}")
    if drops.dtype == bool:
        return drops
    drops = drops.astype(np.float64)
    low, high = promise.bounds or (-np.inf, np.inf)
    bad = ~np.isfinite(drops) | (drops < low) | (drops > high)
    if bad.any():
        example = int(bad.argmax())
        allowed = f"in {low:g}..{high:g}" if promise.bounds else "finite"
        raise ValueError(
            f"drops must be {allowed}, got {drops[example]} for example {example} at configuration {index} of the "
            "path. Look for NaN or infinity in the data and in the model's answers"
        )
    return drops
