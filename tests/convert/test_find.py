"""Finding what can be made selective in plain PyTorch networks; test_families.py has those of transformers."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.convert._find import Place, Skipped, find
from sparingly.convert._observe import unchanged


class Gated(nn.Module):
    def __init__(self, act=F.silu, swap: bool = False, inner_dropout: float = 0.0):
        super().__init__()
        self.alpha, self.beta, self.gamma = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)
        self.act, self.swap, self.p = act, swap, inner_dropout

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.alpha(x), self.beta(x)
        hidden = b * self.act(a) if self.swap else self.act(a) * b
        return self.gamma(F.dropout(hidden, self.p, self.training))


class Fused(nn.Module):
    def __init__(self, gate_first: bool):
        super().__init__()
        self.both, self.out, self.gate_first = nn.Linear(8, 64), nn.Linear(32, 8), gate_first

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, dim=-1)
        return self.out(F.silu(a) * b if self.gate_first else a * torch.sigmoid(b))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.one(self.norm(x))).square())


class Between(nn.Module):
    """Something between the layers: a function of the hidden values."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.function = nn.Linear(8, 32), nn.Linear(32, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function(self.one(x)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(F.gelu(self.left(x)) * self.right(y))


class GatedAttention(nn.Module):
    """Attention whose output is gated: for one token its numbers are those of a gated MLP."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.g, self.o = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.o(torch.sigmoid(self.g(x)) * mixed)


def one(model: nn.Module, where: str = "mlp", example=None) -> Place:
    places, _ = find(model, where, example)
    assert len(places) == 1, places
    return places[0]


def test_gated_mlp_of_unknown_names_is_an_exact_container():
    for swap in (False, True):
        place = one(nn.Sequential(nn.LayerNorm(8), Gated(swap=swap)))
        assert (place.path, place.gate, place.up, place.down) == ("1", "1.alpha", "1.beta", "1.gamma")
        assert place.container and place.activation is F.silu and place.fused is None


def test_pairs_of_one_sequential_share_no_container():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(inplace=True), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
    places, skipped = find(model, "mlp")
    assert [(p.path, p.up, p.down, p.container) for p in places] == [("2", "0", "2", False), ("4", "2", "4", False)]
    assert [p.activation for p in places] == [model[1], model[3]] and not skipped
    inner = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    assert one(nn.Sequential(nn.LayerNorm(8), inner)).path == "1"


@pytest.mark.parametrize("act", [F.relu, F.gelu, F.silu, F.mish, F.elu, torch.tanh, F.softplus, F.hardswish, F.relu6])
def test_functions_written_into_forward(act):
    class Inline(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(act(self.one(x)))

    place = one(nn.Sequential(Inline()))
    assert place.container and place.activation is act


def test_gelu_and_its_approximation_are_told_apart_at_tiny_weights():
    class Inline(Between):
        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.gelu(self.one(x), approximate="tanh"))

    model = nn.Sequential(Inline(None))
    for p in model.parameters():
        nn.init.normal_(p, std=1e-4)
    x = torch.linspace(-4, 4, 50)
    activation = one(model).activation
    assert activation is not None
    torch.testing.assert_close(activation(x), F.gelu(x, approximate="tanh"), rtol=0, atol=1e-6)


def test_a_function_nobody_knows():
    class Strange(nn.Module):
        def __init__(self, gated: bool):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 32) if gated else None

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.one(x)
            hidden = hidden.sin() * hidden.abs().sqrt() + 0.5
            return self.two(hidden if self.three is None else hidden * self.three(x))

    for gate, up in ((None, "0.one"), ("0.one", "0.three")):
        place = one(nn.Sequential(Strange(gate is not None)))
        assert (place.path, place.up, place.gate, place.container) == ("0.two", up, gate, False)
        assert place.activation is None


def test_fused_halves():
    for gate_first, name in ((True, "gate_up"), (False, "up_gate")):
        place = one(nn.Sequential(Fused(gate_first)))
        assert (place.path, place.fused, place.container) == ("0", name, True) and place.gate == place.up == "0.both"


def test_residual_norm_and_dropout_leave_only_down():
    assert one(nn.Sequential(Residual())).path == "0.two"
    with_dropout = nn.Sequential(Gated(inner_dropout=0.5), nn.LayerNorm(8))
    assert one(with_dropout).path == "0.gamma" and not one(with_dropout).container
    module_dropout: Any = nn.Sequential(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 8)))
    assert one(module_dropout).path == "0.3"
    module_dropout[0][2].p = 0.0
    assert one(module_dropout).path == "0" and one(module_dropout).container


def test_two_inputs_are_no_container():
    place = one(TwoInputs())
    assert (place.path, place.gate, place.up, place.container) == ("out", "left", "right", False)


@pytest.mark.parametrize("between", [nn.LayerNorm(32), lambda h: h.cumsum(-1), lambda h: h.softmax(-1), nn.Identity()])
def test_what_is_no_activation_is_no_mlp(between):
    places, skipped = find(nn.Sequential(Between(between)), "mlp")
    assert not places and len(skipped) == 1
    assert "0.one" in skipped[0].reason and skipped[0].path == "0.two"


def test_batch_norm_between_is_not_lost():
    for layers in ([nn.BatchNorm1d(32), nn.ReLU()], [nn.ReLU(), nn.BatchNorm1d(32)]):
        inner = nn.Sequential(nn.Linear(8, 32), *layers, nn.Linear(32, 8))
        for trained in (False, True):
            if trained:
                inner.train()(3 * torch.randn(64, 8) + 1)
            before = copy.deepcopy(inner.state_dict())
            place = one(nn.Sequential(inner))
            assert not place.container and place.down == "0.3"
            assert all(torch.equal(before[k], v) for k, v in inner.state_dict().items())


def test_attention_is_never_an_mlp():
    model = nn.Sequential(GatedAttention(), Gated())
    places, _ = find(model, "mlp")
    assert [p.path for p in places] == ["1"]
    places, skipped = find(model, "mlp", torch.randn(1, 1, 8))
    assert [p.path for p in places] == ["1"]
    assert any(s.path == "0.o" and "single token" in s.reason for s in skipped)
    assert [p.path for p in find(model, "attention")[0]] == [f"0.{n}" for n in "qkvgo"]


def test_encoder_layer_is_found_only_where_its_linear_layers_run():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True), 2)
    places, skipped = find(model, "mlp")
    assert not places and all("fast path" in s.reason for s in skipped) and len(skipped) == 4
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert [p.path for p in find(model, "mlp")[0]] == ["layers.0.linear2", "layers.1.linear2"]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    slow = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64), 2, enable_nested_tensor=False)
    assert [p.down for p in find(slow, "mlp")[0]] == ["layers.0.linear2", "layers.1.linear2"]
    places, skipped = find(slow, "linear")
    assert [p.path for p in places] == ["layers.0.linear1", "layers.1.linear1"]
    assert {s.path for s in skipped} == {f"layers.{i}.self_attn.out_proj" for i in range(2)}


def test_networks_without_anything_say_so():
    for model in (nn.LSTM(8, 8), nn.Module(), nn.Sequential(), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())):
        for where in ("mlp", "linear", "attention", "head"):
            places, skipped = find(model, where)
            assert not places and len(skipped) == 1 and skipped[0].path == "" and "no" in skipped[0].reason


def test_classifier_of_a_convolutional_network():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 32),
        nn.ReLU(),
        nn.Linear(32, 9),
    )
    assert (one(model).up, one(model).down) == ("4", "6")
    assert one(model, "head").path == "6" and one(model, "head").kind == "head"


def test_what_the_example_does_not_reach_is_called_alone():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 4)
            self.experts: Any = nn.ModuleList(Gated() for _ in range(4))

        def forward(self, x: Tensor, only: int) -> Tensor:
            return self.experts[only](x) * self.router(x).softmax(-1)[..., :1]

    places, _ = find(Experts(), "mlp", {"x": torch.randn(5, 8), "only": 2})
    assert [p.path for p in places] == [f"experts.{i}" for i in range(4)] and all(p.container for p in places)


def test_a_module_used_twice_is_found_once():
    shared = Gated()
    assert one(nn.Sequential(shared, nn.LayerNorm(8), shared)).path == "0"


def test_weights_that_cannot_be_replaced():
    def check(model: nn.Module, *words: str) -> None:
        places, skipped = find(model, "mlp")
        assert not places and any(all(w in s.reason for w in words) for s in skipped), skipped

    def pair() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    with torch.device("meta"):
        check(pair(), "meta")
    check(nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(8)), "lazy")
    sparse: Any = pair()
    sparse[2].weight = nn.Parameter(sparse[2].weight.detach().to_sparse())
    check(sparse, "layout")
    small = pair()
    small[2].weight = nn.Parameter(torch.ones(8, 32, dtype=torch.int8), requires_grad=False)
    check(small, "int8", "quantised")
    normed = pair()
    torch.nn.utils.parametrizations.weight_norm(normed[2])
    check(normed, "parametrisation")
    hooked = pair()
    hooked[2].register_forward_hook(lambda *_: None)
    check(hooked, "hooks")
    done: Any = pair()
    done[2].why_dense = {}
    check(done, "already selective; restore_ first")


def test_linear_layers_heads_and_globs():
    model: Any = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(nn.Sequential(GatedAttention(), Gated(), nn.Linear(8, 8)) for _ in range(2)),
            "out": nn.Linear(8, 5),
        }
    )

    def forward(x: Tensor) -> Tensor:
        for block in model["blocks"]:
            x = block(x)
        return model["out"](x)

    model.forward = forward
    linear = [p.path for p in find(model, "linear", torch.randn(2, 6, 8))[0]]
    assert linear == [f"blocks.{b}.{n}" for b in range(2) for n in ("0.q", "0.k", "0.v", "0.g", "0.o", "2")]
    assert one(model, "head", torch.randn(2, 6, 8)).path == "out"
    assert [p.path for p in find(model, "blocks.*.1", torch.randn(2, 6, 8))[0]] == ["blocks.0.1", "blocks.1.1"]
    assert [(p.path, p.kind) for p in find(model, "blocks.0.1.alpha", torch.randn(2, 6, 8))[0]] == [
        ("blocks.0.1.alpha", "linear")
    ]
    everything = find(model, "*", torch.randn(2, 6, 8))[0]
    assert len(everything) == 2 * 7 + 1 and {p.kind for p in everything} == {"mlp", "linear", "head"}


def test_wrong_where_and_failing_example():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    with pytest.raises(ValueError, match=r"mlp, linear, attention, head.*got 'ffn'"):
        find(model, "ffn")
    with pytest.raises(ValueError, match="matches names"):
        find(model, "layers.*.mlp")
    before = _state(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find(model, "mlp", torch.randn(2, 5))
    assert _state(model) == before


def _state(model: nn.Module) -> list:
    state = []
    for name, m in model.named_modules():
        items = {k: (list(v.items()) if isinstance(v, dict) else id(v)) for k, v in m.__dict__.items()}
        state.append((name, m.training, str(sorted(items)), str([(k, str(v)) for k, v in items.items()])))
    return [*state, [v.tolist() for v in model.state_dict().values()]]


def _numpy_state() -> Any:
    state: Any = np.random.get_state()
    return state[1]


class Careless(nn.Module):
    """Counts its calls, caches, keeps statistics, draws random numbers from everywhere, and may raise."""

    def __init__(self, fails: bool):
        super().__init__()
        self.block, self.fails, self.seen = Gated(), fails, []
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(x)
        self.cache = x
        self.block.act = F.silu
        noise = torch.rand(()) + random.random() + np.random.rand()
        if self.fails:
            raise RuntimeError("as asked")
        return self.block(x + 0 * noise)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_everything_is_as_before(fails, training):
    model: Any = nn.Sequential(Careless(fails), nn.BatchNorm1d(3), nn.Dropout(0.5)).train(training)
    model[1].eval()
    before, torch_rng = _state(model), torch.get_rng_state()
    python, numpy = random.getstate(), _numpy_state().copy()
    version = [p._version for p in model.parameters()]
    example = torch.randn(4, 3, 8)
    torch.set_rng_state(torch_rng)
    if fails:
        with pytest.raises(RuntimeError, match="as asked"):
            find(model, "mlp", example)
    else:
        assert one(model, "mlp", example).path == "0.block"
    assert _state(model) == before and [p._version for p in model.parameters()] == version
    assert torch.equal(torch.get_rng_state(), torch_rng) and random.getstate() == python
    assert np.array_equal(_numpy_state(), numpy) and torch.is_grad_enabled()
    assert not hasattr(model[0], "cache") and "forward" not in model[0].block.alpha.__dict__


def test_unchanged_puts_hooks_back():
    model = nn.Sequential(nn.Linear(4, 4))
    handle = model[0].register_forward_pre_hook(lambda *_: None)
    with unchanged(model):
        handle.remove()
        model[0].register_forward_hook(lambda *_: None)
    assert len(model[0]._forward_pre_hooks) == 1 and not model[0]._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    place = one(nn.Sequential(Gated(F.gelu), nn.LayerNorm(8)).to(dtype))
    assert place.container and place.activation is F.gelu


def test_zero_and_nan_weights_are_found_all_the_same():
    model: Any = nn.Sequential(Residual())
    with torch.no_grad():
        model[0].one.weight.zero_()
        model[0].two.weight.fill_(float("nan"))
    assert one(model) == Place("0.two", "mlp", "0.one", None, "0.two", one(model).activation, False)
    assert Skipped("a", "b") == Skipped("a", "b")
