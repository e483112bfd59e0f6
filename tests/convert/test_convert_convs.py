"""Pointwise convolutions of a ReLU6 network: found, made to skip zeros without a change of any answer, and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparingly as sp
from sparingly.convert import convert_, find, restore_
from sparingly.energy import count
from sparingly.explain import explain
from sparingly.nn.conv import SelectiveConv
from sparingly.nn.selective import selective_modules
from sparingly.selectors import LowRank, Screen, Threshold, Zeros


class Padded(nn.Conv2d):
    """As EfficientNet's convolutions: pads itself, which for a 1x1 kernel is nothing."""

    def forward(self, x: Tensor) -> Tensor:
        pad = (self.kernel_size[0] - 1) // 2
        x = nn.functional.pad(x, [pad] * 4)
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.expand, self.project = Padded(width, 4 * width, 1, bias=False), Padded(4 * width, width, 1)
        self.depthwise = Padded(4 * width, 4 * width, 3, groups=4 * width)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.act(self.depthwise(self.act(self.expand(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, 2), nn.ModuleList([Block(16), Block(16)])
        self.out = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean((2, 3)))


NAMES = [f"blocks.{i}.{name}" for i in range(2) for name in ("expand", "project")]


@pytest.fixture
def net() -> Any:
    return Net().eval()


def run(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_skipping_zeros_changes_no_decision_and_multiplies_less_by_exactly_them(net, memory_format):
    net.to(memory_format=memory_format)
    x = torch.randn(4, 3, 21, 21).to(memory_format=memory_format)
    before = {name: (value, value.stride(), value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    dense = run(net, x)
    zeros = []
    for block in net.blocks:
        for layer in (block.expand, block.project):
            layer.register_forward_hook(
                lambda layer, given, _: zeros.append(int((given[0] == 0).sum()) * layer.out_channels)
            )
    with count() as whole:
        run(net, x)
    for block in net.blocks:
        for layer in (block.expand, block.project):
            layer._forward_hooks.clear()
    changes = convert_(net, Zeros(), where="conv")
    assert [change.path for change in changes.changed] == NAMES
    got = run(net, x)
    assert torch.equal(got.argmax(1), dense.argmax(1))
    torch.testing.assert_close(got, dense, rtol=1e-5, atol=1e-6)
    with count() as ledger:
        run(net, x)
    assert sum(zeros) > 0 and whole.macs - ledger.macs == sum(zeros)
    assert set(restore_(net)) == set(NAMES)
    for name, value in net.state_dict(keep_vars=True).items():
        was, strides, values = before[name]
        assert value is was and value.stride() == strides and torch.equal(value, values)
    assert torch.equal(run(net, x), dense)


def test_nothing_is_converted_unless_asked_for(net):
    with pytest.raises(ValueError, match="could be made selective at 'mlp'"):
        convert_(net, Zeros())
    convert_(net, where="conv")
    assert {type(layer.selector) for layer in selective_modules(net).values()} == {Zeros}
    with pytest.raises(ValueError, match="'conv' are selective already"):
        convert_(net, Zeros(), where="conv")


def test_what_is_left_alone_is_told(net):
    net.blocks[1].project = nn.Conv2d(64, 16, 1, stride=1, padding=0, bias=False)
    net.unused, net.blocks[0].project = nn.Conv2d(16, 16, 1), Scaled(64, 16, 1)
    changes = convert_(net, Threshold(0.1), where="conv")
    assert [change.path for change in changes.changed] == ["blocks.0.expand", "blocks.1.expand", "blocks.1.project"]
    reasons = {skip.path: skip.reason for skip in changes.skipped}
    assert "its kernel is 3x3" in reasons["stem"] and "3x3" in reasons["blocks.0.depthwise"]
    assert "a forward of its own" in reasons["blocks.0.project"]
    assert "not called in the example" in reasons["unused"]


def test_places_by_name_and_networks_without_convolutions(net):
    places, skipped = find(net, "*.project")
    assert [(place.path, place.kind) for place in places] == [(name, "conv") for name in NAMES[1::2]] and not skipped
    _, skipped = find(nn.Sequential(nn.Linear(4, 4)), "conv")
    assert "no convolutions" in skipped[0].reason
    _, skipped = find(nn.Conv2d(4, 4, 1), "conv")
    assert "itself one convolution" in skipped[0].reason


@pytest.mark.parametrize("selector", [LowRank(4), Screen(4)])
def test_selectors_of_other_parts_are_refused(net, selector):
    with pytest.raises(ValueError, match="a pointwise convolution takes Zeros or Threshold, got"):
        convert_(net, selector, where="conv")
    assert not selective_modules(net)


def test_explain_shows_the_zeros_and_that_every_row_is_read(net):
    convert_(net, Zeros(), where="conv")
    run(net, torch.randn(1, 3, 21, 21))
    layers: dict[str, Any] = {layer.name: layer for layer in explain(net).layers}
    assert layers["blocks.0.project"].share_run < 0.9 and layers["blocks.1.expand"].share_run > 0.9
    assert layers["blocks.0.project"].size_bytes == layers["blocks.0.project"].dense_bytes
    assert layers["blocks.0.project"].kernel == "threshold_accumulate (cpu)"
    assert layers["blocks.0.project"].tokens == 100 and not layers["blocks.0.project"].why_dense


def test_a_folder_holds_it(net, tmp_path):
    convert_(net, Zeros(), where="conv")
    x = torch.randn(2, 3, 21, 21)
    sp.save(net, tmp_path / "net")
    again = sp.load(tmp_path / "net", into=Net().eval())
    assert {name: type(layer) for name, layer in selective_modules(again).items()} == dict.fromkeys(
        NAMES, SelectiveConv
    )
    assert torch.equal(run(again, x), run(net, x))
    wrong: Any = Net().eval()
    wrong.blocks[0].expand = nn.Conv2d(16, 64, 1, 2, bias=False)
    with pytest.raises(ValueError, match=r"does not fit the model at 'blocks.0.expand'.*its stride"):
        sp.load(tmp_path / "net", into=wrong)


def test_a_threshold_is_calibrated(net):
    convert_(net, Threshold(), where="*.project")
    data = torch.randn(60, 3, 21, 21)
    sp.calibrate(net, data, metric=lambda model, x: model(x).mean(1) * 0, max_drop=0.5)
    for layer in selective_modules(net).values():
        layer.off, layer.selector.setting = False, 40
    run(net, data[:4])
    assert all(0.2 < (layer.share_run() or 0.0) < 0.7 for layer in selective_modules(net).values())
