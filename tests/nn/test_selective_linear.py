"""A trained linear layer that reads the input channels that matter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly.energy import count
from sparingly.nn.linear import SelectiveLinear
from sparingly.nn.sample import Sample
from sparingly.nn.selective import GRADIENTS, MANY, OFF, UNFITTED
from sparingly.selectors.threshold import InputThreshold

WIDTH, OUT = 24, 10


def converted(threshold: float | None = 0.5, *, bias: bool = True, conv1d: bool = False) -> tuple[Any, Tensor]:
    """(SelectiveLinear, the dense weight [out, in])."""
    if conv1d:
        layer: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D(OUT, WIDTH)
        nn.init.normal_(layer.bias)
        weight = layer.weight.detach().t().clone()
    else:
        layer = nn.Linear(WIDTH, OUT, bias=bias)
        weight = layer.weight.detach().clone()
    return SelectiveLinear.from_dense(layer.eval(), InputThreshold(threshold)), weight


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 40])
@torch.no_grad()
def test_result_is_the_product_of_the_kept_inputs(conv1d, tokens):
    layer, weight = converted(conv1d=conv1d)
    x = torch.randn(tokens, WIDTH)
    kept = torch.where(x.abs() < 0.5, 0.0, x)
    want = F.linear(kept.double(), weight.double(), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-6)
    assert (layer(x) - F.linear(x, weight, layer.bias)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (2, 2), (3, 4)])
@torch.no_grad()
def test_zero_threshold_is_the_dense_layer(dtype, shape):
    layer, weight = converted(0.0)
    layer.to(dtype)
    x = torch.randn(*shape, WIDTH).to(dtype)
    got = layer(x)
    want = F.linear(x.double(), weight.to(dtype).double(), layer.bias.double())
    assert got.dtype == dtype and got.shape == (*shape, OUT)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_columns_of_cut_inputs_are_not_read():
    layer, _ = converted(0.5)
    x = torch.randn(1, WIDTH)
    cut = x[0].abs() < 0.5
    assert 0 < int(cut.sum()) < WIDTH
    want = layer(x)
    layer.weight[:, cut] = float("nan")
    torch.testing.assert_close(layer(x), want, rtol=0, atol=0)
    layer.weight[:, (~cut).nonzero()[0]] = float("nan")
    assert layer(x).isnan().all()


@torch.no_grad()
def test_ledger_holds_the_rows_that_were_read():
    layer, _ = converted(0.5, bias=False)
    x = torch.randn(1, WIDTH)
    kept = int((x.abs() >= 0.5).sum())
    with count() as ledger:
        layer(x)
    (entry,) = [entry for (name, _), entry in ledger.entries.items() if "threshold_accumulate" in name]
    assert entry.macs == kept * OUT
    fixed = entry.bytes_read - kept * OUT * 4
    assert 0 <= fixed <= 4 * (2 * WIDTH + OUT) + 64  # the input and its cuts


@torch.no_grad()
def test_counts_say_what_ran():
    layer, _ = converted(0.5)
    few, many = torch.randn(3, WIDTH), torch.randn(7, WIDTH)
    layer(few)
    layer(many)
    kept = int((few.abs() >= 0.5).sum())
    assert layer.ran.tolist()[:3] == [3, kept, 7]
    assert layer.why_dense == {MANY: 7}
    assert layer.share_run() == pytest.approx((kept / WIDTH + 7) / 10)
    layer.reset()
    assert layer.share_run() is None and not layer.why_dense


def test_reasons_for_the_dense_product():
    layer, weight = converted(None)
    x = torch.randn(1, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    layer, weight = converted(0.5)
    layer(x)  # its parameters want gradients
    layer.off = True
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    assert layer.why_dense == {GRADIENTS: 1, OFF: 1}
    assert UNFITTED in converted(None)[0]._idle()


def test_gradients_are_those_of_the_masked_product():
    layer, weight = converted(0.5)
    x = torch.randn(2, WIDTH, requires_grad=True)
    layer(x).square().sum().backward()
    dense = nn.Linear(WIDTH, OUT)
    dense.load_state_dict({"weight": weight, "bias": layer.bias.detach()})
    other = x.detach().clone().requires_grad_()
    dense(torch.where(other.abs() < 0.5, 0.0, other)).square().sum().backward()
    for got, want in ((x.grad, other.grad), (layer.weight.grad, dense.weight.grad), (layer.bias.grad, dense.bias.grad)):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_nan_shows_and_no_tokens_give_no_rows():
    layer, _ = converted(0.5)
    x = torch.randn(2, WIDTH)
    x[1, 3] = float("nan")
    got = layer(x)
    assert got[0].isfinite().all() and got[1].isnan().all()
    assert layer(torch.randn(0, WIDTH)).shape == (0, OUT)
    assert layer(torch.randn(2, 0, WIDTH)).shape == (2, 0, OUT)


@pytest.mark.parametrize("shape", [(2, WIDTH // 2), (WIDTH, 1), (1, 2 * WIDTH)])
@torch.no_grad()
def test_inputs_of_another_width_are_refused(shape):
    layer, _ = converted(0.5)
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(*shape))


@torch.no_grad()
def test_named_as_in_torch():
    layer, _ = converted(0.5)
    x = torch.randn(2, WIDTH)
    torch.testing.assert_close(layer(input=x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("conv1d", [False, True])
def test_the_way_back_is_exact(conv1d):
    if conv1d:
        original: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D(OUT, WIDTH)
    else:
        original = nn.Linear(WIDTH, OUT)
    parameter = original.weight
    values, stride = parameter.detach().clone(), parameter.stride()
    layer = SelectiveLinear.from_dense(original, InputThreshold(0.5))
    assert layer.weight is parameter and set(layer.state_dict()) >= {"weight", "bias"}
    back = layer.dense()
    assert back is original and back.weight is parameter
    assert parameter.stride() == stride and torch.equal(parameter, values)


def test_a_memory_layout_of_the_users_own_comes_back():
    original = nn.Linear(WIDTH, OUT)
    original.weight.data = original.weight.data.t().contiguous().t()
    stride = original.weight.stride()
    SelectiveLinear.from_dense(original, InputThreshold(0.5)).dense()
    assert original.weight.stride() == stride


@torch.no_grad()
def test_one_input_channel_is_one_row_after_copies_and_casts():
    layer, _ = converted(0.5)
    x = torch.randn(1, WIDTH)
    for made in (copy.deepcopy(layer), copy.deepcopy(layer).double().float()):
        assert made.weight.t().is_contiguous()
        torch.testing.assert_close(made(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight.t().is_contiguous() and half.selector.cut.dtype == torch.float32


@torch.no_grad()
def test_a_weight_that_was_exchanged_is_turned_again():
    layer, weight = converted(0.5)
    x = torch.randn(1, WIDTH)
    want = layer(x)
    layer.load_state_dict({"weight": weight.clone(), "bias": layer.bias}, strict=False, assign=True)
    assert layer.weight.t().is_contiguous()
    torch.testing.assert_close(layer(x), want)


def test_fit_prices_every_setting():
    layer, weight = converted(None)
    sample = Sample(torch.randn(200, WIDTH), torch.randn(200, OUT))
    options = layer.fit(sample)
    assert [option.setting for option in options] == layer.selector.settings()
    losses, sizes = [o.loss for o in options], [o.size_bytes for o in options]
    assert losses == sorted(losses, reverse=True) and sizes == sorted(sizes)
    assert options[-1].loss == 0 and options[-1].size_bytes >= weight.numel() * 4
    # The loss of a setting is half the mean square of what the left-out inputs add, along the gradient.
    layer.selector.setting = options[3].setting
    left = sample.inputs - layer.selector.masked(sample.inputs)
    moved = ((left @ weight.t()) * sample.gradients).sum(dim=1)
    assert options[3].loss == pytest.approx(float(moved.square().mean()) / 2, rel=1e-4)
