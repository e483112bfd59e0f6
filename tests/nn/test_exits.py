"""Exits: inputs leave, the rest of the network sees the others only, and answers stay what they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sparingly as sp
from sparingly.nn import _passes
from sparingly.nn.cascade import NEVER
from sparingly.nn.exits import ExitNetwork

CLASSES = 3


class Scale(nn.Module):
    """Remembers how many rows it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        return x


def points(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures 1 by 6 by 6 of three classes, some of them hard to see."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    x = torch.zeros(n, 1, 6, 6)
    x[torch.arange(n), 0, 2 * y] = 1.0
    spread = torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.6, 0.2, 1.3)
    return x + spread * torch.randn(x.shape, generator=generator), y


def network() -> Any:
    """Convolutions with a residual sum and batch norm."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.conv(x)).relu()

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), Block(), Scale(), Block(), Scale(), nn.Flatten(), nn.Linear(8 * 36, CLASSES)
    )


@pytest.fixture(scope="module")
def trained() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, (x, y) = network(), points(3000, 1)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        for _ in range(12):
            for part, right in zip(x.split(100), y.split(100), strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(part), right).backward()
                optimizer.step()
        return net.eval()


def with_exits(trained: Any, **options: Any) -> Any:
    return sp.add_exits_(copy.deepcopy(trained), at=["1", "3"], **options)


def batches(n: int = 1500, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = points(n, seed)
    return list(zip(x.split(100), y.split(100), strict=True))


@pytest.fixture(scope="module")
def ready(trained) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = with_exits(trained)
        losses = sp.train_exits(model, batches(), epochs=8, lr=3e-2)
    assert losses[-1] < losses[0]
    return model


@pytest.fixture(autouse=True)
def as_before(ready) -> Any:
    ready.thresholds.fill_(NEVER)
    ready.reset_counts()
    yield


def test_before_calibration_it_is_the_network(trained, ready):
    x, _ = points(9)
    for model in (with_exits(trained), ready):
        torch.testing.assert_close(model(x), trained(x).softmax(1))
        assert model.left.tolist() == [0, 0, 9]
    # The network by itself is as it was too.
    torch.testing.assert_close(ready.net(x), trained(x))


def test_only_exits_have_learned(trained, ready):
    own = dict(ready.net.named_parameters()) | dict(ready.net.named_buffers())
    for name, value in (dict(trained.named_parameters()) | dict(trained.named_buffers())).items():
        assert torch.equal(own[name], value)


def test_later_layers_see_what_has_not_left_and_answers_stay(trained, ready):
    x, _ = points(200)
    first, second, last = ready.stage_answers(x)
    torch.testing.assert_close(last, trained(x).softmax(1))
    ready.thresholds.copy_(torch.tensor([first.amax(1).median(), second.amax(1).median()], dtype=torch.float64))
    for layer in (ready.net[2], ready.net[4]):
        layer.rows.clear()
    out = ready(x)
    gone = [int((ready.exits == place).sum()) for place in range(3)]
    assert 90 < gone[0] < 110 and gone[1] > 0 and gone[2] > 0 and ready.left.tolist() == gone
    assert ready.net[2].rows == [200 - gone[0]] and ready.net[4].rows == [gone[2]]
    expected = torch.stack([first, second, last])[ready.exits, torch.arange(200)]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_where_all_have_left_the_rest_does_not_run(ready):
    ready.thresholds.fill_(0.0)
    ready.net[2].rows.clear()
    x, _ = points(5)
    torch.testing.assert_close(ready(x), ready.stage_answers(x)[0])
    assert ready.net[2].rows == [5]  # of stage_answers


def test_exits_under_a_contract_spare_work(ready):
    contract = sp.calibrate(ready, points(4000, 2), "accuracy", max_drop=0.04)
    assert contract.holds and ready.share_left() == [0.0] * 3
    x, y = points(4000, 3)
    with sp.count() as ledger:
        right = (ready(x).argmax(1) == y).float().mean()
    with sp.count() as whole:
        own = (ready.net.eval()(x).argmax(1) == y).float().mean()
    assert own - right <= 0.04 and sum(ready.share_left()[:2]) > 0.05 and ledger.macs < whole.macs
    told = sp.explain(ready)
    assert [stage.name for stage in told.stages] == ["1", "3", "Sequential"]
    assert not sp.monitor(ready).drifted


def test_exits_and_network_learn_together(trained):
    model = with_exits(trained)
    before = copy.deepcopy(model.net.state_dict())
    losses = sp.train_exits(model, batches(), epochs=3, freeze=False)
    assert losses[-1] < losses[0] and not torch.equal(model.net.state_dict()["6.weight"], before["6.weight"])
    with pytest.raises(ValueError, match="learns from targets"):
        sp.train_exits(model, [points(9)[0]], freeze=False)


def test_state_goes_to_another_network_with_exits(trained, ready):
    other, (x, _) = with_exits(trained), points(50)
    ready.thresholds.fill_(0.6)
    other.load_state_dict(ready.state_dict())
    torch.testing.assert_close(other(x), ready(x))
    with pytest.raises(TypeError, match="copy the network"):
        copy.deepcopy(ready)


def test_inputs_may_be_a_mapping_and_layers_sequences():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

        def forward(self, tokens: torch.Tensor) -> Any:
            return self.out(self.b(self.a(tokens)).mean(1))

    model = sp.add_exits_(Encoder(), at=["a"], measure="margin")
    x = {"tokens": torch.randn(8, 5, 4)}
    sp.train_exits(model, [x])
    model.thresholds.fill_(float(model.sure(model.stage_answers(x)[0], 0).median()))
    assert model(x).shape == (8, CLASSES) and set(model.exits.tolist()) == {0, 1}


class PassesBy(nn.Module):
    """A connection that goes past the exit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) + x)


