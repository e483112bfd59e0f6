"""tune: its bound is exact, its promise holds in simulation, and what it leaves behind is what it says."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sparingly as sp
from sparingly.nn.tune import check_promise, lower_bound, tokens_needed, walk_down


class Known(sp.Selector):
    """Finds the best class with a chance that depends on the setting."""

    def __init__(self, chances: tuple[float, ...]):
        super().__init__()
        self.chances = chances

    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        self.num_units = bank.shape[0]

    def select(self, hidden: Tensor) -> sp.Selection:
        raise NotImplementedError

    def topk(self, hidden, bank, bias, k, scale=None):
        scores = hidden @ bank.T
        best = scores.argmax(dim=1)
        missed = torch.rand(hidden.shape[0]) >= self.chances[self.setting]
        classes = torch.where(missed, (best + 1) % bank.shape[0], best)[:, None]
        return scores.gather(1, classes), classes

    def settings(self) -> list[int]:
        return list(range(len(self.chances)))

    def config(self) -> dict[str, Any]:
        return {}


def head_with(*chances: float) -> sp.SelectiveHead:
    head = sp.SelectiveHead(4, 50, selector=Known(chances), bias=False)
    head.refresh()
    return head


def test_it_keeps_the_cheapest_setting_before_the_first_failure():
    head = head_with(0.2, 0.9, 1.0, 0.3, 1.0, 1.0)
    report = head.tune(torch.randn(1000, 4), agreement=0.95)
    assert [one.setting for one in report.tried] == [5, 4, 3]
    assert [one.passed for one in report.tried] == [True, True, False]
    assert report.chosen == head.selector.setting == 4 and report.passed and not head.exact
    assert report.tried[2].agreement == pytest.approx(0.3, abs=0.1)
    assert "setting 4" in str(report) and "missed" in str(report)


def test_if_none_is_good_enough_answers_are_exact_and_counted():
    head = head_with(0.2, 0.5)
    hidden = torch.randn(500, 4)
    report = head.tune(hidden)
    assert report.chosen is None and not report.passed and head.exact
    assert "exact" in str(report)
    with pytest.warns(UserWarning, match="no setting"):
        _, classes = head.topk(hidden, 1)
    assert torch.equal(classes[:, 0], head(hidden).argmax(dim=1))
    assert list(head.fallbacks.values()) == [500]
    assert head.tune(hidden, agreement=0.1).chosen == 0
    assert not head.exact


def test_it_measures_what_it_costs():
    head = sp.SelectiveHead(8, 400, selector=sp.Random(40), bias=False)
    head.refresh()
    (tried,) = head.tune(torch.randn(300, 8), agreement=0.5, confidence=0.9).tried
    assert tried.rows_per_token == 40


def test_the_fallback_for_missing_classes_is_part_of_the_answer_but_not_counted():
    head = head_with(1.0)
    head.selector.topk = lambda hidden, *_: (  # pyright: ignore[reportAttributeAccessIssue]
        torch.full((hidden.shape[0], 1), -torch.inf),
        torch.full((hidden.shape[0], 1), -1),
    )
    report = head.tune(torch.randn(300, 4))
    assert report.passed and report.tried[0].agreement == 1.0
    assert report.tried[0].rows_per_token == 50
    assert head.fallbacks == {}


def test_an_error_leaves_the_setting():
    head = head_with(1.0, 1.0)
    head.selector.setting = 1
    with pytest.raises(ValueError, match=r"at least 299 tokens.*got 298"):
        head.tune(torch.randn(298, 4))
    head.selector.topk = lambda *_: 1 / 0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ZeroDivisionError):
        head.tune(torch.randn(299, 4))
    assert head.selector.setting == 1


def test_an_unfitted_selector_cannot_be_tuned():
    head = sp.SelectiveHead(4, 50, selector=Known((1.0,)))
    with pytest.raises(RuntimeError, match="refresh"):
        head.tune(torch.randn(300, 4))


@pytest.mark.parametrize("name", ["agreement", "confidence"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 99.0])
def test_a_promise_outside_0_to_1_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be between"):
        head_with(1.0).tune(torch.randn(400, 4), **{name: value})


@pytest.mark.parametrize(("agreement", "confidence"), [(0.99, 0.95), (0.9, 0.99), (0.5, 0.5)])
def test_the_tokens_needed_are_just_enough(agreement, confidence):
    needed = tokens_needed(agreement, confidence)
    check_promise(needed, agreement, confidence)
    assert lower_bound(needed, needed, confidence) >= agreement
    with pytest.raises(ValueError, match=str(needed)):
        check_promise(needed - 1, agreement, confidence)
    assert lower_bound(needed - 1, needed - 1, confidence) < agreement


@pytest.mark.parametrize(("successes", "trials"), [(1, 3), (9, 10), (985, 1000), (19_900, 20_000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_bound_is_where_the_tail_has_the_chance_left(successes, trials, confidence):
    low = lower_bound(successes, trials, confidence)
    tail = sum(
        math.exp(
            math.lgamma(trials + 1)
            - math.lgamma(x + 1)
            - math.lgamma(trials - x + 1)
            + x * math.log(low)
            + (trials - x) * math.log1p(-low)
        )
        for x in range(successes, trials + 1)
    )
    assert tail == pytest.approx(1 - confidence, rel=1e-6)


def test_the_bound_of_nothing_is_0_and_of_known_cases_known():
    assert lower_bound(0, 10, 0.95) == 0.0
    # R: binom.test(990, 1000, alternative = "greater")$conf.int[1]
    assert lower_bound(990, 1000, 0.95) == pytest.approx(0.98310, abs=2e-5)


def violations(chances, tokens, agreement, confidence, repetitions) -> float:
    """The share of repetitions in which the kept setting does not deserve it."""
    wrong = 0
    for _ in range(repetitions):
        draws = torch.rand(len(chances), tokens)

        def measure(setting, draws=draws):
            return int((draws[setting] < chances[setting]).sum()), 0.0

        _, chosen = walk_down(range(len(chances)), measure, tokens, agreement, confidence)
        wrong += chosen is not None and chances[chosen] < agreement
    return wrong / repetitions


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_promise_holds_in_simulation(confidence, monkeypatch):
    monkeypatch.setattr("sparingly.nn.tune.lower_bound", functools.cache(lower_bound))
    # Just under what is asked for, where a mistake is most likely, and over a ladder with more than one such step.
    chances = (0.9, 0.9499, 0.9499, 0.9499, 0.97, 0.99)
    share = violations(chances, 400, 0.95, confidence, 1000)
    error = math.sqrt(confidence * (1 - confidence) / 1000)
    assert share <= 1 - confidence + 3 * error
    assert share > 0, "a bound that never fails is not tight, and this simulation could not see it fail"


def test_the_simulation_sees_a_broken_bound(monkeypatch):
    monkeypatch.setattr("sparingly.nn.tune.lower_bound", lambda successes, trials, confidence: successes / trials)
    assert violations((0.9, 0.9499, 0.97), 400, 0.95, 0.95, 300) > 0.2
