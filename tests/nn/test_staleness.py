"""Weights that change under a fitted selector are noticed, and dense states load into converted layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly.convert import convert_, restore_
from sparingly.nn.linear import SelectiveLinear
from sparingly.nn.mlp import SelectiveMLP
from sparingly.nn.sample import Sample
from sparingly.nn.screen_head import ScreenHead
from sparingly.nn.selective import GRADIENTS, STALE, needed_layers, selective_modules
from sparingly.selectors import InputThreshold, LowRank, Random, Screen, Threshold

WIDTH, UNITS, CLASSES = 16, 64, 500


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.u, self.d = nn.Linear(WIDTH, UNITS), nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.silu(self.g(x)) * self.u(x))


class Net(nn.Module):
    """An embedding that is tied to the output layer, with an MLP between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mlp, self.head = nn.Embedding(CLASSES, WIDTH), Gated(), nn.Linear(WIDTH, CLASSES)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(x + self.mlp(x))


IDS = torch.tensor([[3, 70, 41]])


def fitted_head() -> tuple[ScreenHead, Tensor]:
    head = ScreenHead.from_dense(nn.Linear(WIDTH, CLASSES), Screen(8, 20))
    head.fit(Sample(torch.randn(400, WIDTH), torch.empty(0)))
    return head, torch.randn(3, WIDTH)


def fitted_mlp() -> tuple[SelectiveMLP, Tensor]:
    mlp = SelectiveMLP(Gated(), "u", "d", F.silu, LowRank(4), gate="g")
    mlp.fit(Sample(torch.randn(300, WIDTH), torch.randn(300, WIDTH)))
    mlp.selector.setting = 30
    return mlp, torch.randn(3, WIDTH)


def weight_of(layer: Any) -> Any:
    return layer.weight if isinstance(layer, ScreenHead) else layer.g.weight


def is_dense(layer: Any, x: Tensor) -> bool:
    """Whether the layer answers as the one that it stands for, but for the order of sums."""
    return torch.allclose(layer(x), copy.deepcopy(layer).dense()(x), rtol=1e-5, atol=1e-5)


CHANGES = {
    "in place": lambda weight: weight.mul_(1.5),
    "one row": lambda weight: weight[5].add_(0.5),
    "memory": lambda weight: setattr(weight, "data", weight.data * 1.5),
    "not counted": lambda weight: weight.data.add_(torch.randn_like(weight)),  # as PEFT merges
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [fitted_head, fitted_mlp])
@torch.no_grad()
def test_changed_weights_give_dense_answers_until_the_next_fit(make, change):
    layer, x = make()
    assert not is_dense(layer, x) and layer.why_dense == {}
    CHANGES[change](weight_of(layer))
    assert is_dense(layer, x)
    layer(x)
    assert layer.why_dense == {STALE: 6} and layer.ran[:3].tolist()[::2] == [3, 6]
    layer.fit(Sample(torch.randn(400, WIDTH), torch.randn(400, WIDTH)))
    layer.reset()
    assert not is_dense(layer, x) and layer.why_dense == {}


@pytest.mark.parametrize("make", [fitted_head, fitted_mlp])
@torch.no_grad()
def test_weights_put_back_are_those_of_the_fit_again(make):
    layer, x = make()
    want, before = layer(x), weight_of(layer).clone()
    weight_of(layer).zero_()
    layer(x)
    weight_of(layer).copy_(before)
    assert torch.equal(layer(x), want) and layer.why_dense == {STALE: 3}


@pytest.mark.parametrize("make", [fitted_head, fitted_mlp])
@torch.no_grad()
def test_what_leaves_the_weights_as_they_are_leaves_the_fit(make):
    layer, x = make()
    want = layer(x)
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    cast(x.bfloat16())
    assert not cast.why_dense
    weight_of(layer).add_(0.0)
    assert torch.equal(layer(x), want) and not layer.why_dense
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert torch.equal(layer(x), want) and not layer.why_dense


@torch.no_grad()
def test_the_weights_are_read_once_and_not_for_each_call(monkeypatch):
    pairs: Any = (fitted_head(), fitted_mlp())
    for layer, x in pairs:
        reads, kind = [], type(layer.selector)
        holds_for = kind.holds_for
        monkeypatch.setattr(kind, "holds_for", lambda *a: reads.append(1) or holds_for(*a))  # noqa: B023
        for _ in range(5):
            layer(x)
        assert len(reads) == 1
        weight_of(layer).mul_(2)
        for _ in range(5):
            layer(x)
        assert len(reads) == 2


@torch.no_grad()
def test_a_tied_embedding_counts_and_other_weights_do_not():
    model: Any = Net().eval()
    convert_(model, {"mlp": LowRank(4), "head": Screen(8, 20)}, example=IDS)
    mlp, head = model.mlp, model.head
    mlp.fit(Sample(torch.randn(300, WIDTH), torch.randn(300, WIDTH)))
    head.fit(Sample(torch.randn(300, WIDTH), torch.empty(0)))
    for weight in (mlp.u.weight, mlp.d.weight, mlp.u.bias):
        weight.mul_(1.5)
    model(IDS)
    assert not mlp.why_dense and not head.why_dense
    model.embedding.weight[7] += 0.5
    model(IDS)
    assert not mlp.why_dense and head.why_dense == {STALE: 3}
    mlp.g.bias += 1
    model(IDS)
    assert mlp.why_dense == {STALE: 3}


