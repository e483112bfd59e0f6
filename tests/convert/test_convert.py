"""Conversion, its refusals, and the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparingly.convert import _convert, convert_, restore_
from sparingly.nn.linear import SelectiveLinear
from sparingly.nn.mlp import SelectiveMLP
from sparingly.nn.screen_head import ScreenHead
from sparingly.nn.selective import selective_modules
from sparingly.selectors import Dense, InputThreshold, LowRank, Oracle, Random, Screen, Threshold, Zeros

IDS = torch.tensor([[5, 9, 33, 2, 17, 40, 8], [7, 7, 1, 50, 21, 3, 60]])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList([Block(), Block()]), nn.Linear(16, 9)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def snapshot(model: Any) -> dict[str, tuple]:
    """What has to be as before: modules, parameters, their values and memory, modes, hooks."""
    found: dict[str, tuple] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        keys = sorted(key for key in module.__dict__ if not key.startswith("_is_full"))
        found[name] = (id(module), module.training, keys, list(module._modules), len(module._forward_hooks))
    for name, value in model.named_parameters(remove_duplicate=False):
        found[f"{name} "] = (id(value), value.stride(), value.dtype, value.requires_grad, value.detach().clone())
    for name, value in model.named_buffers(remove_duplicate=False):
        found[f"{name} "] = (id(value), value.clone())
    return found


def unchanged(model: nn.Module, before: dict[str, tuple]) -> bool:
    after = snapshot(model)

    def equal(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return after.keys() == before.keys() and all(
        equal(a, b) for name in after for a, b in zip(after[name], before[name], strict=True)
    )


def test_what_was_changed_is_told():
    model: Any = Net()
    changes = convert_(model, {"mlp": Threshold(), "linear": InputThreshold(), "head": Screen()})
    assert {(c.path, c.kind, c.selector, c.units) for c in changes.changed} == {
        ("blocks.0.mlp", "mlp", "Threshold", 64),
        ("blocks.1.mlp", "mlp", "Threshold", 64),
        ("blocks.0.attention", "linear", "InputThreshold", 16),
        ("blocks.1.attention", "linear", "InputThreshold", 16),
        ("blocks.0.mlp.0", "linear", "InputThreshold", 16),
        ("blocks.1.mlp.0", "linear", "InputThreshold", 16),
        ("out", "head", "Screen", 9),
    }
    assert "7 changed" in str(changes)
    kinds = [type(model.get_submodule(c.path)) for c in changes.changed]
    assert {SelectiveMLP, SelectiveLinear, ScreenHead} == set(kinds)
    selectors = [layer.selector for layer in selective_modules(model).values()]
    assert len({id(selector) for selector in selectors}) == 7


def test_without_selectors_every_part_gets_its_own():
    model: Any = Net()
    assert convert_(model).changed == convert_(Net(), _convert._wanted(None, None)).changed
    restore_(model)
    assert {c.selector for c in convert_(model, where="head").changed} == {"Screen"}


@pytest.mark.parametrize("where", ["blocks.1.mlp", "blocks.*.mlp", "mlp", None])
def test_where(where):
    changes = convert_(Net(), Threshold(0.1), where)
    assert [c.path for c in changes.changed] == ["blocks.0.mlp", "blocks.1.mlp"][where == "blocks.1.mlp" :]


@torch.no_grad()
def test_parts_can_be_converted_one_after_the_other():
    x = torch.randn(2, 3, 16)
    model: Any = Net().eval()
    before, want = snapshot(model), model(x)
    convert_(model, InputThreshold(0.0), "linear")
    half = snapshot(model)
    with pytest.raises(ValueError, match="restore_"):  # layers that are selective already cannot be seen as an MLP
        convert_(model, Threshold(0.0), "mlp")
    assert unchanged(model, half)
    restore_(model)
    assert unchanged(model, before)
    convert_(model, Threshold(0.0), "mlp")
    convert_(model, InputThreshold(0.0), "linear")
    assert len(selective_modules(model)) == 6
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(model(x[:1, :1]), want[:1, :1], rtol=1e-5, atol=1e-5)
    restore_(model)
    assert unchanged(model, before) and torch.equal(model(x), want)


@pytest.mark.parametrize("meanwhile", ["nothing", "run", "dtype", "copy"])
@torch.no_grad()
def test_restoring_is_exact(meanwhile):
    model: Any = Net().eval()
    model.blocks[0].mlp[1].train()
    model.blocks[1].attention.weight.data = model.blocks[1].attention.weight.data.t().contiguous().t()
    model.blocks[1].mlp[2].weight.data = model.blocks[1].mlp[2].weight.data.t().contiguous().t()
    model.out.weight.requires_grad_(False)
    before, x = snapshot(model), torch.randn(2, 3, 16)
    want = model(x)
    names = [change.path for change in convert_(model, {"mlp": LowRank(4), "linear": InputThreshold(0.3)}).changed]
    if meanwhile == "run":
        model(x)
        model(x[:1, :1])
    elif meanwhile == "dtype":
        model.double().float()
    elif meanwhile == "copy":
        copied = copy.deepcopy(model)
        restore_(copied)
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
        assert [p.stride() for p in copied.parameters()] == [v[1] for k, v in before.items() if k.endswith(" ")]
        assert torch.equal(copied(x), want)
    assert sorted(restore_(model)) == sorted(names)
    assert unchanged(model, before) and torch.equal(model(x), want)
    with pytest.raises(ValueError, match="nothing to restore"):
        restore_(model)


def test_what_was_trained_meanwhile_stays_trained():
    model: Any = Net()
    convert_(model, {"mlp": Threshold(0.1), "linear": InputThreshold(0.1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    restore_(model)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    model(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].mlp[2].weight, after["blocks.0.mlp.2.weight"])


class NoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("selector", "where", "error", "message"),
    [
        (Threshold(), "mpl", ValueError, "where must be one of"),
        (Threshold(), "blocks.9.*", ValueError, "where must be one of"),
        ("threshold", None, TypeError, "selector must be"),
        (Threshold, None, TypeError, "got Threshold"),
        ({}, None, ValueError, "empty"),
        ({"mlp": 3}, None, TypeError, "selector must be"),
        ({"mlp": Threshold()}, "mlp", TypeError, "not both"),
        ({"mlp": Threshold(), "tail": Screen()}, None, ValueError, "where must be one of"),
        (InputThreshold(), "mlp", ValueError, "InputThreshold"),
        (Threshold(), "head", ValueError, "Screen"),
        (Screen(), "mlp", ValueError, "Screen"),
        (LowRank(4), "linear", ValueError, "LowRank"),
        (Dense(), "mlp", ValueError, "Dense"),
        (Oracle(4), "mlp", ValueError, "Oracle"),
    ],
)
def test_what_cannot_be_done_changes_nothing(selector, where, error, message):
    model: Any = Net().eval()
    model.blocks[0].train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        convert_(model, selector, where)
    assert unchanged(model, before)


@pytest.mark.parametrize("where", ["mlp", "linear", "head", "attention", None])
def test_a_network_without_a_place_says_why(where):
    model = NoBlock()
    before = snapshot(model)
    with pytest.raises(ValueError, match="nothing could be made selective"):
        convert_(model, where=where, selector=None)
    assert unchanged(model, before)
    with pytest.raises(TypeError, match="must be a torch"):
        convert_("model")  # pyright: ignore[reportArgumentType]


def test_a_lone_layer_has_to_be_wrapped():
    layer = nn.Linear(4, 4)
    before = snapshot(layer)
    with pytest.raises(ValueError):
        convert_(layer, InputThreshold(0.1), "linear")
    assert unchanged(layer, before)
    mlp = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    before = snapshot(mlp)
    try:
        convert_(mlp, Zeros())
    except ValueError as error:
        assert "wrap" in str(error) and unchanged(mlp, before)
    else:
        restore_(mlp)
        assert unchanged(mlp, before)


@pytest.mark.parametrize("again", [Threshold(), None, {"mlp": LowRank(2)}])
def test_a_half_converted_model_is_refused(again):
    model: Any = Net()
    convert_(model, Threshold(0.1), "blocks.1.mlp")
    before = snapshot(model)
    with pytest.raises(ValueError, match="restore_"):
        convert_(model, again)
    with pytest.raises(ValueError, match="restore_"):
        convert_(model, Threshold(), "blocks.1.mlp")
    assert unchanged(model, before)
    convert_(model, Threshold(0.1), "blocks.0.mlp")
    assert len(selective_modules(model)) == 2


@pytest.mark.parametrize("fails_at", [0, 1, 3, 5])
def test_an_error_half_way_takes_everything_back(monkeypatch, fails_at):
    made = []
    model: Any = Net().eval()
    before, make = snapshot(model), _convert._make

    def breaks(*args):
        if len(made) == fails_at:
            raise KeyboardInterrupt
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(_convert, "_make", breaks)
    with pytest.raises(KeyboardInterrupt):
        convert_(model, {"mlp": Threshold(), "linear": InputThreshold()})
    assert len(made) == fails_at and unchanged(model, before)


def test_a_layer_that_cannot_be_finished_is_as_before(monkeypatch):
    model: Any = Net().eval()
    before = snapshot(model)

    def breaks(*args, **options):
        raise MemoryError

    for kind, where in ((Threshold(0.1), "mlp"), (InputThreshold(0.1), "linear")):
        monkeypatch.setattr(type(kind), "prepare", breaks)
        with pytest.raises(MemoryError):
            convert_(model, kind, where)
        assert unchanged(model, before)


def test_random_numbers_go_on_as_if_nothing_had_happened():
    model: Any = Net()
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    convert_(model, {"mlp": Threshold(0.1), "linear": InputThreshold(0.1)})
    assert torch.equal(torch.rand(4), want)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inside_other_modes(around):
    model, x = Net(), torch.randn(2, 16)
    with around():
        convert_(model, {"mlp": Threshold(0.1), "linear": InputThreshold(0.1)})
    with torch.no_grad():
        model(x)
        model(x.repeat(5, 1))
    model(x).sum().backward()
    assert all(layer.ran[2] == 12 for layer in selective_modules(model).values())
    with around():
        restore_(model)
    model(x).sum().backward()


FAMILIES = [
    ("Llama", "ForCausalLM", {"num_key_value_heads": 2}),
    ("Phi3", "ForCausalLM", {"num_key_value_heads": 2}),
    ("GPT2", "LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0}),
    ("GPT2", "LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    ("OPT", "ForCausalLM", {"ffn_dim": 80, "word_embed_proj_dim": 32}),
    ("Bert", "ForMaskedLM", {}),
    ("T5", "ForConditionalGeneration", {"d_model": 32, "d_ff": 80, "d_kv": 8, "num_layers": 2, "num_heads": 4}),
    ("Mixtral", "ForCausalLM", {"num_key_value_heads": 2, "num_local_experts": 4}),
]


def tiny(family: str, suffix: str, options: dict) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
    known = getattr(transformers, f"{family}Config")
    drop = () if family not in ("GPT2", "T5") else (*tuple(sizes)[:4], "max_position_embeddings")
    config = known(**{k: v for k, v in sizes.items() if k not in drop} | options)
    return getattr(transformers, family + suffix)(config).eval()


@pytest.mark.parametrize(("family", "suffix", "options"), FAMILIES)
@torch.no_grad()
def test_zero_sparsity_is_dense_in_every_form_and_the_way_back_exact(family, suffix, options):
    model = tiny(family, suffix, options)
    before = snapshot(model)
    inputs = [{"input_ids": IDS}, {"input_ids": IDS[:1, :2]}]
    if family == "T5":
        inputs = [row | {"decoder_input_ids": row["input_ids"]} for row in inputs]
    want = [model(**row).logits for row in inputs]
    selectors = {"mlp": Threshold(0.0), "linear": InputThreshold(0.0)}
    if family == "Mixtral":
        del selectors["mlp"]
    convert_(model, selectors)
    for row, logits in zip(inputs, want, strict=True):
        torch.testing.assert_close(model(**row).logits, logits, rtol=1e-4, atol=1e-5)
    ran = [layer.ran.tolist() for layer in selective_modules(model).values()]
    assert all(
        tokens and units == tokens * layer.num_units
        for (tokens, units, *_), layer in zip(ran, selective_modules(model).values(), strict=True)
    )
    restore_(model)
    assert unchanged(model, before)
    assert all(torch.equal(model(**row).logits, logits) for row, logits in zip(inputs, want, strict=True))


@torch.no_grad()
def test_relu_families_lose_no_decision_by_skipping_zeros():
    model = tiny(*FAMILIES[4])
    want = model(IDS[:1, :3]).logits
    convert_(model, Zeros())
    got = model(IDS[:1, :3]).logits
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for layer in selective_modules(model).values():
        assert 0.2 < layer.ran[1] / (3 * layer.num_units) < 0.8


@pytest.mark.parametrize("selector", [LowRank(4), Random(8), Zeros(), Threshold(0.2)])
def test_every_selector_of_an_mlp(selector):
    model: Any = Net().eval()
    changes = convert_(model, selector)
    assert len(changes.changed) == 2
    with torch.no_grad():
        assert model(torch.randn(2, 16)).isfinite().all()


def test_output_layers_that_share_a_weight_stay_tied():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    before = snapshot(model)
    convert_(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.get_output_embeddings() is model.lm_head
    restore_(model)
    assert unchanged(model, before) and model.lm_head.weight is model.model.embed_tokens.weight


def on_meta() -> nn.Module:
    return Net().to("meta")


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear}, dtype=torch.qint8)


def without_gradients(dtype: torch.dtype) -> nn.Module:
    return Net().requires_grad_(False).to(dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (on_meta, "meta device: load the weights first"),
        (quantised, "not an nn.Linear"),
        (lambda: without_gradients(torch.complex64), "complex64"),
        (lambda: without_gradients(torch.float8_e4m3fn), "float8_e4m3fn: float32, bfloat16 or float16 are needed"),
    ],
    ids=["meta", "int8", "complex64", "float8"],
)
def test_unsupported_devices_and_dtypes_are_refused(make, message):
    model = make()
    before = [(name, id(module)) for name, module in model.named_modules()]
    state = {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"nothing could be made selective.*{message}"):
        convert_(model, {"mlp": Threshold(), "linear": InputThreshold(), "head": Screen(4)})
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert {name: id(value) for name, value in model.named_parameters()} == state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(-1), "threshold must be a number from 0, or None, got -1"),
        (lambda: Threshold("5%"), "threshold must be a number from 0, or None, got '5%'"),  # pyright: ignore
        (lambda: InputThreshold(float("nan")), "got nan"),
        (lambda: LowRank(0), "rank must be a whole number from 1, got 0"),
        (lambda: LowRank(2.5), "rank must be a whole number from 1, got 2.5"),  # pyright: ignore
        (lambda: Screen(6), "rank must be a positive multiple of 4, got 6"),
        (lambda: Screen(8, 0), "keep must be a whole number from 1, got 0"),
        (lambda: setattr(Threshold(), "setting", 101), r"setting must be a percentage in 0..100, got 101"),
        (lambda: setattr(LowRank(), "setting", -5), r"setting must be a percentage in 0..100, got -5"),
        (lambda: setattr(LowRank(), "setting", None), r"setting must be a percentage in 0..100, got None"),
        (lambda: setattr(Screen(), "setting", 0), "setting must be a whole number from 1, got 0"),
    ],
)
def test_options_of_selectors_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
