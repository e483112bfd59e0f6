"""Experts that keep all their weights in one parameter: equal answers, units that are not read, and the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sparingly as sp
from sparingly import energy
from sparingly.convert._experts import expert_form
from sparingly.nn._expert_form import ExpertForm
from sparingly.nn.experts import PRIOR_PAIRS, SelectiveExperts
from sparingly.nn.sample import Sample

EXPERTS, WIDTH, UNITS, CHOSEN = 5, 16, 24, 2


class Mixture(nn.Module):
    """A plain mixture, in the ways in which libraries lay it out."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        height = UNITS if kind == "plain" else 2 * UNITS
        shapes = ((EXPERTS, height, WIDTH), (EXPERTS, WIDTH, UNITS))
        if kind in ("interleaved", "transposed"):
            shapes = tuple((a, c, b) for a, b, c in shapes)
        if kind == "apart":
            self.w3 = nn.Parameter(torch.randn(EXPERTS, UNITS, WIDTH) / 4)
            shapes = ((EXPERTS, UNITS, WIDTH), shapes[1])
        self.first = nn.Parameter(torch.randn(shapes[0]) / 4)
        self.down = nn.Parameter(torch.randn(shapes[1]) / 4)
        if kind == "interleaved":
            self.first_bias = nn.Parameter(torch.randn(EXPERTS, height))
            self.down_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        if kind == "norm":
            self.after = nn.RMSNorm(WIDTH)
        self.act = nn.ReLU() if kind == "plain" else nn.SiLU()

    def _apply_gate(self, both):
        if self.kind == "interleaved":
            gate, up = both[..., ::2].clamp(max=1.0), both[..., 1::2].clamp(-1.0, 1.0)
            return gate * torch.sigmoid(1.7 * gate) * (up + 1)
        up, gate = both.chunk(2, dim=-1)
        return self.act(gate) * up

    def one(self, x, e):
        first, down = self.first[e], self.down[e]
        if self.kind in ("interleaved", "transposed"):
            first, down = first.t(), down.t()
        both = x @ first.t()
        if self.kind == "interleaved":
            return self._apply_gate(both + self.first_bias[e]) @ down.t() + self.down_bias[e]
        if self.kind == "plain":
            hidden = self.act(both)
        else:
            hidden = self.act(both) * (x @ self.w3[e].t()) if self.kind == "apart" else self._apply_gate(both)
        out = hidden @ down.t()
        return self.after(out) if self.kind == "norm" else out

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in ids.unique():
            token, place = (ids == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, self.one(x[token], int(e)) * weights[token, place, None])
        return out


KINDS = ["plain", "up_gate", "transposed", "interleaved", "apart", "norm"]


def call(tokens: int, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:CHOSEN] for _ in range(tokens)])
    return torch.randn(tokens, WIDTH, generator=g), ids, torch.rand(tokens, CHOSEN, generator=g)


def make(kind: str, selector: Any = None) -> tuple[Mixture, Any]:
    torch.manual_seed(0)
    dense = Mixture(kind).requires_grad_(False)
    form = expert_form(dense)
    assert isinstance(form, ExpertForm), form
    layer = SelectiveExperts(copy.deepcopy(dense), form, selector or sp.Threshold(0.0), CHOSEN)
    return dense, layer


def fitted(kind: str, tokens: int = 400) -> tuple[Mixture, Any, Sample, list[Any]]:
    dense, layer = make(kind, sp.Threshold())
    inputs, _ = layer.observed(call(tokens), {})
    gradients = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(2))
    return dense, layer, Sample(inputs, gradients), layer.fit(Sample(inputs, gradients))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_zero_threshold_equals_dense(kind, tokens):
    dense, layer = make(kind)
    want, got = dense(*call(tokens)), layer(*call(tokens))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert layer.ran[0] == (tokens if tokens <= 4 else 0) and (not layer.why_dense) == (tokens <= 4)


