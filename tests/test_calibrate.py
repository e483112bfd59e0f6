"""Calibration: path, contract, and that nothing changes when it fails."""

from __future__ import annotations

import copy
import importlib
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparingly.calibrate import at_price, calibrate, costs, path
from sparingly.convert import CONTRACT, convert_, restore_
from sparingly.metrics import accuracy, agreement, observe, perplexity
from sparingly.nn.sample import Option
from sparingly.nn.selective import dense_answers, selective_modules
from sparingly.selectors import InputThreshold, LowRank, Random, Screen, Threshold, Zeros

CLASSES, WIDTH, VOCAB = 8, 16, 24
module: Any = importlib.import_module("sparingly.calibrate")  # the package's attribute of this name is the function


class Block(nn.Module):
    def __init__(self, act: nn.Module):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 96), act, nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Classifier(nn.Module):
    def __init__(self, act: nn.Module):
        super().__init__()
        self.mlp, self.out = Block(act), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.mlp(x))


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clouds of eight classes, two clouds each, that overlap a little."""
    centres = torch.randn(2 * CLASSES, WIDTH, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    cloud = torch.randint(2 * CLASSES, (n,), generator=generator)
    return centres[cloud] + 0.9 * torch.randn(n, WIDTH, generator=generator), cloud % CLASSES


@pytest.fixture(scope="module")
def trained() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(nn.SiLU())
        x, y = points(2000, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


class Letters(nn.Module):
    """A small language model: the next letter from the last two."""

    def __init__(self):
        super().__init__()
        self.embed, self.mlp, self.out = nn.Embedding(VOCAB, WIDTH), Block(nn.GELU()), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.out(x + self.mlp(x))


def text(n: int, length: int, seed: int) -> Tensor:
    """Sentences of a second-order chain whose steps are mostly certain."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (n, length), generator=generator)
    for t in range(2, length):
        follow = (3 * ids[:, t - 1] + 5 * ids[:, t - 2] + 1) % VOCAB
        ids[:, t] = torch.where(torch.rand(n, generator=generator) < 0.8, follow, ids[:, t])
    return ids


@pytest.fixture(scope="module")
def letters() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = Letters(), text(400, 20, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(120):
            optimizer.zero_grad()
            logits = model(data)[:, 1:-1]
            nn.functional.cross_entropy(logits.reshape(-1, VOCAB), data[:, 2:].flatten()).backward()
            optimizer.step()
    return model.eval()


def batches(data, size: int = 100) -> list:
    if isinstance(data, tuple):
        return list(zip(data[0].split(size), data[1].split(size), strict=True))
    return list(data.split(size))


def state(model: Any) -> dict[str, object]:
    selectors = {name: layer.selector.state_dict() for name, layer in selective_modules(model).items()}
    values: dict[str, object] = {f"{n}.{k}": v.clone() for n, s in selectors.items() for k, v in s.items()}
    for name, layer in selective_modules(model).items():
        values[f"{name}.rest"] = (layer.selector.setting, layer.off, layer.ran.tolist(), dict(layer.why_dense))
    values["contract"] = getattr(model, CONTRACT, None)
    values["modes"] = [part.training for part in model.modules()]
    values["gradients"] = [parameter.requires_grad for parameter in model.parameters()]
    return values


def same(one: dict[str, object], two: dict[str, object]) -> bool:
    def equal(a, b) -> bool:
        return a.shape == b.shape and torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return one.keys() == two.keys() and all(equal(value, two[name]) for name, value in one.items())


OPTIONS = {
    "a": [Option(10, 0.5, 10.0), Option(50, 0.1, 50.0), Option(100, 0.0, 100.0)],
    "b": [Option(10, 5.0, 10.0), Option(50, 0.01, 60.0), Option(100, 0.0, 100.0)],
}


def test_a_path_loses_more_and_reads_less_at_every_step():
    trail = path(OPTIONS, [10.0, 0.0, 0.011, 0.2, 0.6])
    prices = [costs(OPTIONS, settings) for settings in trail]
    assert trail[0] == {"a": 100, "b": 100} and trail[-1] == {"a": 10, "b": 10}
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(prices))
    assert at_price(OPTIONS, 0.0) == trail[0]
    assert path(OPTIONS, [0.0115]) == [{"a": 100, "b": 50}]


def test_the_path_of_a_model_is_monotone_too(trained, monkeypatch):
    seen = []
    walk = module.walk
    monkeypatch.setattr(module, "walk", lambda trail, *rest: seen.append(trail) or walk(trail, *rest))
    fit = module.fit_selectors
    monkeypatch.setattr(module, "fit_selectors", lambda *args: seen.append(fit(*args)) or seen[-1])
    model = copy.deepcopy(trained)
    convert_(model, {"mlp": Threshold(), "linear": InputThreshold()}, example=points(8, 1)[0])
    calibrate(model, batches(points(1600, 2)), accuracy, max_drop=0.03)
    options, trail = seen
    prices = [costs(options, settings) for settings in trail]
    assert len(trail) > 2 and all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(prices))