class Mixes(PassesBy):
    """Examples of a batch depend on one another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        return self.b(hidden - hidden.mean(0))


class Twice(PassesBy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(self.a(x)))


class Never(PassesBy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x)


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (PassesBy, "nothing can leave at 'a'"),
        (Mixes, "answers change when others leave at 'a'"),
        (Twice, "'a' runs more than once"),
        (Never, r"did not run.*\['a'\]"),
    ],
)
def test_networks_in_which_nothing_can_leave_are_refused(made, match):
    model = sp.add_exits_(made(), at=["a"])
    with pytest.raises(ValueError, match=match):
        sp.train_exits(model, [torch.randn(6, 4)])
    with pytest.raises((RuntimeError, ValueError)):
        model.stage_answers(torch.randn(6, 4))


def test_bad_places_and_batches(trained, ready):
    for at in ([], ["nowhere"], ["1", "1"], [""]):
        with pytest.raises(ValueError, match="at must name layers"):
            sp.add_exits_(copy.deepcopy(trained), at=at)
    with pytest.raises(ValueError, match="at least 1 batch"):
        sp.train_exits(ready, [])
    before = copy.deepcopy(ready.state_dict())
    bad = batches(300)
    bad[-1][0].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        sp.train_exits(ready, bad)
    assert all(torch.equal(value, before[name]) for name, value in ready.state_dict().items())
    with pytest.raises(RuntimeError, match=r"call sparingly\.train_exits"):
        with_exits(trained).stage_answers(points(3)[0])


class Residuals(nn.Module):
    """A stem, four equal blocks around which their input passes, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(4))
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def test_auto_chooses_where_inputs_may_leave():
    """Inside of a residual sum nobody may leave, so only the stem is left of Residuals; a plain sequence has places at
    a quarter and at half of its multiplications."""
    x = torch.randn(16, 4)
    net = Residuals()
    model = sp.add_exits_(net, at="auto")
    assert model.names == ["Residuals"]
    sp.train_exits(model, [x])
    assert model.names == ["stem", "Residuals"]
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 16), *[nn.Linear(16, 16) for _ in range(8)], nn.Linear(16, CLASSES))
    model = sp.add_exits_(plain, at="auto")
    sp.train_exits(model, [x])
    # 64 + 8 * 256 + 48 multiplications: after the second of the large layers a quarter is done, after the fourth half.
    assert model.names == ["2", "4", "Sequential"]
    model.thresholds.fill_(0.0)
    model(x)
    assert model.exits.tolist() == [0] * 16


def test_auto_says_when_there_is_no_place():
    model = sp.add_exits_(PassesBy(), at="auto")
    with pytest.raises(ValueError, match="nothing can leave at any of"):
        sp.train_exits(model, [torch.randn(8, 4)])
    with pytest.raises(ValueError, match='at must be a list of layers\' names or "auto"'):
        sp.add_exits_(PassesBy(), at="a")  # pyright: ignore[reportArgumentType]


def test_removed_exits_leave_the_network_as_it_was():
    net = Residuals()
    model = sp.add_exits_(net, at=["stem"])
    assert model.remove() is net
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_training_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(_passes, "SAVE_EVERY_S", 0.0)
    data = [torch.randn(16, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def fresh() -> ExitNetwork:
        torch.manual_seed(1)
        return sp.add_exits_(Residuals(), at=["stem"])

    whole = fresh()
    torch.manual_seed(2)
    losses = sp.train_exits(whole, data, epochs=3)
    broken, calls = fresh(), []

    def interrupt(what: str, part: float | None) -> None:
        calls.append(part)
        if len(calls) == 10:
            raise KeyboardInterrupt

    torch.manual_seed(2)
    with pytest.raises(KeyboardInterrupt):
        sp.train_exits(broken, data, epochs=3, progress=interrupt, checkpoint=tmp_path / "exits.pt")
    assert broken.heads[0].linear is None  # As before.
    again = sp.train_exits(broken, data, epochs=3, checkpoint=tmp_path / "exits.pt")
    assert again == pytest.approx(losses)
    for one, other in zip(whole.heads.parameters(), broken.heads.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="is of a training of 18 steps, this one has 6"):
        sp.train_exits(fresh(), data, checkpoint=tmp_path / "exits.pt")
