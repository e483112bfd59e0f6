"""Paired timing: right on a clock that we control, unbiased on the real one; the headline is the smallest saving."""

from __future__ import annotations

import functools
import gc
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparingly.compare import Comparison, Paired, compare, null_test, paired
from sparingly.energy.meters.base import Meter, Reading
from sparingly.energy.records import Record


class Clock:
    """Processor time in nanoseconds that only work moves on: a mean with log-normal noise, and a drift."""

    def __init__(self, seed: int = 0, noise: float = 0.1, drift: float = 0.0):
        self.now, self.calls = 0, 0
        self.noise, self.drift, self.rng = noise, drift, np.random.default_rng(seed)

    def __call__(self) -> int:
        return self.now

    def work(self, cost_ns: float):
        def run() -> None:
            self.calls += 1
            slow = 1 + self.drift * self.calls
            self.now += int(cost_ns * slow * math.exp(self.rng.normal(0, self.noise)))

        return run


def product(size: int) -> torch.Tensor:
    return torch.ones(size, size) @ torch.ones(size, size)


def test_a_against_a_covers_1_in_about_95_percent_of_300_repetitions():
    covered = 0
    for repetition in range(300):
        clock = Clock(repetition)
        result = null_test(clock.work(6e6), clock=clock, seed=repetition)
        covered += result.lo <= 1 <= result.hi
    # Five standard deviations of a binomial (300, 0.95) below; all 300 would be an interval that says nothing.
    assert 266 <= covered <= 298


def test_a_known_ratio_is_found_and_kept_apart_from_1():
    clock = Clock()
    result = paired(clock.work(12e6), clock.work(6e6), clock=clock)
    assert result.lo <= 2 <= result.hi
    assert result.lo > 1.8
    assert result.differs
    assert result.a_s == pytest.approx(0.012, rel=0.1)
    assert result.b_s == pytest.approx(0.006, rel=0.1)
    assert result.n == 30


def test_drift_over_the_run_does_not_bias():
    clock = Clock(noise=0.02, drift=0.02)
    result = paired(clock.work(6e6), clock.work(6e6), clock=clock, pairs=100, warmup=0)
    assert 0.95 < result.value < 1.05


def test_order_within_pairs_is_random():
    clock = Clock(noise=0.0)
    order: list[str] = []

    def side(name: str):
        run = clock.work(6e6)

        def work() -> None:
            order.append(name)
            run()

        return work

    paired(side("a"), side("b"), clock=clock, warmup=0)
    firsts = order[2::2]
    assert order[:2] == ["a", "b"]
    assert len(firsts) == 30
    assert 5 < firsts.count("a") < 25


def test_small_work_is_repeated_until_a_sample_is_long_enough():
    clock = Clock(noise=0.0)
    spans: list[int] = []
    last = [0]

    def watched() -> int:
        spans.append(clock.now - last[0])
        last[0] = clock.now
        return clock.now

    paired(clock.work(1e5), clock.work(1e5), clock=watched, warmup=0)
    assert all(span == 0 or span >= 5e6 for span in spans[-120:])
    with pytest.raises(ValueError, match="no processor time"):
        paired(lambda: None, lambda: None, clock=lambda: 0, warmup=0)


def test_a_difference_under_5_percent_is_never_claimed():
    clock = Clock(noise=0.001)
    result = paired(clock.work(6.2e6), clock.work(6e6), clock=clock)
    assert result.lo > 1
    assert not result.differs
    assert "no difference claimed" in str(result)


def test_the_same_seed_gives_the_same_interval_and_confidence_widens_it():
    first, again = (paired((c := Clock(7)).work(6e6), c.work(6e6), clock=c) for _ in range(2))
    assert first == again
    clock = Clock(7)
    wide = paired(clock.work(6e6), clock.work(6e6), clock=clock, confidence=0.999)
    assert wide.lo < first.lo
    assert wide.hi > first.hi


def test_threads_and_garbage_collection_are_put_back():
    threads = torch.get_num_threads()
    seen: list[tuple[int, bool]] = []
    clock = Clock()
    run = clock.work(6e6)

    def work() -> None:
        seen.append((torch.get_num_threads(), gc.isenabled()))
        run()

    result = paired(work, work, threads=1, clock=clock)
    assert set(seen) == {(1, False)}
    assert result.threads == 1
    assert (torch.get_num_threads(), gc.isenabled()) == (threads, True)


@pytest.mark.parametrize("bad", [{"pairs": 4}, {"warmup": -1}, {"processes": 0}, {"threads": 0}, {"confidence": 1.0}])
def test_bad_options_are_refused_with_what_was_given(bad: dict[str, float]):
    with pytest.raises(ValueError, match=str(next(iter(bad)))):
        paired(product, product, **bad)  # pyright: ignore[reportArgumentType]


def test_null_test_on_a_real_workload_includes_1_and_a_broken_rig_would_not():
    # A shared machine can slow down while it runs, for tenths of a per cent in one direction: a broken rig fails each
    # time, an honest one does not. The second half shows what it still catches.
    work, double = functools.partial(product, 96), lambda: (product(96), product(96))
    nulls = [null_test(work, pairs=40, threads=1, confidence=0.999, seed=seed) for seed in range(3)]
    assert any(null.lo <= 1 <= null.hi for null in nulls), str(nulls)
    skewed = paired(double, work, pairs=40, threads=1, confidence=0.999)
    assert skewed.lo > 1.2, str(skewed)
    assert not any(null.differs for null in nulls)