@pytest.mark.parametrize("metric", [accuracy, agreement])
@pytest.mark.parametrize("selector", [Threshold(), LowRank(8)])
def test_a_classifier_keeps_its_contract_on_fresh_data(trained, metric, selector):
    model = copy.deepcopy(trained)
    convert_(model, selector, "mlp")
    contract: Any = calibrate(model, batches(points(4000, 2)), metric, max_drop=0.05)
    assert contract.holds and contract.n == 3000 and contract.metric == metric.name
    assert contract is getattr(model, CONTRACT) and contract.drop <= contract.upper <= 0.05
    layer = selective_modules(model)["mlp"]
    assert layer.selector.setting == contract.setting["mlp"] < 60 and not layer.off
    assert layer.ran.sum() == 0
    fresh = batches(points(3000, 3))
    with dense_answers(model):
        dense = observe(metric, model, fresh)
    drops = metric.drops(dense, observe(metric, model, fresh)).double()
    assert drops.abs().mean() > 0 and drops.mean() < 0.05


def test_a_language_model_keeps_its_contract_on_fresh_data(letters):
    model = copy.deepcopy(letters)
    convert_(model, Threshold(), "mlp")
    contract: Any = calibrate(model, text(1200, 20, 2), max_drop=0.02)
    assert contract.holds and contract.metric == "perplexity"
    assert selective_modules(model)["mlp"].selector.setting < 80
    fresh = batches(text(600, 20, 3))
    with dense_answers(model):
        dense = observe(perplexity, model, fresh)
    drop = math.expm1(float(perplexity.drops(dense, observe(perplexity, model, fresh)).mean()))
    assert drop < 0.02
    # One token at a time it is the same model.
    with torch.no_grad():
        ids = text(1, 4, 5)
        torch.testing.assert_close(model(ids), model(ids.repeat(2, 1))[:1], rtol=2e-2, atol=2e-2)


def test_bfloat16(letters):
    model = copy.deepcopy(letters).to(torch.bfloat16)
    convert_(model, Threshold(), "mlp")
    assert calibrate(model, text(1200, 20, 2), max_drop=0.05).holds
    assert selective_modules(model)["mlp"].selector.setting < 100


def test_if_nothing_passes_every_unit_runs(trained):
    model, data = copy.deepcopy(trained), batches(points(2000, 2))
    convert_(model, Random(1), "mlp")
    contract: Any = calibrate(model, data, accuracy, max_drop=0.01)
    assert not contract.holds and contract.setting is None and "nothing passed" in str(contract)
    assert selective_modules(model)["mlp"].off
    x = points(50, 4)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x[:1]), trained(x[:1]), rtol=1e-5, atol=1e-5)
    assert contract.selective_quality == contract.dense_quality
    # Another selector may still do.
    restore_(model)
    assert not hasattr(model, CONTRACT)
    convert_(model, Threshold(), "mlp")
    assert calibrate(model, data, accuracy, max_drop=0.05).holds and not selective_modules(model)["mlp"].off


def test_the_drop_is_one_from_the_network_that_was_given(trained):
    """A network with damaged weights is its own dense twin, but not that of the one from before."""
    model = copy.deepcopy(trained)
    convert_(model, Threshold(), "mlp")
    data = batches(points(1600, 2))
    own: Any = calibrate(model, data, accuracy, max_drop=0.03)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    alone: Any = calibrate(model, data, accuracy, max_drop=0.03)
    against: Any = calibrate(model, data, accuracy, max_drop=0.03, against=trained)
    assert own.holds and alone.holds and not against.holds
    assert against.dense_quality == own.dense_quality > alone.dense_quality
    # Every unit runs, and the contract says what that gives.
    assert against.selective_quality == pytest.approx(alone.dense_quality)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_unit_of_the_outputs_does_not_matter(trained, scale):
    """Estimated losses are squares of outputs: here they are off by ten thousand."""
    chosen = []
    for factor in (1.0, scale):
        model = copy.deepcopy(trained)
        with torch.no_grad():
            model.out.weight.mul_(factor)
            model.out.bias.mul_(factor)
        convert_(model, Threshold(), "mlp")
        assert calibrate(model, batches(points(1600, 2)), accuracy, max_drop=0.03).holds
        chosen.append(selective_modules(model)["mlp"].selector.setting)
    assert chosen[0] < 100 and abs(chosen[0] - chosen[1]) <= 10


def test_exact_zeros_lose_no_decision():
    torch.manual_seed(1)
    model: nn.Module = Classifier(nn.ReLU()).eval()
    convert_(model, Zeros(), "mlp")
    contract: Any = calibrate(model, batches(points(1600, 2)), agreement, max_drop=0.01)
    assert contract.holds and contract.drop == 0 and contract.selective_quality == 1


