"""Selected units that run from int8 rows: the same values for one token and for many, and weights that stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly.convert import convert_, restore_
from sparingly.energy import count
from sparingly.nn._int8 import Bank
from sparingly.nn.linear import SelectiveLinear
from sparingly.nn.mlp import WRAPPED, SelectiveMLP
from sparingly.nn.sample import Sample
from sparingly.nn.screen_head import ScreenHead
from sparingly.nn.selective import GRADIENTS, LEARNS, MANY, OFF, selective_modules
from sparingly.selectors import InputThreshold, LowRank, Random, Screen, Threshold

WIDTH, UNITS, OUT, CLASSES = 24, 48, 10, 300
CUT = 0.1


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.u, self.d = nn.Linear(WIDTH, UNITS), nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.silu(self.g(x)) * self.u(x))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.d = nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.gelu(self.u(x)))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.d = nn.Linear(WIDTH, 2 * UNITS), nn.Linear(UNITS, OUT)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.d(F.silu(gate) * up)


class Net(nn.Module):
    """An MLP and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = Gated(), nn.Linear(OUT, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(x))


def make(kind: str, threshold: float | None = CUT) -> tuple[Any, Any]:
    """(a selective layer with int8 rows, the dense one)."""
    if kind in ("linear", "conv1d"):
        original: Any = nn.Linear(WIDTH, OUT)
        if kind == "conv1d":
            original = pytest.importorskip("transformers.pytorch_utils").Conv1D(OUT, WIDTH)
            nn.init.normal_(original.weight)
        dense = copy.deepcopy(original)
        layer: Any = SelectiveLinear.from_dense(original, InputThreshold(threshold))
    else:
        made, first, gate, act = {
            "gated": (Gated, "u", "g", F.silu),
            "plain": (Plain, "u", None, F.gelu),
            "fused": (Fused, "both", "both", F.silu),
        }[kind]
        original = made()
        dense = copy.deepcopy(original)
        layer = SelectiveMLP(original, first, "d", act, Threshold(threshold), gate=gate)
    layer.rows = "int8"
    return layer.eval(), dense


def rounded(rows: Tensor) -> Tensor:
    """What int8 rows [n, d] stand for, float64, from their definition."""
    scale = rows.double().abs().amax(dim=1, keepdim=True) / 127
    return (rows.double() / scale).round() * scale


def rounded_inputs(rows: Tensor) -> Tensor:
    """The same of rows whose columns, one output each, were brought to the same size before."""
    outputs = rows.double().square().mean(dim=0).sqrt()
    return rounded(rows.double() / outputs) * outputs


def reference(kind: str, dense: Any, x: Tensor) -> Tensor:
    """The kept units' answer from rounded rows, float64."""
    if kind in ("linear", "conv1d"):
        weight = dense.weight if kind == "conv1d" else dense.weight.t()
        return torch.where(x.abs() < CUT, 0.0, x).double() @ rounded_inputs(weight) + dense.bias.double()
    if kind == "plain":
        values, factor = F.gelu(dense.u(x)), 1.0
    else:
        both = dense.both if kind == "fused" else None
        values = F.silu(dense.g(x) if both is None else both(x)[:, :UNITS])
        up, bias = (dense.u.weight, dense.u.bias) if both is None else (both.weight[UNITS:], both.bias[UNITS:])
        factor = x.double() @ rounded(up).t() + bias.double()
    hidden = torch.where(values.abs() < CUT, 0.0, values.double() * factor)
    return hidden @ rounded_inputs(dense.d.weight.t()) + dense.d.bias.double()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


KINDS = ["linear", "conv1d", "gated", "plain", "fused"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_token_and_many_are_the_rounded_rows_of_the_kept_units(kind):
    layer, dense = make(kind)
    x = torch.randn(9, WIDTH)
    wanted = reference(kind, dense, x)
    one = torch.cat([layer(part) for part in x.split(1)])
    assert layer.ran[0] == 9 and not layer.why_dense
    many = layer(x)
    assert layer.why_dense == {MANY: 9}
    assert error(one, wanted) < 1e-5 and error(many, wanted) < 1e-5
    # Rounding shows, or none of this could fail.
    layer.rows = None
    assert error(torch.cat([layer(part) for part in x.split(1)]), wanted) > 1e-4
    assert error(layer(x), wanted) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_wrong_code_shows(kind):
    layer, dense = make(kind)
    x = torch.randn(9, WIDTH)
    wanted = reference(kind, dense, x)
    layer(x)
    for name in ("int8", "int8 up", "int8 down"):
        if name not in layer._made:
            continue
        codes = layer._made[name].value.rows
        codes[3, 5] ^= 64
        assert error(torch.cat([layer(part) for part in x.split(1)]), wanted) > 1e-3, name
        assert error(layer(x), wanted) > 1e-3, name
        codes[3, 5] ^= 64
    assert error(layer(x), wanted) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "plain", "gated"])
