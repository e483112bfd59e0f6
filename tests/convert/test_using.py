"""A calibrated model of transformers in what people do with one: ways to generate, caches, compiling, exporting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparingly.calibrate import fit_selectors
from sparingly.convert import convert_
from sparingly.nn.screen_head import ScreenHead
from sparingly.nn.selective import MANY, selective_modules
from sparingly.selectors import InputThreshold, LowRank, Screen, Threshold

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 33, 2, 17, 40, 8], [7, 7, 1, 50, 21, 3, 60]])
NEW = 6


def tiny(layers: int = 2) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
        tokens = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
        config = transformers.LlamaConfig(hidden_size=32, intermediate_size=80, **heads, **tokens)
        model: Any = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)
    return model


def fitted(setting: int = 50, keep: int = 24, layers: int = 2, mlp: Any = None) -> Any:
    """Every selector fitted; ``setting`` 100 and ``keep`` 64 leave nothing out."""
    model = tiny(layers)
    convert_(model, {"mlp": mlp or Threshold(), "linear": InputThreshold(), "head": Screen(16, keep)})
    random = torch.Generator().manual_seed(1)
    fit_selectors(model, [torch.randint(0, 64, (4, 24), generator=random) for _ in range(4)])
    for layer in selective_modules(model).values():
        layer.selector.setting = keep if isinstance(layer, ScreenHead) else setting
        layer.reset()
    return model


def generate(model: Any, ids: Tensor = IDS[:1], **options: Any) -> Tensor:
    torch.manual_seed(11)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **options)


WAYS = {
    "greedy": {"do_sample": False},
    "temperature": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "top_p": {"do_sample": True, "temperature": 1.3, "top_p": 0.8},
    "beams": {"num_beams": 3, "do_sample": False},
    "beams that are drawn": {"num_beams": 3, "do_sample": True},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "penalties": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate(way):
    whole = fitted(100, 64)
    assert torch.equal(generate(whole, **WAYS[way]), generate(tiny(), **WAYS[way]))
    model = fitted()
    made = generate(model, **WAYS[way])
    assert torch.equal(made, generate(model, **WAYS[way])) and made.shape == (1, 7 + NEW)
    for name, layer in selective_modules(model).items():
        tokens, units, dense, _ = layer.ran.tolist()
        assert 0 < units < 0.8 * tokens * layer.num_units, name
        # The prompts alone are dense, but for the head: that screens whatever comes.
        prompts = 14 * WAYS[way].get("num_beams", 1)
        assert dense == (0 if isinstance(layer, ScreenHead) else prompts), name
        assert set(layer.why_dense) <= {MANY}


def test_a_static_cache_gives_what_a_growing_one_gives():
    model = fitted()
    want = generate(model, do_sample=False)
    assert torch.equal(generate(model, **WAYS["static cache"]), want)
    assert not torch.equal(want, generate(tiny(), do_sample=False))


def test_a_compiled_forward_generates_the_same():
    model = fitted(layers=1)
    want = generate(model, **WAYS["static cache"])
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager", dynamic=False)
    assert torch.equal(generate(model, **WAYS["static cache"]), want)


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def ours(program: Any) -> set[str]:
    """Names of this package's operators in an exported program."""
    targets = {str(node.target) for node in program.graph.nodes}
    return {target.split(".")[1] for target in targets if target.startswith("sparingly.")}


@torch.no_grad()
def test_a_calibrated_decoder_is_exported_with_its_operators():
    model = fitted(layers=1)
    program = torch.export.export(Logits(model), (IDS[:1, :1],))
    assert ours(program) == {"threshold_accumulate", "gated_rows", "screen_logits"}
    for ids in (IDS[:1, :1], IDS[1:, 3:4]):
        want = model(ids, use_cache=False).logits
        torch.testing.assert_close(program.module()(ids), want, rtol=1e-5, atol=1e-5)
        assert (want - tiny(1)(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("selector", [Threshold, lambda: LowRank(4)], ids=["Threshold", "LowRank"])
@pytest.mark.parametrize("tokens", [1, 7])
@torch.no_grad()
def test_a_calibrated_mlp_is_exported(selector, tokens):
    mlp = fitted(layers=1, mlp=selector()).model.layers[0].mlp
    x = torch.randn(1, tokens, 32)
    program = torch.export.export(mlp, (x,))
    skipping = {"gather_dot", "gather_accumulate"} if isinstance(mlp.selector, LowRank) else {"gated_rows"}
    assert (skipping <= ours(program)) == (tokens == 1)
    other = torch.randn(1, tokens, 32)
    torch.testing.assert_close(program.module()(other), mlp(other), rtol=1e-5, atol=1e-5)