def test_several_processes_are_resampled_by_process():
    work = functools.partial(pow, 3, 20_000)
    result = paired(work, work, processes=2, pairs=5, warmup=1, min_sample_s=0.001)
    assert (result.n, result.processes, len(result.log_ratios)) == (10, 2, 2)
    assert result.lo <= result.value <= result.hi


class NoMeter(Meter):
    source, min_window_s = "none", 1.0

    def unavailable(self) -> str | None:
        return "RAPL needs root"

    def scopes(self) -> list[str]:
        return ["cpu"]

    def read(self) -> Reading:
        raise OSError("unavailable")

    def records(self, start: Reading, end: Reading) -> list[Record]:
        raise AssertionError("not to be asked")


class Draws(NoMeter):
    """Gives the next of ``joules`` for each window."""

    def __init__(self, joules: list[float]):
        self.joules = joules

    def unavailable(self) -> str | None:
        return None

    def read(self) -> Reading:
        return Reading(0.0)

    def records(self, start: Reading, end: Reading) -> list[Record]:
        value = self.joules.pop(0)
        return [Record(value, value * 0.95, value * 1.05, "measured", "draws", "cpu", window_s=10.0, n=1)]


@pytest.fixture
def layers():
    return torch.nn.Linear(256, 2000), torch.nn.Linear(256, 20), torch.randn(4, 256)


def run(layers, **options) -> Comparison:
    dense, selective, x = layers
    with torch.inference_mode():
        return compare(dense, selective, x, pairs=5, **{"meters": [NoMeter()], **options})


def ruler(result: Comparison, name: str):
    (found,) = [r for r in result.rulers if r.name == name]
    return found


def test_rulers_are_the_ledger_the_clock_and_the_joules(layers):
    result = run(layers)
    assert ruler(result, "MACs").value == 100
    assert (ruler(result, "MACs").dense, ruler(result, "MACs").selective) == (4 * 256 * 2000, 4 * 256 * 20)
    assert ruler(result, "processor time").value == result.cpu.value
    assert ruler(result, "joules, cpu").value is None
    assert "RAPL needs root" in str(ruler(result, "joules, cpu").reason)


def test_the_headline_is_the_smallest_saving(layers):
    result = run(layers)
    savings = [r.value for r in result.rulers if r.value is not None]
    assert result.headline.value == min(savings)
    assert result.headline.name != "MACs"


def test_measured_joules_can_be_the_smallest(layers):
    result = run(layers, meters=[Draws([0.2, 2.0])], energy_s=0.0)
    assert ruler(result, "joules, cpu").value == pytest.approx(0.1)
    assert result.headline.name == "joules, cpu"
    assert result.energy["dense"][0].unit == "J/call"


def test_a_selective_side_that_costs_more_says_so(layers):
    dense, selective, x = layers
    result = run((selective, dense, x))
    assert "no saving" in result.summary()
    assert result.headline.value is not None
    assert result.headline.value < 1


def test_nothing_is_claimed_from_an_interval_that_includes_1_or_under_5_percent(layers):
    result = run(layers)

    def summary(value: float, lo: float, hi: float) -> str:
        timed = [replace(r, value=value, lo=lo, hi=hi) if r.name == "processor time" else r for r in result.rulers]
        return replace(result, rulers=tuple(timed)).summary()

    assert "no difference claimed" in summary(1.5, 0.9, 2.5)
    assert "no difference claimed" in summary(1.04, 1.03, 1.05)
    assert "at least 1.5 times" in summary(1.5, 1.4, 1.6)
    assert "costs 2 times as much" in summary(0.5, 0.4, 0.6)


def test_low_coverage_takes_the_ledger_off_the_rulers(layers):
    dense, _, x = layers
    with torch.library._scoped_library("sparingly_test_compare", "DEF") as library:
        library.define("mystery(Tensor x) -> Tensor")
        library.impl("mystery", lambda x: x @ x.T, "CPU")
        result = run((dense, torch.ops.sparingly_test_compare.mystery, x))
    assert ruler(result, "MACs").value is None
    assert "selective" in str(ruler(result, "MACs").reason)
    assert all(r.value is None for r in result.modelled)
    assert result.headline.name == "processor time"


def test_quality_is_shown_and_its_absence_too(layers):
    assert "quality not given" in run(layers).summary()
    assert "0.91" in str(run(layers, quality={"P@1 dense": 0.9, "P@1 selective": 0.91}))


def test_tuples_are_unpacked_and_json_is_plain(layers):
    result = compare(torch.mul, torch.add, (torch.ones(500, 500), torch.ones(500, 500)), pairs=5, meters=[])
    content = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert content["headline"]["name"] in {"MACs", "bytes", "processor time"}
    assert ruler(result, "MACs").value is None
    assert isinstance(result.cpu, Paired)