@torch.no_grad()
def test_units_at_their_centre_count_the_same_for_one_token_and_many(kind):
    layer, _ = make(kind, None)
    layer.fit(Sample(torch.randn(300, WIDTH) + 0.5, torch.randn(300, OUT)))
    layer.selector.setting = 40
    x = torch.randn(9, WIDTH) + 0.5
    one = torch.cat([layer(part) for part in x.split(1)])
    assert layer.share_run() < 0.7 and layer.selector.centre.abs().max() > 0.01
    # What resting units of a gated layer add is a matrix rounded to int8 itself.
    assert error(one, layer(x)) < (1e-2 if kind == "gated" else 1e-5)


@torch.no_grad()
def test_exact_logits_are_those_of_rounded_rows():
    dense = nn.Linear(WIDTH, CLASSES)
    head = ScreenHead.from_dense(copy.deepcopy(dense), Screen(8, 40))
    head.rows = "int8"
    head.fit(Sample(torch.randn(500, WIDTH), torch.empty(0)))
    head.selector.setting = 40
    x = torch.randn(6, WIDTH)
    ids = head.selector.select(x).ids
    wanted = (x.double() @ rounded(dense.weight).t() + dense.bias.double()).gather(1, ids)
    found = head(x)
    assert head.ran[:2].tolist() == [6, 240] and not head.why_dense
    assert error(found.gather(1, ids), wanted) < 1e-5 < 1e-4 < error(dense(x).gather(1, ids), wanted)
    torch.testing.assert_close(torch.cat([head(part) for part in x.split(1)]), found)
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), found)
    head._made["int8"].value.rows[int(ids[0, 0]), 2] ^= 64
    assert error(head(x).gather(1, ids), wanted) > 1e-3


@torch.no_grad()
def test_bytes_are_those_of_codes_and_scales():
    layer, _ = make("linear")
    x = torch.randn(1, WIDTH)
    kept = int((x.abs() >= CUT).sum())
    layer(x)
    with count() as ledger:
        layer(x)
    (entry,) = [entry for (name, _), entry in ledger.entries.items() if "threshold_accumulate" in name]
    assert 0 <= entry.bytes_read - kept * (OUT + 4) <= 4 * (2 * WIDTH + OUT)
    assert layer.unit_bytes() == OUT + 4 and layer.dense_bytes() == 4 * (OUT + WIDTH * OUT)
    mlp, _ = make("gated")
    assert mlp.unit_bytes() == WIDTH + 4 + OUT + 4 and mlp.fixed_bytes() == 4 * WIDTH * UNITS
    assert mlp.bytes_read(10, 6) == mlp.fixed_bytes() + 10 * (WIDTH + 4) + 6 * (OUT + 4)
    mlp(x)
    with count() as ledger:
        mlp(x)
    (entry,) = [entry for (name, _), entry in ledger.entries.items() if "gated_rows" in name]
    units = int(mlp.ran[1]) // 2
    # And a bias of each unit's row of up, the cut, the gate, the input, the answer's start.
    assert 0 <= entry.bytes_read - units * (WIDTH + 4 + OUT + 4 + 4) <= 4 * (2 * UNITS + WIDTH + OUT)
    head = ScreenHead.from_dense(nn.Linear(WIDTH, CLASSES), Screen(8, 40))
    head.rows = "int8"
    assert head.unit_bytes() == WIDTH + 4 + 4


@pytest.mark.parametrize("kind", ["linear", "gated", "plain"])
def test_gradients_and_dense_answers_are_those_of_the_weights(kind):
    layer, dense = make(kind)
    plain = copy.deepcopy(layer)
    plain.rows = None
    for tokens in (2, 9):
        x = torch.randn(tokens, WIDTH)
        layer.zero_grad()
        plain.zero_grad()
        found, wanted = layer(x), plain(x)
        assert torch.equal(found, wanted)
        found.square().sum().backward()
        wanted.square().sum().backward()
        for got, want in zip(layer.parameters(), plain.parameters(), strict=True):
            assert torch.equal(got.grad, want.grad)
    assert layer.why_dense == {LEARNS: 11} and plain.why_dense == {GRADIENTS: 2, MANY: 9}
    layer.off = True
    x = torch.randn(2, WIDTH)
    torch.testing.assert_close(layer(x), dense(x))
    assert layer.why_dense[OFF] == 2


