"""PEFT adapters on converted layers of both kinds of weights: merged, unmerged, unloaded."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from sparingly.calibrate import fit_selectors
from sparingly.convert import convert_, restore_
from sparingly.nn.linear import SelectiveInputs, SelectiveLinear
from sparingly.nn.selective import STALE, selective_modules
from sparingly.selectors import InputThreshold, Screen, Threshold

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 9, 33, 2, 17, 40, 8], [7, 7, 1, 50, 21, 3, 60]])
TARGETS = ["c_attn", "c_proj", "c_fc"]


def tiny() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        options = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)
    return model


def converted(threshold: float = 0.0) -> Any:
    model = tiny()
    convert_(model, {"mlp": Threshold(threshold), "linear": InputThreshold(threshold)})
    return model


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    settings = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()


@torch.no_grad()
def assert_same(model: Any, dense: Any) -> None:
    # One and two tokens first, as in decoding: nothing else makes constants anew.
    for ids in (IDS[:1, :1], IDS[:1, :2], IDS):
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*already merged")
@pytest.mark.parametrize("options", [{}, {"fan_in_fan_out": True}, {"use_dora": True}], ids=["", "named", "dora"])
@pytest.mark.parametrize("safe", [False, True])
def test_adapters_on_layers_with_turned_weights(options, safe):
    plain = tiny()
    model, dense = adapted(converted(), **options), adapted(tiny(), **options)
    assert_same(model, dense)
    assert (dense(IDS).logits - plain(IDS).logits).abs().max() > 0.1
    for change in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
        for one in (model, dense):
            getattr(one, change)(**({"safe_merge": safe} if change == "merge_adapter" else {}))
        assert_same(model, dense)
    with_adapter = dense(IDS).logits
    model, dense = (one.merge_and_unload(safe_merge=safe) for one in (model, dense))
    assert_same(model, dense)
    restore_(model)
    assert not selective_modules(model)
    torch.testing.assert_close(model(IDS).logits, with_adapter, rtol=1e-4, atol=1e-3)
    for (name, got), want in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)


def test_a_merge_while_decoding_at_real_thresholds_is_noticed():
    # Thresholds with centres: what a token starts from is made of the weights.
    model = tiny()
    convert_(model, {"mlp": Threshold(), "linear": InputThreshold()})
    fit_selectors(model, [torch.randint(0, 64, (4, 24)) for _ in range(4)])
    for layer in selective_modules(model).values():
        layer.selector.setting = 60
    model = adapted(model)
    with torch.no_grad():
        model(IDS[:1, :2])
        model.merge_adapter()
        few = model(IDS[:1, :2]).logits
        many = model(IDS[:1].repeat(4, 1)[:, :2]).logits[:1]
    torch.testing.assert_close(few, many, rtol=3e-2, atol=3e-2 * float(many.abs().mean()))


def test_an_adapter_merged_into_a_screened_output_layer():
    model = tiny()
    convert_(model, Screen(8, 16), "head")
    model.lm_head.selector.fit(model.lm_head.weight, None, torch.randn(200, 32))
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, tiny()(IDS).logits, atol=1e-3)
    model, dense = (adapted(one, target_modules=["lm_head"]) for one in (model, tiny()))
    for one in (model, dense):
        one.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[:1, :2]).logits, dense(IDS[:1, :2]).logits, rtol=1e-4, atol=1e-4)
    (head,) = selective_modules(model).values()
    assert head.why_dense == {STALE: 2}


def test_each_stand_in_is_of_the_kind_that_it_stands_for():
    conv1d = transformers.pytorch_utils.Conv1D
    model = converted(0.5)
    layers = {name: layer for name, layer in selective_modules(model).items() if isinstance(layer, SelectiveInputs)}
    assert layers
    for name, layer in layers.items():
        assert isinstance(layer, conv1d) and not isinstance(layer, torch.nn.Linear), name
        assert (layer.nx, layer.nf) == tuple(layer.weight.shape) and "Conv1D" in repr(layer)
        assert not isinstance(layer, SelectiveLinear)
    layer, x = next(iter(layers.values())), torch.randn(1, 32)
    with torch.no_grad():
        assert torch.equal(layer(x=x), layer(x))  # as Conv1D names its input
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear or transformers' Conv1D, got Embedding"):
        SelectiveInputs.from_dense(torch.nn.Embedding(4, 4), InputThreshold(0.0))
