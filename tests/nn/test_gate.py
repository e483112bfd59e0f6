"""A gate over a stream: whom it asks for what, pieces and single items, what it keeps, and what it promises."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparingly as sp
from sparingly.nn.gate import ALWAYS, Counts, runs


class Scout:
    """The first column; remembers how many items it was asked about."""

    def __init__(self):
        self.asked, self.resets = [], 0

    def __call__(self, items: Any) -> np.ndarray:
        self.asked.append(len(items))
        return np.asarray(items)[:, 0]

    def reset(self) -> None:
        self.resets += 1


class Stepping(Scout):
    def step(self, item: Any) -> float:
        return float(item[0])


class Mean:
    """A net with a state: the mean of the second column since its reset."""

    def __init__(self):
        self.calls, self.resets, self.sum, self.n = [], 0, 0.0, 0

    def reset(self) -> None:
        self.resets += 1
        self.sum, self.n = 0.0, 0

    def __call__(self, items: Any) -> np.ndarray:
        values = np.asarray(items)[:, 1]
        self.calls.append(values.tolist())
        sums = self.sum + np.cumsum(values)
        counts = self.n + np.arange(1, len(values) + 1)
        self.sum, self.n = float(sums[-1]), int(counts[-1])
        return sums / counts


class Lean(Mean):
    """The same with a way for single items, and one for several runs."""

    def step(self, item: Any) -> float:
        return float(self(item[None])[0])

    def runs(self, runs: list[Any]) -> list[np.ndarray]:
        found = []
        for one in runs:
            self.reset()
            found.append(self(one))
        return found


def second(items: Any) -> np.ndarray:
    """A net without a state."""
    return np.asarray(items)[:, 1]


def stream(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 2)).astype(np.float32)


def gate(net: Any, threshold: float = 0.9, scout: Any = None, **options: Any) -> sp.Gate:
    made = sp.Gate(scout or Scout(), net, **options)
    made.threshold = threshold
    return made


def test_the_network_is_called_for_what_the_scout_asks_and_no_more():
    net = Mean()
    made = gate(net, before=2, after=1)
    x = np.zeros((12, 2), np.float32)
    x[:, 1] = np.arange(12)
    x[[4, 5, 10], 0] = 1.0
    out = made(x)
    # Awake at 4, 5 and one after, and at 10 and 11; each time reset and warmed up on the two before.
    assert net.calls == [[2, 3, 4, 5, 6], [8, 9, 10, 11]] and net.resets == 2
    assert out.tolist() == [0, 0, 0, 0, 3.0, 3.5, 4.0, 0, 0, 0, 9.0, 9.5] and out.dtype == torch.float32
    assert made.counts == Counts(items=12, awake=5, ran=9, wakes=2, failed=0)
    assert made.counts.share_awake == pytest.approx(5 / 12)


def test_a_network_that_keeps_nothing_is_not_warmed_up():
    asked = []
    made = gate(lambda items: asked.append(len(items)) or second(items), before=3, after=0)
    x = stream(50)
    asks = x[:, 0] >= 0.9
    assert np.allclose(made(x).numpy(), np.where(asks, x[:, 1], 0))
    assert sum(asked) == asks.sum() == made.counts.ran


def test_before_calibration_and_at_worst_the_network_answers_everything():
    net = Mean()
    made = sp.Gate(Scout(), net)
    x = stream(20)
    whole = np.cumsum(x[:, 1]) / np.arange(1, 21)
    assert np.allclose(torch.cat([made(x[:7]), made(x[7:])]).numpy(), whole) and net.resets == 1
    assert made.counts.share_awake == 1.0 and "always awake" in repr(made)


@pytest.mark.parametrize(("scout", "net"), [(Scout, Mean), (Stepping, Mean), (Stepping, Lean)])
@pytest.mark.parametrize("kind", [lambda x: x, torch.from_numpy], ids=["array", "tensor"])
def test_a_stream_in_pieces_or_item_by_item_gets_the_same_answers(scout: Any, net: Any, kind: Any):
    x = kind(stream(400))
    for before, after in ((0, 0), (3, 0), (0, 2), (5, 3), (40, 7)):
        whole, pieces, single = (gate(net(), scout=scout(), before=before, after=after) for _ in range(3))
        expected = whole(x)
        rng, cut = np.random.default_rng(before), 0
        parts = []
        while cut < len(x):
            size = int(rng.integers(0, 12))
            parts.append(pieces(x[cut : cut + size]))
            cut += size
        torch.testing.assert_close(torch.cat(parts), expected)
        assert [single.step(one) for one in x] == pytest.approx(expected.tolist(), rel=1e-5)
        assert whole.counts == pieces.counts == single.counts and 0 < whole.counts.awake < 400


def test_what_is_kept_survives_a_buffer_that_is_written_over():
    x = stream(60)
    made, whole = (gate(Mean(), scout=Stepping(), before=4, after=1) for _ in range(2))
    expected, buffer, answers = whole(x), np.empty(2, np.float32), []
    for one in x:
        buffer[:] = one
        answers.append(made.step(buffer))
    assert answers == pytest.approx(expected.tolist(), rel=1e-5)


def test_another_stream_begins_after_reset():
    scout, net = Scout(), Mean()
    made = gate(net, scout=scout, before=4, after=3)
    x = stream(40)
    x[-1, 0] = x[0, 0] = 1.0
    first = made(x)
    made.reset()
    assert torch.equal(made(x), first) and scout.resets == 1
    # Without it, the network is still awake.
    assert not torch.equal(made(x), first)
    made.reset_counts()
    assert made.counts == Counts()


def test_where_the_scout_raises_the_network_runs():
    def broken(items: Any) -> Any:
        raise ConnectionError("no route")

    for made in (gate(second, scout=broken, threshold=2.0), gate(second, scout=broken, threshold=2.0)):
        x = stream(5)
        assert np.allclose(made(x).numpy(), x[:, 1]) and made.step(x[0]) == pytest.approx(float(x[0, 1]))
        assert made.counts.failed == 6 and made.why_failed == "ConnectionError: no route"
        assert "6: ConnectionError: no route" in str(sp.explain(made))


def test_networks_are_run_in_evaluation_mode_and_their_state_is_saved():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = nn.Linear(2, 1), nn.Dropout(0.9)

        def forward(self, items: torch.Tensor) -> torch.Tensor:
            return self.drop(self.layer(items)).squeeze(1)

    net = Net()
    made = gate(net, threshold=0.5, after=0)
    x = torch.from_numpy(stream(30))
    out = made(x)
    assert not out.requires_grad and net.training and torch.equal(out, made(x))
    assert set(made.state_dict()) == {"net.layer.weight", "net.layer.bias", "_extra_state"}


@pytest.mark.parametrize(
    ("scout", "net", "match"),
    [
        (lambda x: np.full(len(x), np.nan), second, "scout gave NaN for item 0 of 3"),
        (
            lambda x: np.zeros((len(x), 1)),
            second,
            r"scout must give one score for each of 3 items, \[3\], got float64 \[3, 1\]",
        ),
        (lambda x: "yes", second, "scout must give an array or tensor of scores"),
        (lambda x: np.ones(len(x)), lambda x: np.zeros(1), r"net must give one score for each of 3 items"),
        (lambda x: np.ones(len(x)), lambda x: np.array([1, np.nan, 1]), "net gave NaN for item 1 of 3"),
    ],
)
def test_bad_scores_are_refused(scout: Any, net: Any, match: str):
    with pytest.raises((ValueError, TypeError), match=match):
        gate(net, scout=scout)(stream(3))


def test_bad_options_and_empty_streams():
    options: dict[str, Any]
    for options, match in (
        ({"miss_rate": 0.0}, "miss_rate must be between 0 and 1"),
        ({"miss_rate": 1.0}, "miss_rate must be between 0 and 1"),
        ({"before": -1}, "before must be at least 0"),
        ({"path": [1.0, 0.5]}, "path must hold finite thresholds in rising order"),
    ):
        with pytest.raises(ValueError, match=match):
            sp.Gate(Scout(), second, **options)
    with pytest.raises(TypeError, match="net must be callable, got int"):
        sp.Gate(Scout(), 3)  # pyright: ignore[reportArgumentType]
    for options, match in (
        ({"positive": 0.0}, "positive must be more than 0"),
        ({"shortest": 0}, "shortest must be at least 1"),
        ({"found": 1.5}, "found must be above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            sp.Events(**options)
    made = gate(second)
    assert made(stream(0)).shape == (0,) and made.counts == Counts() and runs(np.zeros(0, bool)).shape == (0, 2)


def test_what_counts_as_an_event_and_as_found():
    scores = np.array([0.6, 0, 0.9, 0.9, 0.5, 0.7, 0, 0.8, 0.8])
    assert sp.Events().of(scores).tolist() == [[0, 1], [2, 6], [7, 9]]
    events = sp.Events(shortest=2).of(scores)
    assert events.tolist() == [[2, 6], [7, 9]]
    answers = np.array([0, 0, 0, 0.9, 0.5, 0, 0, 0, 0])
    assert sp.Events(found=0.5).missed(events, answers).tolist() == [False, True]
    assert sp.Events(found=0.51).missed(events, answers).tolist() == [True, True]
    assert sp.Events(found=0.01).missed(events, answers).tolist() == [False, True]
    assert not sp.Events(found=1).missed(events, scores).any()


def bursts(streams: int, events: int, seed: int, miss: float) -> list[np.ndarray]:
    """Events of one item, 20 apart; the scout's score falls short of u with the chance ``miss`` * u ** 4."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(streams):
        x = np.zeros((20 * events, 2), np.float32)
        x[:, 0] = rng.uniform(0, 0.5, len(x))
        x[::20, 1] = 1.0
        x[::20, 0] = np.minimum((rng.random(events) / miss) ** 0.25, 1.0)
        made.append(x)
    return made


