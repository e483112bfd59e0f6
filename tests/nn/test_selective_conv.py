"""A trained pointwise convolution that multiplies with the channels that are not zero."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly.energy import count
from sparingly.nn.conv import DTYPE, SelectiveConv
from sparingly.nn.sample import Sample
from sparingly.nn.selective import GRADIENTS, OFF
from sparingly.selectors import Threshold, Zeros

IN, OUT = 24, 16


def converted(bias: bool = True, selector: Any = None) -> tuple[SelectiveConv, nn.Conv2d]:
    """(SelectiveConv, the dense layer with memory of its own)."""
    layer = nn.Conv2d(IN, OUT, 1, bias=bias).eval()
    return SelectiveConv.from_dense(copy.deepcopy(layer), selector or Zeros()), layer


def image(*shape: int, channels_last: bool = False) -> Tensor:
    x = torch.randn(shape or (2, IN, 5, 7)).clamp(0, 6)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def wide(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@torch.no_grad()
def test_zeros_change_nothing_and_the_layout_stays(bias, channels_last):
    layer, dense = converted(bias)
    x = image(channels_last=channels_last)
    got = layer(x)
    torch.testing.assert_close(got.double(), wide(dense, x), rtol=1e-5, atol=1e-6)
    assert got.stride() == dense(x).stride()
    assert layer.ran.tolist() == [70, int((x != 0).sum()), 0, 0] and not layer.why_dense
    single = image(IN, 3, 3)
    torch.testing.assert_close(layer(single), dense(single), rtol=1e-5, atol=1e-6)
    one = image(1, IN, 1, 1)
    torch.testing.assert_close(layer(one), dense(one), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_threshold_leaves_out_small_values():
    layer, dense = converted(selector=Threshold(0.5))
    x = torch.randn(2, IN, 5, 7)
    kept = torch.where(x.abs() < 0.5, 0.0, x)
    torch.testing.assert_close(layer(x).double(), wide(dense, kept), rtol=1e-5, atol=1e-6)
    assert (layer(x) - dense(x)).abs().max() > 1e-2


@torch.no_grad()
def test_the_ledger_holds_what_ran_and_each_row_once():
    layer, dense = converted()
    x = image(channels_last=True)
    x[:, 3] = 0.0
    with count() as ledger:
        layer(x)
    with count() as whole:
        dense(x)
    (entry,) = [entry for (name, _), entry in ledger.entries.items() if "threshold_accumulate" in name]
    assert whole.macs - ledger.macs == int((x == 0).sum()) * OUT
    assert entry.bytes_read == 4 * ((IN - 1) * OUT + x.numel() + IN + OUT)
    assert not ledger.unknown


@torch.no_grad()
def test_channels_that_are_zero_everywhere_are_not_read():
    layer, _ = converted()
    x = image()
    x[:, 3] = 0.0
    want = layer(x)
    layer.weight[:, 3] = float("nan")
    torch.testing.assert_close(layer(x), want, rtol=0, atol=0)
    x[1, 3, 2, 2] = 1.0
    got = layer(x)
    assert got[1, :, 2, 2].isnan().all() and int(got.isnan().sum()) == OUT


def test_reasons_for_the_dense_product():
    layer, dense = converted()
    x = image()
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-6)  # its parameters want gradients
    with torch.no_grad():
        layer.off = True
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-6)
        layer.off = False
        layer.double()
        torch.testing.assert_close(layer(x.double()), wide(dense, x))
    assert layer.why_dense == {GRADIENTS: 70, OFF: 70, DTYPE: 70}
    assert layer.share_run() == 1.0


def test_gradients_are_those_of_the_dense_layer():
    layer, dense = converted()
    x = image()
    given = [x.clone().requires_grad_() for _ in range(2)]
    for module, one in zip((layer, dense), given, strict=True):
        module(one).square().sum().backward()
    kept = x != 0
    assert given[0].grad is not None and given[1].grad is not None
    torch.testing.assert_close(given[0].grad[kept], given[1].grad[kept])
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad)


@pytest.mark.parametrize("channels_last", [True, False])
@torch.no_grad()
def test_the_original_comes_back_bit_for_bit(channels_last):
    original: Any = nn.Conv2d(IN, OUT, 1)
    if channels_last:
        original.to(memory_format=torch.channels_last)
    weight, value, strides = original.weight, original.weight.clone(), original.weight.stride()
    layer = SelectiveConv.from_dense(original, Zeros())
    assert layer.weight is weight and layer.weight.stride() != strides
    back = layer.dense()
    assert back is original and back.weight is weight
    assert weight.stride() == strides and torch.equal(weight, value)


@torch.no_grad()
def test_weights_that_are_loaded_or_turned_are_served():
    layer: Any = converted()[0]
    other, x = nn.Conv2d(IN, OUT, 1), image(channels_last=True)
    layer.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-6)
    layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-6)
    assert layer.ran.tolist()[:2] == [140, 2 * int((x != 0).sum())]


@torch.no_grad()
def test_bfloat16():
    layer, dense = converted()
    layer.bfloat16()
    x = image().bfloat16()
    got = layer(x)
    assert got.dtype == torch.bfloat16 and not layer.why_dense
    torch.testing.assert_close(got.double(), wide(dense.bfloat16(), x), rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_a_threshold_is_fitted_from_pixels():
    layer, _ = converted(selector=Threshold())
    x, gradient = torch.randn(9, IN, 2, 2), torch.randn(9, OUT, 2, 2)
    rows, useful = layer.observed((x,), {})
    assert useful is None and torch.equal(rows[5], x[1, :, 0, 1])
    options = layer.fit(Sample(rows, layer.as_rows(gradient)))
    layer.selector.setting = 50
    layer(x)
    assert len(options) == 20 and 0.4 < layer.ran[1] / (36 * IN) < 0.6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel_size": 3}, "its kernel is 3x3"),
        ({"kernel_size": 1, "stride": 2}, r"its stride is \(2, 2\), not 1"),
        ({"kernel_size": 1, "groups": 2}, "its channels are in 2 groups"),
        ({"kernel_size": 1, "padding": 1}, r"it pads by \(1, 1\)"),
    ],
)
def test_other_convolutions_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        SelectiveConv.from_dense(nn.Conv2d(IN, OUT, **options), Zeros())
    with pytest.raises(ValueError, match="it is a Linear"):
        SelectiveConv.from_dense(nn.Linear(IN, OUT), Zeros())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(IN, 4), (2, IN + 1, 3, 3), (1, 2, IN, 3, 3)])
def test_inputs_of_another_shape_are_refused(shape):
    layer, _ = converted()
    with pytest.raises(ValueError, match=r"input must be \[n, 24, height, width\] or \[24, height, width\], got"):
        layer(torch.zeros(shape))