def test_thresholds_that_were_given_are_tested_as_they_are(trained):
    model = copy.deepcopy(trained)
    convert_(model, Threshold(0.05), "mlp")
    contract: Any = calibrate(model, batches(points(2000, 2)), accuracy, max_drop=0.1)
    assert contract.holds and len(contract.tried) == 1
    selector: Any = selective_modules(model)["mlp"].selector
    assert float(selector.cut.max()) == pytest.approx(0.05)


def test_a_layer_that_no_example_reaches_goes_on_running_every_unit(trained):
    model = copy.deepcopy(trained)
    model.other = Block(nn.SiLU())
    convert_(model, Threshold(), "mlp")
    assert set(selective_modules(model)) == {"mlp", "other"}
    contract: Any = calibrate(model, batches(points(2000, 2)), accuracy, max_drop=0.1)
    assert set(contract.setting) == {"mlp"} and not selective_modules(model)["other"].selector.fitted


def test_calibrating_again_replaces_the_contract(trained):
    model, data = copy.deepcopy(trained), batches(points(2000, 2))
    convert_(model, Threshold(), "mlp")
    loose: Any = calibrate(model, data, accuracy, max_drop=0.2)
    tight: Any = calibrate(model, data, accuracy, max_drop=0.02)
    assert getattr(model, CONTRACT) is tight and tight.setting["mlp"] > loose.setting["mlp"]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_inside_other_modes(trained, around):
    model = copy.deepcopy(trained).train()
    model.out.weight.requires_grad_(False)
    convert_(model, Threshold(), "mlp")
    before = state(model)
    with around():
        contract: Any = calibrate(model, batches(points(1000, 2)), accuracy, max_drop=0.1)
        model(points(2, 1)[0])
    after = state(model)
    assert contract.holds and all(before[name] == after[name] for name in ("modes", "gradients"))
    model.eval()(points(1, 1)[0])
    assert all(parameter.grad is None for parameter in model.parameters())


def nan_at(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.full((len(batch[0]),), float("nan"))


def fails_late():
    calls = []

    def metric(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) > 60:
            raise KeyboardInterrupt
        return (model(batch[0]).argmax(-1) != batch[1]).float()

    return metric


BAD_X = points(400, 2)[0].clone()
BAD_X[150, 3] = float("nan")


@pytest.mark.parametrize(
    ("data", "metric", "options", "error", "message"),
    [
        (points(400, 2), accuracy, {"max_drop": 0.0001}, ValueError, "takes at least"),
        (points(400, 2), accuracy, {"confidence": 1.5}, ValueError, "confidence must be"),
        (points(400, 2), accuracy, {"max_drop": -1}, ValueError, "max_drop must be"),
        (points(400, 2), "likelihood", {}, ValueError, "metric must be one of"),
        (points(400, 2), 3, {}, TypeError, "metric must be"),
        ([], accuracy, {}, ValueError, "no examples"),
        (points(0, 2), accuracy, {}, ValueError, "no examples"),
        (points(3, 2), accuracy, {"max_drop": 0.5}, ValueError, "more examples"),
        ("words", accuracy, {}, TypeError, "data must be"),
        (points(400, 2)[0], accuracy, {"max_drop": 0.1}, TypeError, "targets"),
        ((BAD_X, points(400, 2)[1]), accuracy, {"max_drop": 0.1}, ValueError, "NaN"),
        (points(400, 2), nan_at, {"max_drop": 0.1}, ValueError, "NaN"),
        (batches(points(1000, 2), 10), fails_late(), {"max_drop": 0.1}, KeyboardInterrupt, None),
    ],
)
def test_whatever_is_raised_selectors_stay(trained, data, metric, options, error, message):
    model = copy.deepcopy(trained)
    convert_(model, {"mlp": Threshold(), "head": Screen(4)})
    calibrate(model, batches(points(1000, 9)), accuracy, max_drop=0.1)
    model(points(1, 1)[0])
    before = state(model)
    with pytest.raises(error, match=message):
        calibrate(model, data, metric, **options)
    assert same(state(model), before)


def test_a_first_calibration_that_fails_leaves_nothing_fitted(trained):
    model = copy.deepcopy(trained)
    convert_(model, {"mlp": Threshold(), "head": Screen(4)})
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, batches(points(1000, 2), 10), fails_late(), max_drop=0.1)
    assert same(state(model), before) and not selective_modules(model)["mlp"].selector.fitted


def test_a_model_that_was_not_converted_says_what_to_do(trained):
    with pytest.raises(ValueError, match="convert_"):
        calibrate(copy.deepcopy(trained), points(400, 2), accuracy)


def test_progress_goes_up(trained):
    model, seen = copy.deepcopy(trained), []
    convert_(model, Threshold(), "mlp")
    calibrate(model, batches(points(1000, 2)), accuracy, 0.1, progress=lambda what, share: seen.append((what, share)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1 and all(what for what, _ in seen)
