"""The hidden layer of a trained network, of which the units run that an input needs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly.energy import count
from sparingly.nn.linear import SelectiveLinear
from sparingly.nn.mlp import WRAPPED, SelectiveMLP
from sparingly.nn.sample import Sample
from sparingly.nn.selective import GRADIENTS, MANY, OFF, UNFITTED
from sparingly.selectors import InputThreshold, LowRank, Random, Threshold, Zeros

WIDTH, UNITS, OUT = 12, 48, 10


class Gated(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.g, self.u = nn.Linear(WIDTH, UNITS, bias=bias), nn.Linear(WIDTH, UNITS, bias=bias)
        self.d = nn.Linear(UNITS, OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.silu(self.g(x)) * self.u(x))


class Plain(nn.Module):
    def __init__(self, act: nn.Module, bias: bool = True):
        super().__init__()
        self.u, self.act, self.d = nn.Linear(WIDTH, UNITS, bias=bias), act, nn.Linear(UNITS, OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.act(self.u(x)))


class Fused(nn.Module):
    def __init__(self, gate_first: bool, bias: bool = True):
        super().__init__()
        self.both, self.d = nn.Linear(WIDTH, 2 * UNITS, bias=bias), nn.Linear(UNITS, OUT, bias=bias)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x).chunk(2, dim=-1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.d(F.silu(gate) * up)


class Convs(nn.Module):
    """GPT-2's: weights [in, out]."""

    def __init__(self):
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.u, self.d = conv1d(UNITS, WIDTH), conv1d(OUT, UNITS)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_().mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.gelu(self.u(x)))


KINDS = ["gated", "gated without biases", "plain", "gate_up", "up_gate", "up_gate without biases", "conv1d"]


def make(kind: str, selector: Any) -> tuple[Any, Any]:
    """(selective, a dense copy)."""
    original: Any
    names: tuple[Any, ...]
    bias = "without" not in kind
    kind = kind.split()[0]
    if kind == "gated":
        original, names = Gated(bias), ("u", "d", F.silu, selector, "g")
    elif kind == "plain":
        original = Plain(nn.GELU(), bias)
        names = ("u", "d", original.act, selector)
    elif kind == "conv1d":
        original, names = Convs(), ("u", "d", F.gelu, selector)
    else:
        original, names = Fused(kind == "gate_up", bias), ("both", "d", F.silu, selector, "both", kind == "gate_up")
    original.eval()
    dense = copy.deepcopy(original)
    return SelectiveMLP(original, *names), dense