@pytest.mark.parametrize("kind", KINDS)
def test_form_says_which_half_is_the_gate(kind):
    form = expert_form(Mixture(kind))
    assert isinstance(form, ExpertForm)
    assert form.transposed == (kind in ("interleaved", "transposed"),) * 2
    assert form.layout == {"interleaved": "interleaved", "plain": "gate_up", "apart": "gate_up"}.get(kind, "up_gate")
    assert form.neutral == (0.0 if kind == "interleaved" else 1.0)
    assert (form.gate is None) == (kind == "plain") and form.norm == ("after" if kind == "norm" else None)
    assert form.biases[1] == ("down_bias" if kind == "interleaved" else None)
    if kind == "apart":
        assert {form.gate, form.up} == {"first", "w3"} and form.gate == "first"


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_equals_the_masked_product_of_many(kind):
    _, layer, _, options = fitted(kind)
    layer.selector.setting = 40
    many = layer(*call(40))
    assert layer.ran[2] == 40
    layer.reset()
    few = torch.cat([layer(*(part[i : i + 1] for part in call(40))) for i in range(40)])
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-5)
    tokens, first, dense, passed = layer.ran.tolist()
    assert (tokens, dense) == (40, 0) and passed <= first < 0.6 * 40 * CHOSEN * UNITS
    assert len(options) == 20 and options[0].size_bytes < options[-1].size_bytes


def test_units_that_do_not_pass_are_not_read():
    _, layer, _, _ = fitted("up_gate")
    layer.selector.setting = 30
    x, ids, weights = call(1)
    layer(x, ids, weights)
    layer.reset()
    with energy.count() as counted:
        want = layer(x, ids, weights)
    _, first, _, passed = layer.ran.tolist()
    assert 0 < passed <= first < CHOSEN * UNITS
    ours = [entry for (name, _), entry in counted.entries.items() if name.startswith("sparingly::")]
    assert sum(entry.macs for entry in ours) == WIDTH * (CHOSEN * UNITS + first + passed)
    # The weights of all other units, and of all other experts, may be anything.
    up = layer.first.view(EXPERTS, 2, UNITS, WIDTH)[:, 0]
    gate = layer.first.view(EXPERTS, 2, UNITS, WIDTH)[:, 1]
    for e in range(EXPERTS):
        if e not in ids[0]:
            up[e], gate[e], layer.down[e] = torch.nan, torch.nan, torch.nan
            continue
        size = nn.functional.silu(gate[e] @ x[0]).abs()
        cut = size < layer.selector.cut.view(EXPERTS, UNITS)[e]
        assert cut.any()
        up[e][cut], layer.down[e][:, cut] = torch.nan, torch.nan
    assert torch.equal(layer(x, ids, weights), want)


def test_bytes_are_those_of_the_units_that_ran():
    _, layer = make("up_gate")
    everything = layer.fixed_bytes() + layer.num_units * layer.unit_bytes()
    assert layer.num_units == CHOSEN * UNITS and everything == CHOSEN * UNITS * 3 * WIDTH * 4
    assert layer.bytes_read(10, 4) == CHOSEN * UNITS * WIDTH * 4 + (10 + 4) * WIDTH * 4
    _, plain = make("plain")
    assert plain.fixed_bytes() + plain.num_units * plain.unit_bytes() == CHOSEN * UNITS * 2 * WIDTH * 4


@pytest.mark.parametrize("kind", ["up_gate", "interleaved", "norm"])
def test_losses_are_those_that_the_gradients_say(kind):
    """Half the mean square of the change of <gradient, output>, with the output of each token linearised."""
    _, layer, sample, options = fitted(kind)
    x, ids, weights = call(400)
    chosen = {option.setting: option for option in options}[50]
    layer.selector.setting = 100
    whole = layer(x, ids, weights)
    layer.selector.setting = 50
    change = ((layer(x, ids, weights) - whole) * sample.gradients).sum(dim=1).square().mean() / 2
    assert chosen.loss == pytest.approx(float(change), rel=0.35 if kind == "norm" else 1e-3)
    assert options[-1].loss == 0.0


def test_importance_of_an_expert_without_tokens_comes_from_its_weights():
    _, layer = make("up_gate", sp.Threshold())
    x, ids, weights = call(200)
    ids = torch.where(ids == 3, 4, ids)
    inputs, _ = layer.observed((x, ids, weights), {})
    layer.fit(Sample(inputs, torch.randn(200, WIDTH)))
    importance = layer.selector.importance.view(EXPERTS, UNITS)
    norms = layer.down.norm(dim=1)
    ratio = importance[3] / norms[3]
    assert torch.allclose(ratio, ratio.mean().expand(UNITS), rtol=1e-3) and PRIOR_PAIRS > 0
    assert 0.3 < float(importance[3].mean() / importance[[0, 1, 2, 4]].mean()) < 3
    assert layer.selector.num_units == EXPERTS * UNITS


