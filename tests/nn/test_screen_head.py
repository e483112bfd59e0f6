"""ScreenHead stands in for an output layer: logits, tied weights, fallbacks with their reasons, and the way back."""

import copy
import math

import pytest
import torch
from torch import nn

import sparingly as sp
from sparingly.nn.sample import Sample
from sparingly.nn.screen_head import DEVICE, DTYPE, ScreenHead
from sparingly.nn.selective import GRADIENTS, UNFITTED
from sparingly.selectors import Screen

N, D = 1_000, 32


def inputs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=generator) * torch.linspace(0, -3, D).exp() * 3


@pytest.fixture
def linear():
    return nn.Linear(D, N)


def screened(linear, keep=100, rank=16):
    head = ScreenHead.from_dense(linear, Screen(rank, keep))
    head.selector.fit(head.weight, head.bias, inputs(2_000, 1))
    return head


@torch.no_grad()
def test_logits_have_the_shape_the_dtype_and_the_exact_best(linear):
    head, x = screened(linear), inputs(12).view(3, 4, D)
    out, want = head(x), linear(x)
    assert out.shape == (3, 4, N) and out.dtype == x.dtype
    ids = head.selector.select(x.view(12, D)).ids.view(3, 4, -1)
    assert torch.allclose(out.gather(2, ids), want.gather(2, ids), atol=1e-5)
    assert (out.argmax(2) == want.argmax(2)).float().mean() > 0.9
    assert not torch.allclose(out, want, atol=1e-3)
    assert head.ran[:3].tolist() == [12, 1200, 0] and head.why_dense == {}
    assert head.share_run() == pytest.approx(0.1)


@torch.no_grad()
def test_sampling_stays_close_to_the_exact_softmax_at_two_temperatures(linear):
    linear.weight.mul_(8.0)
    head, x = screened(linear, 150), inputs(300)
    for temperature in (1.0, 0.7):
        exact = (linear(x) / temperature).softmax(1)
        apart = (exact - (head(x) / temperature).softmax(1)).abs().sum(1) / 2
        ids = sp.Random(150)
        ids.fit(head.weight)
        guess = torch.full_like(exact, -math.inf).scatter(1, ids.select(x).ids, 0.0)
        random = (exact - (linear(x) / temperature + guess).softmax(1)).abs().sum(1) / 2
        assert apart.mean() < 0.1 < random.mean()


def test_a_tied_weight_stays_tied_and_keys_stay(linear):
    embedding = nn.Embedding(N, D)
    linear.weight = embedding.weight
    head = ScreenHead.from_dense(linear, Screen(16, 100))
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    assert head.weight is embedding.weight and head.bias is linear.bias
    assert {"head.weight", "head.bias"} <= set(model.state_dict())
    assert head.dense() is linear and linear.weight is embedding.weight
    assert isinstance(head, nn.Linear)


def test_the_reasons_for_a_dense_product(linear):
    x = inputs(3)
    head = ScreenHead.from_dense(linear, Screen(16, 100))
    with torch.no_grad():
        assert torch.equal(head(x), linear(x))
    head.selector.fit(head.weight, head.bias, inputs(500))
    out = head(x)
    out.sum().backward()
    assert torch.equal(out, linear(x)) and linear.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(head.double()(x.double()), linear.double()(x.double()))
    assert head.why_dense == {UNFITTED: 3, GRADIENTS: 3, DTYPE: 3}
    assert head.ran[:3].tolist() == [0, 0, 9]
    head.reset()
    assert head.ran[:3].tolist() == [0, 0, 0] and head.why_dense == {}


@torch.no_grad()
def test_always_screens_in_pytorch_where_nothing_is_compiled(linear):
    head, x = screened(linear), inputs(40)
    want = head(x)
    head = head.double()
    head.always = True
    got = head(x.double())
    assert got.dtype == torch.float64 and head.why_dense == {}
    assert ((got - want).abs() < 2e-3).float().mean() > 0.99
    meta = copy.deepcopy(head).to("meta")
    meta.always = False
    assert meta(torch.empty(2, D, device="meta")).shape == (2, N) and list(meta.why_dense) == [DEVICE]


@torch.no_grad()
def test_many_tokens_at_once_give_what_one_at_a_time_gives(linear):
    head, x = screened(linear), inputs(200)
    assert torch.equal(head(x), torch.cat([head(one) for one in x.split(1)]))
    assert head(x[:0]).shape == (0, N)


@torch.no_grad()
def test_half_precision(linear):
    head, x = screened(linear).bfloat16(), inputs(50).bfloat16()
    out = head(x)
    assert out.dtype == torch.bfloat16 and head.ran[:3].tolist() == [50, 5000, 0]
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    ids = head.selector.select(x).ids
    assert torch.allclose(out.double().gather(1, ids), exact.gather(1, ids), rtol=2**-8, atol=1e-2)


@torch.no_grad()
def test_state_dict_and_deepcopy(linear):
    head, x = screened(linear), inputs(9)
    other = ScreenHead.from_dense(nn.Linear(D, N), Screen(16, 100))
    other.load_state_dict(head.state_dict())
    twin = copy.deepcopy(head)
    assert torch.equal(other(x), head(x)) and torch.equal(twin(x), head(x))
    assert twin.weight is not head.weight
    twin.weight.zero_()
    assert not torch.equal(twin(x), head(x))


@torch.no_grad()
def test_fit_says_what_each_setting_costs(linear):
    linear.weight.mul_(8.0)
    head = ScreenHead.from_dense(linear, Screen(8, 64))
    options = head.fit(Sample(inputs(2_000), torch.empty(0, N)))
    assert [option.setting for option in options] == head.selector.settings() and head.selector.setting == 64
    sizes = [option.size_bytes for option in options]
    assert sizes == sorted(sizes) and sizes[0] == head.fixed_bytes() + 16 * (D * 4 + 4)
    assert options[0].loss > 2 * options[-1].loss >= 0.0


@torch.no_grad()
def test_float16_is_fitted_and_answers_densely(linear):
    head, x = ScreenHead.from_dense(linear.half(), Screen(8, 64)), inputs(30).half()
    options = head.fit(Sample(inputs(2_000), torch.empty(0, N)))
    assert options[-1].loss < options[0].loss and head.selector.fitted
    assert torch.equal(head(x), linear(x)) and head.why_dense == {DTYPE: 30}


@torch.no_grad()
def test_the_input_is_named_as_in_torch(linear):
    head, x = screened(linear), inputs(2)
    assert torch.equal(head(input=x), head(x)) and linear(input=x).shape == (2, N)


def test_torch_compile_and_export_see_one_operator(linear):
    head, x = screened(linear), inputs(6)
    with torch.no_grad():
        want = head(x)
        compiled = torch.compile(head, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), want)
        assert head.ran[:3].tolist() == [12, 1200, 0]
        program = torch.export.export(head, (x,))
    assert "screen_logits" in str(program.graph)
    with torch.no_grad():
        assert torch.equal(program.module()(x), want)


def test_bad_arguments(linear):
    with pytest.raises(TypeError, match="Linear"):
        ScreenHead.from_dense(nn.Embedding(4, 4), Screen())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="Screen"):
        ScreenHead.from_dense(linear, sp.Dense())  # pyright: ignore[reportArgumentType]
    other = Screen(4, 2)
    other.fit(torch.randn(9, D))
    with pytest.raises(ValueError, match="fitted to 1000 classes, got 9"):
        ScreenHead.from_dense(linear, other)