def parts(dense: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(activations, hidden values) of the dense twin."""
    if isinstance(dense, Gated):
        values = F.silu(dense.g(x))
        return values, values * dense.u(x)
    if isinstance(dense, Fused):
        first, second = dense.both(x).chunk(2, dim=-1)
        gate, up = (first, second) if dense.gate_first else (second, first)
        return F.silu(gate), F.silu(gate) * up
    values = F.gelu(dense.u(x))
    return values, values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 4, 5, 30])
@torch.no_grad()
def test_zero_threshold_is_the_dense_network(kind, tokens):
    layer, dense = make(kind, Threshold(0.0))
    x = torch.randn(tokens, WIDTH)
    torch.testing.assert_close(layer(x).double(), copy.deepcopy(dense).double()(x.double()), rtol=1e-5, atol=1e-5)
    assert layer.ran[1] == (tokens * UNITS if tokens <= 4 else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
@torch.no_grad()
def test_result_is_that_of_the_kept_units(kind, tokens):
    layer, dense = make(kind, Threshold(0.1))
    x = torch.randn(tokens, WIDTH)
    values, hidden = parts(dense, x)
    kept = values.abs() >= 0.1
    want = dense.d(torch.where(kept, hidden, 0.0))
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    assert (want - dense(x)).abs().max() > 1e-3
    if tokens <= 4:
        assert layer.ran[:2].tolist() == [tokens, int(kept.sum())]
    else:
        assert layer.why_dense == {MANY: tokens}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_of_units_that_do_not_run_are_not_read(kind):
    layer, dense = make(kind, Threshold(0.1))
    x = torch.randn(1, WIDTH)
    cut = (parts(dense, x)[0] < 0.1).logical_and(parts(dense, x)[0] > -0.1)[0]
    assert 0 < int(cut.sum()) < UNITS
    want = layer(x)
    matrices = [layer.d.weight.t() if kind != "conv1d" else layer.d.weight]
    if kind.startswith("gated"):
        matrices.append(layer.u.weight)
    if kind.startswith(("gate_up", "up_gate")):
        both = layer.both.weight
        matrices.append(both[UNITS:] if kind == "gate_up" else both[:UNITS])
    for rows in matrices:
        rows[cut] = float("nan")
    assert want.isfinite().all() and torch.equal(layer(x), want)
    matrices[-1][(~cut).nonzero()[0]] = float("nan")
    assert layer(x).isnan().any()


@torch.no_grad()
def test_ledger_holds_what_was_read():
    layer, dense = make("gated without biases", Threshold(0.1))
    x = torch.randn(1, WIDTH)
    kept = int((parts(dense, x)[0].abs() >= 0.1).sum())
    with count() as ledger:
        layer(x)
    (entry,) = [entry for (name, _), entry in ledger.entries.items() if "gated_rows" in name]
    assert entry.macs == kept * (WIDTH + OUT)
    assert 0 <= entry.bytes_read - kept * (WIDTH + OUT) * 4 <= 4 * (2 * UNITS + WIDTH + OUT) + 64
    assert layer.unit_bytes() == 4 * (WIDTH + OUT) and layer.fixed_bytes() == 4 * WIDTH * UNITS


@torch.no_grad()
def test_exact_zeros_of_relu_lose_nothing():
    original = Plain(nn.ReLU()).eval()
    dense = copy.deepcopy(original)
    layer = SelectiveMLP(original, "u", "d", original.act, Zeros())
    x = torch.randn(200, WIDTH)
    rows = torch.cat([layer(x[i : i + 1]) for i in range(200)])
    torch.testing.assert_close(rows, dense(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(rows.argmax(1), dense(x).argmax(1))
    assert layer.ran[:2].tolist() == [200, int((dense.u(x) > 0).sum())]
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_guess_of_all_units_is_dense_and_of_some_the_masked_network(kind):
    layer, dense = make(kind, LowRank(4))
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
    assert layer.why_dense == {UNFITTED: 3}
    options = layer.fit(Sample(torch.randn(100, WIDTH), torch.randn(100, OUT)))
    assert [option.setting for option in options] == layer.selector.settings() and options[-1].loss == 0
    layer.reset()
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
    assert layer.ran[:3].tolist() == [3, 3 * UNITS, 0]
    layer.selector.setting = 50
    ids = layer.selector.select(x).per_token(3)
    hidden = parts(dense, x)[1]
    masked = torch.zeros_like(hidden).scatter_(1, ids, hidden.gather(1, ids))
    want = dense.d(masked)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x.repeat(4, 1)), want.repeat(4, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[None]), want[None], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_units_that_a_guess_leaves_out_are_not_read(monkeypatch):
    monkeypatch.setattr(LowRank, "holds_for", lambda *_: True)  # Else other weights are noticed.
    layer, _ = make("gated", LowRank(4))
    layer.fit(Sample(torch.randn(100, WIDTH), torch.randn(100, OUT)))
    layer.selector.setting = 30
    x = torch.randn(1, WIDTH)
    want, kept = layer(x), layer.selector.select(x).ids[0]
    cut = torch.ones(UNITS, dtype=torch.bool)
    cut[kept] = False
    for rows in (layer.g.weight, layer.u.weight, layer.d.weight.t()):
        rows[cut] = float("nan")
    assert want.isfinite().all() and torch.equal(layer(x), want)


@torch.no_grad()
def test_random_units_run_too():
    layer, _ = make("gated", Random(10))
    (option,) = layer.fit(Sample(torch.randn(20, WIDTH), torch.randn(20, OUT)))
    assert option.loss > 0 and layer(torch.randn(2, WIDTH)).shape == (2, OUT)
    assert layer.ran[:2].tolist() == [2, 20]


def fitted(kind: str, setting: int) -> tuple[Any, Any]:
    layer, dense = make(kind, Threshold())
    layer.fit(Sample(torch.randn(400, WIDTH), torch.randn(400, OUT)))
    layer.selector.setting = setting
    layer.reset()
    return layer, dense


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_token_gives_what_many_give_after_a_fit(kind):
    layer, dense = fitted(kind, 40)
    x = torch.randn(64, WIDTH)
    many, one = layer(x), torch.cat([layer(row[None]) for row in x])
    # What units at rest add is kept in eight bits in gated layers.
    torch.testing.assert_close(one, many, rtol=2e-2, atol=2e-2 * float(many.abs().mean()))
    assert float((many - dense(x)).abs().mean()) / float(many.abs().mean()) > 0.05 or kind == "plain"
    assert 0.2 * UNITS < layer.ran[1] / layer.ran[0] < 0.7 * UNITS


@pytest.mark.parametrize("kind", ["gated", "plain"])
@torch.no_grad()
def test_weights_that_change_count_at_once(kind):
    layer, _ = fitted(kind, 40)
    x = torch.randn(3, WIDTH)
    layer(x)
    changes = [
        lambda: layer.d.weight.add_(0.5),
        lambda: layer.load_state_dict(layer.state_dict() | {"d.weight": torch.randn(OUT, UNITS)}),
        lambda: setattr(layer.d.weight, "data", layer.d.weight.data * 2),
        lambda: layer.to(torch.float64).to(torch.float32),
        lambda: layer.u.weight.mul_(1.5),
        lambda: layer.d.weight.data.add_(torch.randn(OUT, UNITS)),  # as peft merges: no count of changes goes up
    ]
    for change in changes:
        change()
        many = layer(x.repeat(3, 1))[:3]
        torch.testing.assert_close(layer(x), many, rtol=3e-2, atol=3e-2 * float(many.abs().mean()))


@pytest.mark.parametrize("kind", KINDS)
def test_prices_of_settings(kind):
    layer, dense = make(kind, Threshold())
    sample = Sample(torch.randn(300, WIDTH), torch.randn(300, OUT))
    options = layer.fit(sample)
    losses, sizes = [o.loss for o in options], [o.size_bytes for o in options]
    assert losses == sorted(losses, reverse=True) and sizes == sorted(sizes) and options[-1].loss == 0
    assert options[-1].size_bytes >= layer.unit_bytes() * UNITS
    # First order along the gradient: what the output changes by.
    option = options[8]
    layer.selector.setting = option.setting
    with torch.no_grad():
        moved = ((layer(sample.inputs) - dense(sample.inputs)) * sample.gradients).sum(dim=1)
    assert option.loss == pytest.approx(float(moved.square().mean()) / 2, rel=1e-3)


def test_reasons_for_dense_products():
    layer, dense = make("gated", Threshold(0.1))
    x = torch.randn(1, WIDTH)
    layer(x)
    layer.off = True
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-6)
        layer.off = False
        layer(torch.randn(9, WIDTH))
        layer.u = nn.Sequential(layer.u)
        layer(x)
    assert layer.why_dense == {GRADIENTS: 1, OFF: 1, MANY: 9, WRAPPED: 1}
    assert layer.ran[:3].tolist() == [0, 0, 12] and layer.share_run() == 1


def test_gradients_are_those_of_the_masked_network():
    layer, dense = make("gated", Threshold(0.1))
    for parameter in (*layer.parameters(), *dense.parameters()):
        parameter.grad = None
    x = torch.randn(2, WIDTH)
    layer(x).square().sum().backward()
    values, hidden = parts(dense, x)
    dense.d(torch.where(values.abs() >= 0.1, hidden, 0.0)).square().sum().backward()
    for (name, got), want in zip(layer.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_is_exact(kind):
    layer, dense = make(kind, Threshold(0.1))
    (original,) = layer._original
    assert set(dense.state_dict()) <= set(layer.state_dict())
    layer.to(torch.float64).to(torch.float32)
    back = layer.dense()
    assert back is original
    for (name, want), got in zip(dense.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride(), name


def test_modes_of_children_are_their_own():
    original = Plain(nn.ReLU())
    original.act.eval()
    layer: Any = SelectiveMLP(original, "u", "d", original.act, Zeros())
    assert layer.training and layer.u.training and not layer.act.training
    layer.dense()
    assert original.training and original.u.training and not original.act.training


def test_a_child_of_two_names_keeps_both():
    original = Plain(nn.ReLU())
    original.more = original.act
    layer = SelectiveMLP(original, "u", "d", original.act, Zeros())
    assert layer.more is layer.act


@torch.no_grad()
def test_the_first_layer_may_be_selective_itself():
    layer, dense = make("gated", Threshold(0.0))
    layer.g = SelectiveLinear.from_dense(layer.g, InputThreshold(0.0))
    x = torch.randn(1, WIDTH)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
    assert layer.ran[0] == 1 and layer.g.ran[0] == 1 and layer.fixed_bytes() == 0
    assert layer.first == "g"


@torch.no_grad()
def test_nan_shows_and_no_tokens_give_no_rows():
    layer, _ = make("gated", Threshold(0.1))
    x = torch.randn(2, WIDTH)
    x[1, 0] = float("nan")
    got = layer(x)
    assert got[0].isfinite().all() and got[1].isnan().all()
    assert layer(x[:0]).shape == (0, OUT)


@pytest.mark.parametrize("shape", [(2, WIDTH // 2), (WIDTH, 1), (1, 2 * WIDTH)])
@torch.no_grad()
def test_inputs_of_another_width_are_refused(shape):
    layer, _ = make("gated", Threshold(0.1))
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(*shape))


@pytest.mark.parametrize("selector", [Threshold(0.0), LowRank(3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_dtypes(selector, dtype):
    layer, dense = make("gated", selector)
    layer.fit(Sample(torch.randn(100, WIDTH), torch.randn(100, OUT)))
    x, tolerance = torch.randn(1, WIDTH).to(dtype), {torch.bfloat16: 0.03, torch.float16: 4e-3}.get(dtype, 1e-6)
    got = layer.to(dtype)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), dense.to(dtype).double()(x.double()), rtol=tolerance, atol=tolerance)


class Named(Gated):
    def forward(self, hidden_states: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(hidden_states)


@torch.no_grad()
def test_the_input_may_come_by_the_name_that_the_original_gives_it():
    original = Named()
    layer: Any = SelectiveMLP(original, "u", "d", F.silu, Threshold(0.1), gate="g")
    x = torch.randn(2, WIDTH)
    assert torch.equal(layer(hidden_states=x), layer(x)) and original(hidden_states=x).shape == layer(x).shape
    for wrong in ({"states": x}, {"hidden_states": x, "x": x}, {}):
        with pytest.raises(TypeError, match="one input, hidden_states"):
            layer(**wrong)
    with pytest.raises(TypeError, match="one input, hidden_states"):
        layer(x, hidden_states=x)