@pytest.mark.parametrize("kind", KINDS)
def test_restored_bit_for_bit(kind):
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Mixture(kind)})
    original, before = model["experts"], {k: v.clone() for k, v in model.state_dict().items()}
    strides = {k: v.stride() for k, v in model.state_dict().items()}
    sp.convert_(model, sp.Threshold(0.0), "mlp", example=None)
    assert isinstance(model["experts"], SelectiveExperts)
    assert {k: v.shape for k, v in model.state_dict().items() if "selector" not in k} == {
        k: v.shape for k, v in before.items()
    }
    sp.restore_(model)
    assert model["experts"] is original
    assert all(torch.equal(v, before[k]) and v.stride() == strides[k] for k, v in model.state_dict().items())


def test_trains_with_selection_on():
    _, layer, _, _ = fitted("up_gate")
    layer.selector.setting = 30
    layer.requires_grad_(True)
    out = layer(*call(3))
    assert any("gradients" in reason for reason in layer.why_dense)
    out.square().sum().backward()
    used = set(call(3)[1].flatten().tolist())
    for name in ("first", "down"):
        gradient = getattr(layer, name).grad
        assert {e for e in range(EXPERTS) if gradient[e].any()} == used
    idle = ~layer.down.grad.any(dim=1)
    assert idle[sorted(used)].any(), "units that no token selected get no gradient"


def test_copies_casts_and_loaded_weights():
    dense, layer = make("transposed")
    twin = copy.deepcopy(layer)
    twin.first.data.zero_()
    torch.testing.assert_close(layer(*call(2)), dense(*call(2)), rtol=1e-5, atol=1e-5)
    assert not twin(*call(2)).any() and not twin.dense()(*call(2)).any()
    half = copy.deepcopy(layer).bfloat16()
    x, ids, weights = call(2)
    got = half(x.bfloat16(), ids, weights.bfloat16())
    assert got.dtype == torch.bfloat16 and half.ran[0] == 4
    torch.testing.assert_close(got.float(), dense(x, ids, weights), rtol=0.1, atol=0.1)
    state = {name: torch.randn_like(value) for name, value in dense.state_dict().items()}
    dense.load_state_dict(state)
    layer.load_state_dict(copy.deepcopy(state), assign=True)
    torch.testing.assert_close(layer(*call(2)), dense(*call(2)), rtol=1e-5, atol=1e-5)


def test_named_arguments_and_hooks():
    _, layer = make("up_gate")
    x, ids, weights = call(2)
    assert torch.equal(layer(x, weights=weights, ids=ids), layer(x, ids, weights))
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer(x, ids, weights)
    assert seen == [1]
    restored = layer.dense()
    restored(x, ids, weights)
    assert seen == [1, 1]


def test_half_precision_runs_dense_and_says_so():
    _, layer = make("up_gate")
    x, ids, weights = call(2)
    layer.half()(x.half(), ids, weights.half())
    assert any("float16" in reason for reason in layer.why_dense)


def test_decoding_compiles_to_one_graph():
    _, layer, _, _ = fitted("up_gate")
    layer.selector.setting = 40
    want = layer(*call(1))
    got = torch.compile(layer, backend="eager", fullgraph=True)(*call(1))
    torch.testing.assert_close(got, want)


def test_unknown_forward_is_told():
    class Odd(Mixture):
        def forward(self, x, ids, weights):
            return super().forward(x, ids, weights).cumsum(dim=0)

    odd = Odd("up_gate")
    # Other modules with several matrices in one parameter are none of ours.
    assert expert_form(odd) is None
    odd.__dict__["num_experts"] = 4
    reason = expert_form(odd)
    assert isinstance(reason, str) and "no weighted sum" in reason
    assert expert_form(nn.Conv1d(4, 4, 3)) is None and expert_form(nn.Linear(4, 4)) is None
    quantised = Mixture("up_gate")
    quantised.__dict__["num_experts"] = 4
    quantised.down = nn.Parameter(quantised.down.to(torch.float8_e4m3fn), requires_grad=False)
    assert "quantised" in str(expert_form(quantised))
