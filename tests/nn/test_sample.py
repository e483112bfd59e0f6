"""What layers saw and how much their outputs matter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparingly.nn.sample import gather, probe_loss


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.unused = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return SimpleNamespace(logits=self.two(self.drop(self.one(input=x)).relu()))


def test_inputs_and_gradients_belong_together():
    net = Net()
    data = torch.randn(5, 7, 4)
    samples = gather(net, [lambda: net(data)], {"one": net.one, "two": net.two}, {"one": 1000, "two": 1000})
    inputs, gradients = samples["two"]
    assert inputs.shape == (35, 6) and gradients.shape == (35, 3)
    with torch.no_grad():
        torch.testing.assert_close(inputs, net.one(data).relu().reshape(35, 6))
        # Cross entropy against a drawn class: the softmax, less one at that class.
        left = net.two(inputs).softmax(1) - gradients
    drawn = left.argmax(1)
    torch.testing.assert_close(left, nn.functional.one_hot(drawn, 3).float(), atol=1e-5, rtol=0)
    # And through the second layer to the first.
    inputs, first = samples["one"]
    through = (gradients @ net.two.weight) * (net.one(inputs) > 0)
    torch.testing.assert_close(first, through.detach(), atol=1e-5, rtol=0)


def test_the_model_is_as_before_also_after_an_error():
    net = Net().train()
    net.one.eval()
    net.two.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def fails():
        net(torch.randn(2, 4))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(net, [fails], {"one": net.one}, {"one": 10})
    assert net.training and not net.one.training and net.drop.training
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, True, True, True]
    assert all(p.grad is None for p in net.parameters())
    assert not net.one._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_layer_that_nothing_reached_is_left_out():
    net = Net()
    samples = gather(net, [lambda: net(torch.randn(3, 4))], {"one": net.one, "no": net.unused}, {"one": 9, "no": 9})
    assert set(samples) == {"one"}


def test_inputs_alone_need_no_gradients():
    net = Net()
    calls = [lambda: net(torch.randn(50, 4)) for _ in range(4)]
    samples = gather(net, calls, {"one": net.one}, {"one": -80})
    assert samples["one"].inputs.shape == (80, 4) and samples["one"].gradients.numel() == 0
    assert not samples["one"].inputs.requires_grad


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_whatever_mode_is_around(around):
    net = Net()
    with around():
        data = torch.randn(3, 4)
        samples = gather(net, [lambda: net(data)], {"one": net.one}, {"one": 9})
    assert samples["one"].gradients.abs().sum() > 0


def test_half_precision_gives_float32():
    net = Net().to(torch.bfloat16)
    data = torch.randn(3, 4, dtype=torch.bfloat16)
    inputs, gradients = gather(net, [lambda: net(data)], {"one": net.one}, {"one": 9})["one"]
    assert inputs.dtype == gradients.dtype == torch.float32


def test_each_call_runs_once_and_only_a_few_with_gradients():
    net, ran = Net(), []

    def run(place: int):
        ran.append((place, torch.is_grad_enabled()))
        return net(torch.full((4, 4), float(place)))

    calls = [lambda place=place: run(place) for place in range(20)]
    samples = gather(net, calls, {"one": net.one, "two": net.two}, {"one": -1000, "two": 1000})
    assert sorted(place for place, _ in ran) == list(range(20))
    assert sum(gradients for _, gradients in ran) == 8 == samples["two"].gradients.shape[0] // 4
    assert sorted(set(samples["one"].inputs[:, 0].tolist())) == [float(place) for place in range(20)]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping", "last_hidden_state", "ints_first"])
def test_any_output_can_be_probed(kind):
    value = torch.randn(2, 3, requires_grad=True)
    output = {
        "tensor": value,
        "tuple": (value, None),
        "mapping": {"embeds": value},
        "last_hidden_state": SimpleNamespace(last_hidden_state=value),
        "ints_first": (torch.arange(3), value),
    }[kind]
    probe_loss(output, torch.Generator().manual_seed(0)).backward()
    assert value.grad is not None and value.grad.abs().min() > 0


def test_what_has_no_scores_says_so():
    with pytest.raises(TypeError, match="output"):
        probe_loss("text", torch.Generator())