def test_calibration_keeps_its_contract_and_saves():
    made = sp.Gate(Scout(), second, 0.02, after=0)
    contract = sp.calibrate(made, bursts(8, 200, 0, miss=0.1))
    assert contract.holds and contract.n == 1200 and contract.bound == "binomial"
    assert contract.upper is not None and contract.upper <= 0.02 and contract.setting == {"threshold": made.threshold}
    # Between where a tenth of the events would be missed and where nothing is spared.
    assert 0.4 < made.threshold < 0.95 and made.expected.share_awake < 0.2 and made.counts == Counts()
    x = np.concatenate(bursts(50, 200, 1, miss=0.1))
    out = made(x).numpy()
    assert made.events.missed(made.events.of(second(x)), out).mean() < 0.02
    told = sp.explain(made)
    assert json.loads(json.dumps(told.as_dict()))["live"]["items"] == len(x) and "at most" in str(told)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    twin = sp.Gate(Scout(), second, 0.02, after=0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert twin.threshold == made.threshold and twin.sparingly_contract == contract and twin.expected == made.expected
    assert torch.equal(copy.deepcopy(made)(x[:99]), made(x[:99]))


def test_a_path_made_beforehand_lets_every_event_test():
    made = sp.Gate(Scout(), second, 0.02, after=0, path=[0.1, 0.3, 0.5, 0.7, 1.5])
    contract = sp.calibrate(made, bursts(2, 400, 0, miss=0.01), confidence=0.9)
    assert contract.n == 800 and made.threshold == 0.7 and [step.passed for step in contract.tried] == [1, 1, 1, 1, 0]


def test_where_nothing_passes_the_network_stays_awake():
    made = sp.Gate(Scout(), second, 0.02, after=0, path=[1.5, 2.0])
    contract = sp.calibrate(made, bursts(2, 400, 0, miss=0.1))
    assert not contract.holds and made.threshold == ALWAYS and made.expected.share_awake == 1.0


def test_a_failed_calibration_changes_nothing():
    good = bursts(4, 200, 0, miss=0.1)
    made = gate(second, threshold=0.7, miss_rate=0.02, after=0)
    before = made.state_dict()
    for streams, match in (
        ([], "no items"),
        ([good[0][:0]], "no items"),
        (good[:3], "at least 4 streams"),
        ([one * np.array([1, 0], np.float32) for one in good], "no events"),
        ([one[:200] for one in good], r"takes at least 149 examples.*got 30.*an example is an event"),
        ([*good[:3], good[3] * np.float32(np.nan)], "scout gave NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            sp.calibrate(made, streams)
        assert made.state_dict() == before
    with pytest.raises(TypeError, match="streams must be tensors or arrays"):
        sp.calibrate(made, ["speech"])
    with pytest.raises(ValueError, match="leave out metric, max_drop and against"):
        sp.calibrate(made, good, "accuracy")


def test_one_in_a_thousand_takes_nearly_three_thousand_events():
    made = sp.Gate(Scout(), second, path=[0.5])
    with pytest.raises(ValueError, match="takes at least 2995 examples"):
        sp.calibrate(made, bursts(1, 2994, 0, miss=1e-9))
    assert sp.calibrate(made, bursts(1, 2995, 0, miss=1e-9)).holds


def test_the_promise_is_broken_as_seldom_as_it_says():
    """Scouts whose chance of a miss is known at every threshold."""
    rates, runs_ = [], 100
    for seed in range(runs_):
        made = sp.Gate(Scout(), second, 0.05, after=0)
        sp.calibrate(made, bursts(4, 100, seed, miss=0.2))
        rates.append(0.2 * min(max(made.threshold, 0), 1) ** 4)
    broken = sum(rate > 0.05 for rate in rates)
    # Neither broken too often nor kept by never sleeping.
    assert broken <= 0.05 * runs_ + 3 * (0.05 * 0.95 * runs_) ** 0.5
    assert 0.005 < np.mean(rates) < 0.05


def test_monitor_sees_when_more_of_a_stream_wakes_the_network():
    made = sp.Gate(Scout(), second, 0.02, after=0)
    with pytest.raises(ValueError, match="Gate is not calibrated"):
        sp.monitor(made)
    sp.calibrate(made, bursts(8, 200, 0, miss=0.1))
    with pytest.raises(ValueError, match="no inputs have come"):
        sp.monitor(made)
    x = np.concatenate(bursts(10, 200, 5, miss=0.1))
    made(x)
    drift = sp.monitor(made)
    assert not drift.drifted and drift.n == len(x)
    made.reset_counts()
    made(x + np.array([0.3, 0], np.float32))
    assert sp.monitor(made).drifted
