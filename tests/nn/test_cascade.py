"""A cascade: who answers what, compacted batches, stages that fail, thresholds under a contract."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparingly as sp
from sparingly._calibrate_cascade import _path, falling, left_at
from sparingly.metrics import accuracy
from sparingly.nn._leaving import FEATURES, KINDS, fit_learned, learned, sure_rows
from sparingly.nn.cascade import MEASURES, NEVER

CLASSES = 3


class Recorder:
    """Probabilities of one-column inputs: class 1 with that probability; remembers what it was asked."""

    def __init__(self, shift: float = 0.0):
        self.shift, self.asked = shift, []

    def __call__(self, x: torch.Tensor) -> np.ndarray:
        self.asked.append(len(x))
        one = (x[:, 0].double() + self.shift).clamp(0, 1).numpy()
        return np.stack([1 - one, one, np.zeros_like(one)], axis=1)


def cascade(*stages: Any, thresholds: list[float] | None = None, **options: Any) -> sp.Cascade:
    made = sp.Cascade(stages, **options)
    if thresholds is not None:
        made.thresholds.copy_(torch.tensor(thresholds, dtype=torch.float64))
    return made


def points(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds; half of the points lie far from the borders."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    spread = torch.where(torch.rand(n, 1, generator=generator) < 0.5, 0.3, 1.5)
    return torch.eye(4)[y] * 3 + spread * torch.randn(n, 4, generator=generator), y


class Linear(nn.Module):
    """The right rule, seen through noise that does not depend on the class."""

    def __init__(self, noise: float):
        super().__init__()
        self.noise = noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wobble = torch.sin(1000 * x.sum(dim=1, keepdim=True) * torch.arange(1, CLASSES + 1))
        return 2 * x[:, :CLASSES] + self.noise * wobble


def test_before_calibration_the_last_stage_answers_alone():
    first, last = Recorder(), Recorder(0.1)
    made = cascade(first, last)
    x = torch.rand(5, 1)
    assert torch.equal(made(x), torch.from_numpy(last(x)).float()) and first.asked == []
    assert made.left.tolist() == [0, 5] and made.share_left() == [0.0, 1.0]


def test_later_stages_see_only_what_has_not_left():
    first, second, last = Recorder(), Recorder(0.2), Recorder(0.4)
    made = cascade(first, second, last, thresholds=[0.9, 0.8])
    x = torch.tensor([[0.95], [0.5], [0.05], [0.65], [0.3]])
    out = made(x)
    assert (first.asked, second.asked, last.asked) == ([5], [3], [2])
    assert made.exits.tolist() == [0, 2, 0, 1, 2]
    torch.testing.assert_close(out[:, 1], torch.tensor([0.95, 0.9, 0.05, 0.85, 0.7]))
    assert made(x[:0]).shape[0] == 0 and first.asked == [5]
    assert made(x[:1]).shape == (1, 3) and last.asked == [2]


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_are_one_for_the_sure_and_lowest_for_the_unsure(measure):
    sure, unsure = torch.eye(4)[:1], torch.full((1, 4), 0.25)
    between = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    values = [float(MEASURES[measure](one)) for one in (unsure, between, sure)]
    assert values[0] < values[1] < values[2] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "kind",
    [lambda x: x, lambda x: x.numpy(), lambda x: x.tolist(), lambda x: {"x": x}],
    ids=["tensor", "array", "list", "map"],
)
def test_inputs_of_any_kind_are_compacted(kind):
    def stage(given: Any) -> np.ndarray:
        values = given["x"] if isinstance(given, dict) else given
        return Recorder()(torch.as_tensor(np.asarray(values)))

    made = cascade(stage, stage, thresholds=[0.8])
    x = torch.tensor([[0.9], [0.6], [0.1]])
    assert made(kind(x)).argmax(1).tolist() == [1, 1, 0] and made.exits.tolist() == [0, 1, 0]


def test_networks_give_logits_and_scikit_learn_probabilities():
    class Old:
        def predict_proba(self, x):
            return Recorder()(x)

    network = nn.Linear(1, CLASSES)
    made = cascade(Old(), network, thresholds=[0.8])
    x = torch.tensor([[0.9], [0.6]])
    torch.testing.assert_close(made(x)[1:], network(x[1:]).softmax(1))
    assert made.training and network.training and set(dict(made.named_parameters())) == {
        "networks.1.weight", "networks.1.bias"
    }  # fmt: skip


def test_where_a_stage_raises_the_next_one_answers():
    def broken(x: Any) -> Any:
        raise ConnectionError("no route")

    made = cascade(broken, Recorder(), thresholds=[0.5])
    x = torch.rand(4, 1)
    made(x)
    assert made.failed.tolist() == [4, 0] and made.why_failed == {0: "ConnectionError: no route"}
    assert "4: ConnectionError: no route" in str(sp.explain(made))
    with pytest.raises(ConnectionError):
        cascade(Recorder(), broken)(x)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda x: np.full((len(x), 3), 0.5), "stage 0 must give probabilities.* sum 1.5"),
        (lambda x: np.full((len(x), 3), np.nan), "stage 0 must give probabilities"),
        (lambda x: np.array([[1.5, -0.5, 0.0]] * len(x)), "least -0.5"),
        (lambda x: np.ones((len(x) + 1, 1)), r"must give \[n, classes\] with n = 2, got \[3, 1\]"),
        (lambda x: "yes", "must give an array or tensor"),
        (lambda x: np.eye(2)[[0] * (len(x) - 1) + [1]] * 0.5 + 0.25, "agree on the classes: 2 before, 3 of stage 1"),
    ],
)
def test_what_is_no_probability_is_refused(answer, match):
    made = cascade(answer, Recorder(), thresholds=[2.0])
    with pytest.raises((ValueError, TypeError), match=match):
        made(torch.rand(2, 1))
    assert made.left.tolist() == [0, 0]


def test_bad_stages():
    with pytest.raises(ValueError, match="at least 2 stages, got 1"):
        sp.Cascade([Recorder()])
    with pytest.raises(TypeError, match="stage 1 must be callable or have predict_proba, got int"):
        sp.Cascade([Recorder(), 3])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="measure must be one of maximum, margin, entropy, learned"):
        sp.Cascade([Recorder(), Recorder()], measure="hunch")


def test_calibration_keeps_its_contract_and_saves():
    made = cascade(Linear(4.0), Linear(2.0), Linear(0.2))
    contract = sp.calibrate(made, points(6000), "accuracy", max_drop=0.02)
    assert contract.holds and contract.upper is not None and contract.upper <= 0.02
    assert all(0 < value < NEVER for value in made.thresholds.tolist())
    x, y = points(20_000, seed=1)
    right, whole = (float((answer.argmax(1) == y).float().mean()) for answer in (made(x), Linear(0.2)(x)))
    assert whole - right <= 0.02
    # Most are easy: they have left before the last stage.
    assert sum(made.share_left()[:2]) > 0.5 and sum(made.left) == 20_000
    told = sp.explain(made)
    assert json.loads(json.dumps(told.as_dict()))["stages"][0]["left"] == int(made.left[0])
    assert len(told.stages[0].examples) == 3 and "at most" in str(told)
    twin = cascade(Linear(4.0), Linear(2.0), Linear(0.2))
    twin.load_state_dict(made.state_dict())
    assert torch.equal(twin(x), made(x)) and torch.equal(copy.deepcopy(made)(x), made(x))


def test_agreement_and_a_metric_of_ones_own():
    for metric in ("agreement", lambda model, batch: (model(batch[0]).argmax(1) != batch[1]).float()):
        made = cascade(Linear(4.0), Linear(0.2))
        assert sp.calibrate(made, points(4000), metric, max_drop=0.05).holds and float(made.thresholds[0]) < NEVER


def test_a_useless_first_stage_is_never_run():
    useless = Recorder(5.0)
    made = cascade(lambda x: useless(x[:, :1]), Linear(0.2))
    contract = sp.calibrate(made, points(3000), "accuracy", max_drop=0.02)
    assert contract.holds and made.thresholds.tolist() == [NEVER]
    assert "never" in str(sp.explain(made)) and "never" in repr(made)


def test_a_failed_calibration_changes_nothing():
    made = cascade(Linear(4.0), Linear(0.2), thresholds=[0.7])
    x, y = points(3000)
    for data, metric, match in (
        (points(20), "accuracy", "takes at least"),
        ((x[:0], y[:0]), "accuracy", "no examples"),
        ((x, y + 7), "accuracy", r"targets must be in 0\.\.2"),
        ((x.index_fill(1, torch.tensor([0]), float("nan")), y), "accuracy", "stage 0 must give probabilities"),
        ((x, y), "perplexity", "not perplexity"),
    ):
        with pytest.raises(ValueError, match=match):
            sp.calibrate(made, data, metric, max_drop=0.02)
        assert made.thresholds.tolist() == [0.7]
    with pytest.raises(ValueError, match="leave out against"):
        sp.calibrate(made, (x, y), "accuracy", against=made)


def test_expected_losses_fall_with_how_sure():
    at, levels = falling(np.array([0.9, 0.5, 0.5, 0.7, 0.2]), np.array([0.0, 1.0, 0.0, 1.0, 2.0]))
    # 0.7 lost more than 0.5: they are one level.
    assert at.tolist() == [0.9, 0.5, 0.2] and levels.tolist() == [0.0, pytest.approx(2 / 3), 2.0]
    assert left_at([0.8, 0.5], [torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.6, 0.1])]).tolist() == [0, 1, 2]


def test_the_contract_is_broken_as_seldom_as_it_says():
    """Scouts that are wrong at random: the true drop of the chosen threshold is known."""
    rng, runs = np.random.default_rng(0), 200
    lost = []
    for _ in range(runs):
        sure = torch.from_numpy(rng.uniform(1 / 2, 1, 1500))
        wrong = torch.from_numpy(rng.random(1500)) < 0.2 * (1 - sure)
        scout = torch.stack([torch.where(wrong, 1 - sure, sure), torch.where(wrong, sure, 1 - sure)], dim=1)
        made = sp.Cascade([lambda x, scout=scout: scout[x], lambda x: torch.eye(2).double()[[0] * len(x)]])
        sp.calibrate(made, [(torch.arange(1500), torch.zeros(1500, dtype=torch.int64))], "accuracy", max_drop=0.02)
        # Sure at u in t..1, wrong with 0.2 (1 - u), on half of the line: the mean is 0.2 (1 - t) ** 2.
        at = max(0.5, float(made.thresholds[0]))
        lost.append(0.2 * (1 - min(at, 1)) ** 2)
    broken = sum(drop > 0.02 for drop in lost)
    # Neither broken too often nor kept by doing nothing.
    assert broken <= 0.05 * runs + 3 * (0.05 * 0.95 * runs) ** 0.5
    assert 0.003 < np.mean(lost) < 0.02


def net_with_exits() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()
    model = sp.add_exits_(net, at=["1", "3"])
    sp.train_exits(model, points(400)[0].split(100), epochs=3, lr=1e-2)
    return model


@pytest.mark.parametrize("committee", [False, True])
def test_exits_of_the_last_stage_are_stages(committee):
    exits = net_with_exits()
    made = sp.Cascade([Linear(2.0), Linear(1.0), exits], committee=committee)
    assert made.names == ["Linear", "Linear", "1", "3", "Sequential"]
    x, _ = points(300)
    answers = made.stage_answers(x)
    alone = [Linear(2.0)(x).softmax(1), Linear(1.0)(x).softmax(1), *exits.stage_answers(x)]
    both = (alone[0] * alone[1] if committee else torch.ones(())) * torch.stack(alone[2:])
    expected = [alone[0], alone[0] * alone[1] if committee else alone[1], *both]
    for found, product in zip(answers, expected, strict=True):
        torch.testing.assert_close(found, product / product.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made(x), answers[-1])
    levels = torch.stack([answer.amax(1).quantile(0.8) for answer in answers[:-1]]).double()
    made.thresholds.copy_(levels)
    out = made(x)
    assert torch.equal(
        made.exits, left_at(levels.tolist(), [made.sure(answer, place) for place, answer in enumerate(answers[:-1])])
    )
    assert len(made.exits.unique()) >= 4 and made.left.sum() == 600 and exits.left.sum() == 0
    torch.testing.assert_close(out, torch.stack(answers)[made.exits, torch.arange(300)], rtol=1e-4, atol=1e-5)


def test_a_committee_is_calibrated_against_all_of_it():
    x, y = points(4000)
    made = sp.Cascade([Linear(3.0), Linear(2.0), net_with_exits()], committee=True)
    contract = sp.calibrate(made, (x, y), "accuracy", max_drop=0.03)
    fresh, right = points(4000, 1)
    whole, own = (found.argmax(1) == right for found in (made.stage_answers(fresh)[-1], made(fresh)))
    assert contract.holds and float(whole.float().mean() - own.float().mean()) < 0.03


def distributions(n: int, classes: int, sharpness: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(classes)
    return (sharpness * torch.randn(n, classes, generator=generator)).softmax(dim=1)


@pytest.mark.parametrize("classes", [1, 2, 3, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_pass_measures_as_pytorch_does(kind, classes):
    given = distributions(40, classes)
    given[0] = torch.eye(classes)[0]  # Zeros have no logarithm.
    weights = torch.randn(FEATURES + classes, generator=torch.Generator().manual_seed(1)).double()
    found = np.full(40, np.nan)
    assert sure_rows(given.numpy(), KINDS.index(kind), weights.numpy(), found) == -1
    wanted = learned(given, weights) if kind == "learned" else MEASURES[kind](given)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.1, 2.0])
def test_the_compiled_pass_names_the_first_bad_row(bad):
    given = distributions(5, 4).numpy()
    given[3, 2] = bad
    assert sure_rows(given, 0, np.empty(0), np.empty(5)) == 3


def test_the_learned_measure_knows_which_classes_can_be_relied_on():
    """Stage 0 is right where it answers class 0 and guesses where it answers 1, equally sure of both."""
    generator = torch.Generator().manual_seed(0)
    answers = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).repeat(500, 1)
    good = torch.where(answers[:, 0] > 0.5, 1.0, torch.randint(2, (1000,), generator=generator).float())
    sure = learned(answers, fit_learned(answers, good))
    assert sure[0] > 0.95 and 0.4 < sure[1] < 0.6


def test_the_learned_measure_is_calibrated_saved_and_needed():
    x, y = points(6000)
    made = cascade(Linear(1.5), Linear(0.0), measure="learned", thresholds=[0.5])
    with pytest.raises(RuntimeError, match="knows 0 classes, not 3"):
        made(x[:3])
    made.thresholds.fill_(NEVER)
    contract = sp.calibrate(made, (x, y), "accuracy", max_drop=0.02)
    assert contract.holds and made.weights.shape == (1, FEATURES + CLASSES)
    made(x)
    left = made.left.tolist()
    assert 0 < left[0] < 6000
    other = cascade(Linear(1.5), Linear(0.0), measure="learned")
    other.load_state_dict(made.state_dict())
    other(x)
    assert other.left.tolist() == left


def test_a_batch_of_one_is_asked_and_counted_like_any_other():
    x, _ = points(50)
    whole = cascade(Linear(1.5), Linear(0.0), thresholds=[0.9])
    one = cascade(Linear(1.5), Linear(0.0), thresholds=[0.9])
    together = whole(x)
    for place in range(50):
        torch.testing.assert_close(one(x[place : place + 1]), together[place : place + 1])
        assert one.exits.tolist() == whole.exits[place : place + 1].tolist()
    assert one.left.tolist() == whole.left.tolist() and 0 < int(one.left[0]) < 50


def test_only_the_last_stage_may_have_exits():
    for stages in ([net_with_exits(), Linear(1.0)], [Linear(2.0), cascade(Linear(2.0), Linear(1.0))]):
        with pytest.raises(TypeError, match="only the last stage may have exits"):
            sp.Cascade(stages)


def test_a_path_begins_with_few_that_leave():
    x, y = points(800)
    answers = cascade(Linear(2.0), Linear(0.0)).stage_answers(x)
    losses = torch.stack([(answer.argmax(1) != y).double() for answer in answers])
    sure = answers[0].amax(1).double().unsqueeze(0)
    path = [point["stage 0"] for point in _path(accuracy, losses, sure, 0.2)]
    left = [float((sure >= at).double().mean()) for at in path]
    assert left == sorted(left) and left[0] < 0.25 * left[-1]


def test_a_committee_that_is_not_calibrated_needs_no_measure():
    x, _ = points(20)
    made = cascade(Linear(2.0), Linear(1.0), measure="learned", committee=True)
    torch.testing.assert_close(made(x), made.stage_answers(x)[-1])
    assert made.left.tolist() == [0, 20]
    alone = cascade(
        lambda given: Linear(2.0)(given).softmax(1).double(), Linear(1.0), measure="learned", committee=True
    )
    torch.testing.assert_close(alone(x[:1]), made(x[:1]))
