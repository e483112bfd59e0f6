"""The cheapest setting of a selector that keeps a promise about its answers, with a stated confidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tried:
    """One setting: the share of tokens whose top-1 was the exact one, its lower confidence bound, and its cost.

    ``rows_per_token``: multiply-accumulates that ran ÷ in_features, routing included: how many rows of the bank the
    same work would have scored.
    """

    setting: int
    agreement: float
    lower: float
    rows_per_token: float
    passed: bool


@dataclass(frozen=True)
class TuneReport:
    """What :meth:`SelectiveHead.tune` tried, dearest first, and what it kept.

    ``chosen``: the setting left in place; None if none kept the promise, and the head then gives exact answers.
    """

    tried: tuple[Tried, ...]
    chosen: int | None
    tokens: int
    agreement: float
    confidence: float

    @property
    def passed(self) -> bool:
        """True if a setting kept the promise."""
        return self.chosen is not None

    def __str__(self) -> str:
        promise = f"top-1 as the exact one for {self.agreement:.2%} of inputs, with {self.confidence:.0%} confidence"
        lines = [f"{promise}, held on {self.tokens:,} tokens:"]
        for one in self.tried:
            verdict = "kept" if one.passed else "missed"
            lines.append(
                f"  setting {one.setting}: agreement {one.agreement:.3%}, at least {one.lower:.3%}, "
                f"{one.rows_per_token:,.0f} rows per token: {verdict}"
            )
        lines.append(
            f"chosen: setting {self.chosen}" if self.passed else "none was kept: answers are exact from now on"
        )
        return "\n".join(lines)


def _log_tail(successes: int, trials: int, chance: float) -> float:
    """log P(X >= successes) for X binomial(trials, chance), 0 < chance < 1."""
    x = torch.arange(successes, trials + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    return float(torch.logsumexp(ways + x * math.log(chance) + (n - x) * math.log1p(-chance), dim=0))


def lower_bound(successes: int, trials: int, confidence: float) -> float:
    """The exact lower confidence bound of a share.

    Source: Clopper and Pearson, The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial,
    Biometrika 1934. One-sided: the share at which so many successes or more have the chance 1 - confidence.
    """
    if successes == 0:
        return 0.0
    if successes == trials:
        return (1.0 - confidence) ** (1.0 / trials)
    low, high = 0.0, successes / trials
    for _ in range(60):
        middle = (low + high) / 2
        if _log_tail(successes, trials, middle) > math.log1p(-confidence):
            high = middle
        else:
            low = middle
    return low


def tokens_needed(agreement: float, confidence: float) -> int:
    """How many tokens it takes to keep the promise if every single one agrees."""
    return math.ceil(math.log1p(-confidence) / math.log(agreement))


def check_promise(tokens: int, agreement: float, confidence: float) -> None:
    """Raise ValueError unless the promise makes sense and that many tokens can ever keep it."""
    for name, value in (("agreement", agreement), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must be between 0 and 1, both left out, got {value}")
    needed = tokens_needed(agreement, confidence)
    if tokens < needed:
        raise ValueError(
            f"agreement {agreement} at confidence {confidence} takes at least {needed} tokens, all of which agree; "
            f"got {tokens}. Give more, or ask for less"
        )


def walk_down(
    settings: Sequence[int],
    measure: Callable[[int], tuple[int, float]],
    tokens: int,
    agreement: float,
    confidence: float,
) -> tuple[list[Tried], int | None]:
    """Test settings from the dearest to the cheapest, and stop at the first that fails.

    settings: cheapest first. measure(setting) -> (how many tokens agree, rows per token). Returns what was tried and
    the last setting that passed, or None. Because the order is fixed beforehand and the first failure ends it, every
    test may use the whole error budget: the chance that any setting passes which does not deserve to is at most
    1 - confidence. Source: Angelopoulos, Bates, Candes, Jordan, Lei, Learn then Test, 2021, section 3.2 (fixed
    sequence testing, Bauer 1991)::

        @article{angelopoulos2021learn, title={Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
          Control}, author={Angelopoulos, Anastasios N. and Bates, Stephen and Candes, Emmanuel J. and Jordan,
          Michael I. and Lei, Lihua}, journal={arXiv:2110.01052}, year={2021}}
    """
    tried: list[Tried] = []
    chosen = None
    for setting in reversed(settings):
        agreed, rows = measure(setting)
        lower = lower_bound(agreed, tokens, confidence)
        tried.append(Tried(setting, agreed / tokens, lower, rows, lower >= agreement))
        if not tried[-1].passed:
            break
        chosen = setting
    return tried, chosen