def test_a_step_of_training_goes_by_the_last_fit_and_the_answer_after_it_does_not():
    mlp, x = fitted_mlp()
    mlp.train()
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
    for _ in range(2):
        assert not is_dense(mlp, x)
        mlp(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert mlp.why_dense == {GRADIENTS: 12}
    mlp.eval()
    assert is_dense(mlp, x)
    with torch.no_grad():
        assert is_dense(mlp.train(), x)
    assert mlp.why_dense == {GRADIENTS: 12, STALE: 6}


def test_a_model_without_values_says_so():
    model: Any = Net().eval()
    convert_(model, {"mlp": LowRank(4)}, example=IDS)
    model.to("meta")
    with pytest.raises(ValueError, match=r"'mlp' is on the meta device: .* load its weights first"):
        needed_layers(model)


@torch.no_grad()
def test_a_graph_that_is_compiled_after_the_change_is_dense():
    head, x = fitted_head()
    head.weight.mul_(1.5)
    want = head(x)
    torch._dynamo.reset()
    compiled: Any = torch.compile(head, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), want) and is_dense(head, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_constants_follow_changes_that_are_not_counted(dtype):
    layer = SelectiveLinear.from_dense(nn.Linear(WIDTH, UNITS), InputThreshold())
    layer.fit(Sample(torch.randn(300, WIDTH) + 2, torch.randn(300, UNITS)))
    layer.selector.setting = 40
    layer.to(dtype)
    x = (torch.randn(1, WIDTH) + 2).to(dtype)
    for _ in range(2):
        layer(x)
        layer.weight.data += torch.randn_like(layer.weight)
        # One token at a time from here on, as in decoding: no dense product in between.
        once, many = layer(x), layer(x.repeat(5, 1))[:1]
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(once, many, rtol=tolerance, atol=tolerance * float(many.abs().max()))


@torch.no_grad()
def test_what_is_kept_does_not_travel_with_copies_nor_hold_memory():
    layer = SelectiveLinear.from_dense(nn.Linear(WIDTH, UNITS), InputThreshold())
    layer.fit(Sample(torch.randn(300, WIDTH) + 2, torch.randn(300, UNITS)))
    layer.selector.setting = 40
    layer(torch.randn(1, WIDTH))
    assert layer._made and not copy.deepcopy(layer)._made
    layer.to(torch.float64)
    assert not layer._made


def converted(selector: Any) -> Any:
    model: Any = Net().eval()
    convert_(model, selector, example=IDS)
    for layer in selective_modules(model).values():
        rows = UNITS if layer.of_mlp else layer.in_features if isinstance(layer, SelectiveLinear) else WIDTH
        layer.fit(Sample(torch.randn(300, rows), torch.randn(300, getattr(layer, "out_features", WIDTH))))
        if not isinstance(layer, ScreenHead):
            layer.selector.setting = 30
    return model


SELECTORS = {
    "Screen": lambda: {"head": Screen(8, 20)},
    "LowRank": lambda: {"mlp": LowRank(4)},
    "Random": lambda: {"mlp": Random(30)},
    "Threshold": lambda: {"mlp": Threshold(), "linear": InputThreshold()},
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", SELECTORS)
@torch.no_grad()
def test_a_dense_state_loads_strictly_and_the_fit_stays_for_its_own_weights(kind, assign):
    model = converted(SELECTORS[kind]())
    want = model(IDS)
    own, other = copy.deepcopy(model), Net()
    restore_(own)
    state = copy.deepcopy(own.state_dict())
    assert not set(model.load_state_dict(other.state_dict(), assign=assign).missing_keys)
    for layer in selective_modules(model).values():
        layer.reset()
    got = model(IDS)
    stale = [STALE in layer.why_dense for layer in selective_modules(model).values()]
    assert stale == [kind in ("Screen", "LowRank")] * len(stale)
    if all(stale):
        torch.testing.assert_close(got, other(IDS), rtol=1e-6, atol=1e-6)
    model.load_state_dict(state, assign=assign)
    assert torch.equal(model(IDS), want) or kind == "Random"


@pytest.mark.parametrize("kind", SELECTORS)
@torch.no_grad()
def test_other_states_are_refused(kind):
    model = converted(SELECTORS[kind]())
    state = model.state_dict()
    ours = [name for name in state if ".selector." in name]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bogus"):
        model.load_state_dict(Net().state_dict() | {ours[0].rpartition(".")[0] + ".bogus": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        model.load_state_dict(Net().state_dict() | {"mlp.other": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"Missing key.*embedding.weight"):
        model.load_state_dict({name: value for name, value in state.items() if name != "embedding.weight"})
    if len(ours) > 1:
        with pytest.raises(RuntimeError, match=r"Missing key.*selector"):
            model.load_state_dict({name: value for name, value in state.items() if name != ours[-1]})
