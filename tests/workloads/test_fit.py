"""Training of benchmarks: a schedule, and files from which an interrupted training goes on to the same numbers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparingly as sp
from sparingly.workloads import _fit
from sparingly.workloads._fit import Recipe, fit


def network() -> nn.Module:
    torch.manual_seed(0)
    ffn = sp.SelectiveFFN(8, 64, selector=sp.ProductKey(heads=1, k=4, key_dim=4))
    return nn.Sequential(nn.Linear(5, 8), ffn, nn.Dropout(0.5), nn.Linear(8, 2))


def loss(model: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
    return (model(inputs) - inputs[:, :2]).square().mean()


def states(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def test_training_lowers_the_loss_and_ends_in_evaluation_mode():
    model = network()
    before = float(loss(model.eval(), 99).detach())
    fitted = fit(model, loss, Recipe(200, lr=1e-2))
    assert not model.training and fitted.cpu_s > 0
    assert float(loss(model, 99).detach()) < 0.7 * before
    assert 0 < fitted.loss < before


def test_an_interrupted_training_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_fit, "SAVE_EVERY_S", 0.0)
    recipe, file = Recipe(60, lr=1e-2), tmp_path / "one.pt"
    whole = network()
    expected = fit(whole, loss, recipe)

    def stops(model: nn.Module, step: int) -> Tensor:
        if step == 40:
            raise KeyboardInterrupt
        return loss(model, step)

    with pytest.raises(KeyboardInterrupt):
        fit(network(), stops, recipe, file=file)
    torch.manual_seed(123)
    resumed = network()
    found = fit(resumed, loss, recipe, file=file)
    assert all(torch.equal(a, b) for a, b in zip(states(whole), states(resumed), strict=True))
    assert found.loss == pytest.approx(expected.loss)

    def never(model: nn.Module, step: int) -> Tensor:
        raise AssertionError("training was complete")

    again = network()
    assert fit(again, never, recipe, file=file) == found
    assert all(torch.equal(a, b) for a, b in zip(states(whole), states(again), strict=True))


def test_the_rate_rises_and_falls():
    shares = [_fit._share(step, Recipe(1000, lr=1.0, warmup=50)) for step in range(1000)]
    top = max(range(1000), key=shares.__getitem__)
    assert shares[0] == pytest.approx(0.02) and top == 49 and shares[999] == pytest.approx(1e-3, rel=0.1)