@pytest.mark.parametrize("change", ["in place", "memory", "not counted", "loaded"])
@pytest.mark.parametrize("kind", ["linear", "gated"])
@torch.no_grad()
def test_changed_weights_are_noticed(kind, change):
    layer, dense = make(kind)
    x = torch.randn(2, WIDTH)
    before = layer(x)
    weight, twin = (layer.weight, dense.weight) if kind == "linear" else (layer.d.weight, dense.d.weight)
    twin.mul_(1.5).add_(0.1)
    if change == "in place":
        weight.mul_(1.5).add_(0.1)
    elif change == "memory":
        weight.data = weight.data * 1.5 + 0.1
    elif change == "not counted":
        weight.data.mul_(1.5).add_(0.1)
    else:
        layer.load_state_dict(dense.state_dict(), strict=False)
    assert error(layer(x), reference(kind, dense, x)) < 1e-5
    assert error(layer(x), before) > 1e-2


@pytest.mark.parametrize("kind", ["linear", "gated"])
@torch.no_grad()
def test_copies_and_casts(kind):
    layer, dense = make(kind)
    x = torch.randn(9, WIDTH)
    want = layer(x)
    twin = copy.deepcopy(layer)
    assert twin.rows == "int8" and torch.equal(twin(x), want)
    wide = copy.deepcopy(layer).double()
    assert error(wide(x[:2].double()), reference(kind, dense, x[:2])) < 1e-5
    half = copy.deepcopy(layer).to(torch.bfloat16)
    for tokens in (1, 9):
        found = half(x[:tokens].bfloat16())
        assert found.dtype == torch.bfloat16 and error(found, want[:tokens]) < 4e-2
    (made,) = {bank.value.rows.dtype for name, bank in half._made.items() if name.startswith("int8")}
    assert made == torch.int8


@torch.no_grad()
def test_a_replaced_layer_inside_runs_with_its_own_weights():
    layer, _ = make("gated")
    layer.u.register_forward_hook(lambda module, given, out: out)
    plain = copy.deepcopy(layer)
    plain.rows = None
    x = torch.randn(2, WIDTH)
    assert torch.equal(layer(x), plain(x)) and layer.why_dense == {WRAPPED: 2}


@torch.no_grad()
def test_a_network_is_converted_and_restored_bit_for_bit():
    net = Net().eval()
    dense = copy.deepcopy(net)
    x = torch.randn(3, WIDTH)
    changes = convert_(net, {"mlp": Threshold(CUT), "linear": InputThreshold(0.2), "head": Screen(4, 8)}, rows="int8")
    layers = selective_modules(net)
    assert set(layers) == {change.path for change in changes.changed} >= {"mlp", "mlp.g", "head"}
    assert {layer.rows for layer in layers.values()} == {"int8"}
    net(x)
    keys = [name for name in net.state_dict() if ".selector." not in name]
    assert keys == list(dense.state_dict())
    restore_(net)
    for (name, got), want in zip(net.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride(), name
    assert torch.equal(net(x), dense(x))


def test_what_has_no_int8_rows_is_refused_or_left_alone_with_the_reason():
    with pytest.raises(ValueError, match=r"rows must be None .* or 'int8', got 'int4'"):
        convert_(Net().eval(), Threshold(), rows="int4")
    with pytest.raises(ValueError, match=r"mlp: int8 rows are for"):
        convert_(Net().eval(), LowRank(4), rows="int8")
    net = Net().eval()
    changes = convert_(net, {"mlp": Random(9), "head": Screen(4, 8)}, rows="int8")
    assert [change.path for change in changes.changed] == ["head"]
    assert any(skip.path == "mlp" and "int8 rows are for" in skip.reason for skip in changes.skipped)
    layer = SelectiveMLP(Gated(), "u", "d", F.silu, LowRank(4), gate="g")
    with pytest.raises(ValueError, match=r"got 'int8'.*SelectiveMLP with LowRank"):
        layer.rows = "int8"
    assert layer.rows is None


def test_rows_of_zeros_and_nan():
    rows = torch.randn(3, 5)
    rows[1], rows[2, 3] = 0.0, float("nan")
    values = Bank.int8(rows).values(torch.float32)
    assert torch.equal(values[1], torch.zeros(5)) and values[2].isnan().any()
    torch.testing.assert_close(values[0].double(), rounded(rows[:1])[0], rtol=1e-6, atol=1e-7)
