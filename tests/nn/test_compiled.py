"""A whole network as one compiled call: the same answers, the same work, and what it refuses."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparingly as sp
from sparingly.nn import SelectiveLinear
from sparingly.selectors import Zeros

D, UNITS = 12, 144
SELECTORS = {
    "ProductKey": lambda: sp.ProductKey(heads=3, k=4, key_dim=6),
    "Experts": lambda: sp.Experts(k=3),
    "Tree": lambda: sp.Tree(trees=3),
}


class Block(nn.Module):
    def __init__(self, name: str, block: int, activation: str):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.ffn = sp.SelectiveFFN(D, UNITS, selector=SELECTORS[name](), block=block, activation=activation)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.ffn(self.norm(x)))


def network(name: str = "ProductKey", block: int = 1, activation: str = "gelu") -> Any:
    torch.manual_seed(4)
    blocks = [Block(name, block, activation) for _ in range(2)]
    rest = [nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 19, bias=False), nn.SiLU(), nn.Linear(19, 3)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(7, D), nn.ReLU(), *blocks, *rest).eval()
    for key, parameter in model.named_parameters():
        if "bias" in key:
            nn.init.normal_(parameter)
    return model


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() < 1e-5 * wanted.abs().max())


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_the_answers_are_the_networks(name, block, activation):
    model = network(name, block, activation)
    plan, x = sp.compile_plan(model), torch.randn(40, 7)
    expected = model(x).detach()
    assert close(plan(x), expected) and close(plan(x[:1]), expected[:1]) and plan(x[:0]).shape == (0, 3)
    # And noticed if one unit were another.
    with torch.no_grad():
        changed = copy.deepcopy(model)
        changed[3].ffn.down.copy_(model[3].ffn.down.roll(1, 0))
    assert not close(sp.compile_plan(changed)(x), expected)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_cheaper_setting_and_weights_that_change(name):
    model = network(name)
    model[3].ffn.selector.setting = 2
    plan, x = sp.compile_plan(model), torch.randn(9, 7)
    assert close(plan(x), model(x).detach())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    assert close(plan(x), model(x).detach())


def test_a_copy_lives_without_the_first_one():
    plan, x = sp.compile_plan(network()), torch.randn(5, 7)
    expected = plan(x)
    twin = copy.deepcopy(plan)
    with torch.no_grad():
        for parameter in plan._model.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected) and not torch.equal(plan(x), expected)


class Line(nn.Module):
    """Functions instead of modules, and a result that is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(7, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.first(x))
        return torch.add(hidden + hidden, torch.relu(self.last(F.silu(hidden))))


def test_functions():
    model, x = Line().eval(), torch.randn(5, 7)
    assert close(sp.compile_plan(model)(x), model(x).detach())


def test_the_ledger_sees_what_the_model_does():
    model, x = network(), torch.randn(2, 7)
    plan = sp.compile_plan(model)
    with sp.count() as ledger:
        plan(x)
    with sp.count() as wanted, torch.no_grad():
        model(x)
    assert ledger.macs == wanted.macs > 0 and ledger.bytes == wanted.bytes


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + y


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.two(x)


@pytest.mark.parametrize(
    "model, error, message",
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Tanh()), TypeError, "1, a Tanh, cannot be compiled; allowed are Linear"),
        (nn.Sequential(nn.Linear(3, 3), nn.GELU("tanh")), TypeError, "a GELU, cannot be compiled"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4)), ValueError, "'_1' takes 3 values, got 4"),
        (Two(), ValueError, "must have one input, got another one: 'y'"),
        (Narrow(), ValueError, "adds 4 and 2 values"),
        (nn.Sequential(nn.ReLU()), ValueError, "no part of the model says how wide its input is"),
        (nn.Linear(3, 3).bfloat16(), TypeError, "float32, contiguous, on the CPU, got torch.bfloat16 on cpu"),
        (nn.Sequential(sp.SelectiveFFN(4, 16, selector=sp.Random(2))), TypeError, "to be compiled, got Random"),
    ],
)
def test_other_models(model, error, message):
    with pytest.raises(error, match=message):
        sp.compile_plan(model.eval())


def test_training_mode_and_hooks():
    model = network()
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="1 has hooks, which a compiled call does not run"):
        sp.compile_plan(model)
    with pytest.raises(ValueError, match=r"in training mode: call model.eval\(\) first"):
        sp.compile_plan(model.train())


def test_two_threads_at_once():
    model = network()
    plan, inputs = sp.compile_plan(model), torch.randn(8, 200, 7)
    expected = [plan(x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(plan, inputs), expected))


def test_bad_input():
    plan = sp.compile_plan(network())
    for bad in (torch.randn(2, 8), torch.randn(7), torch.randn(2, 7).double()):
        with pytest.raises(ValueError, match=r"x must be float32 \[tokens, 7\] on the CPU, got"):
            plan(bad)
    x = torch.randn(3, 7)
    x[2, 1] = float("inf")
    with pytest.raises(ValueError, match="infinity or NaN for token 2"):
        plan(x)


class Entrance(nn.Module):
    def __init__(self, d: int = 30):
        super().__init__()
        self.linear = nn.Linear(d, D)
        self.bag = sp.SelectiveBag(96, 3, selector=sp.Ferns((6, 5), 12, 3, window=3), groups=4, gain=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.bag(x)


@pytest.mark.parametrize("setting", [12, 8])
def test_a_bag_of_rows_that_ferns_name(setting):
    torch.manual_seed(1)
    model: Any = nn.Sequential(Entrance(), Block("Tree", 1, "gelu"), nn.Linear(D, 3)).eval()
    model[0].bag.selector.setting = setting
    plan, x = sp.compile_plan(model), torch.randn(60, 30).round()
    assert close(plan(x), model(x).detach()) and close(plan(x[:1]), model(x[:1]).detach())
    with torch.no_grad():
        model[0].bag.weight.mul_(-1.0)
    assert close(plan(x), model(x).detach())


def test_a_first_layer_that_leaves_out_zeros():
    torch.manual_seed(1)
    model: Any = nn.Sequential(Entrance(), nn.ReLU(), nn.Linear(D, 3)).eval()
    x = torch.randn(9, 30).relu()
    expected = model(x).detach()
    model[0].linear = SelectiveLinear.from_dense(model[0].linear, Zeros())
    plan = sp.compile_plan(model)
    assert close(plan(x), expected)
    with sp.count() as ledger:
        plan(x[:1])
    kept = int((x[0] != 0).sum())
    rows = int((model[0].bag.selector.select(x[:1]).ids >= 0).sum())
    assert ledger.macs == kept * D + rows * 3 + 3 * D
    model[0].linear = SelectiveLinear.from_dense(nn.Linear(30, D), sp.InputThreshold()).eval()
    with pytest.raises(TypeError, match="must leave out zeros"):
        sp.compile_plan(model)


def test_a_row_that_is_not_finite_is_named():
    plan, x = sp.compile_plan(network()), torch.randn(5, 7)
    x[3, 2] = float("inf")
    with pytest.raises(ValueError, match="x must be finite, got infinity or NaN for token 3"):
        plan(x)
