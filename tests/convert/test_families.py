"""Tiny random models of many transformers families: every MLP is found, or reported with the reason."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from sparingly.convert import _families
from sparingly.convert._find import find

transformers = pytest.importorskip("transformers")

DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
IMAGE = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 80, "d_kv": 8, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
EXPERTS = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}

# Family, model class, configuration, then of each MLP: how many, gated, exact container, fused.
FAMILIES = [
    ("Llama", "ForCausalLM", DECODER, 2, True, True, None),
    ("Qwen3", "ForCausalLM", {**DECODER, "head_dim": 8}, 2, True, True, None),
    ("Gemma2", "ForCausalLM", {**DECODER, "head_dim": 8}, 2, True, True, None),
    ("Phi", "ForCausalLM", DECODER, 2, False, True, None),
    ("Phi3", "ForCausalLM", DECODER, 2, True, True, "gate_up"),
    ("GPT2", "LMHeadModel", GPT, 2, False, False, None),
    ("GPT2", "LMHeadModel", {**GPT, "resid_pdrop": 0.0}, 2, False, True, None),
    ("GPTJ", "ForCausalLM", {**GPT, "rotary_dim": 4}, 2, False, True, None),
    ("GPTNeoX", "ForCausalLM", ENCODER, 2, False, True, None),
    ("Falcon", "ForCausalLM", {**ENCODER, "ffn_hidden_size": 80}, 2, False, True, None),
    ("OPT", "ForCausalLM", {**ENCODER, "ffn_dim": 80, "word_embed_proj_dim": 32}, 2, False, False, None),
    ("Bloom", "ForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 2, False, False, None),
    ("Nemotron", "ForCausalLM", DECODER, 2, False, True, None),
    ("Bert", "ForMaskedLM", ENCODER, 2, False, False, None),
    ("Albert", "ForMaskedLM", {**ENCODER, "embedding_size": 16}, 1, False, False, None),
    ("ModernBert", "ForMaskedLM", ENCODER, 2, True, True, "gate_up"),
    ("T5", "ForConditionalGeneration", T5, 4, False, False, None),
    (
        "T5",
        "ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "dropout_rate": 0},
        4,
        True,
        True,
        None,
    ),
    ("Bart", "ForConditionalGeneration", {**BART, **HEADS, "max_position_embeddings": 64}, 4, False, False, None),
    (
        "Whisper",
        "ForConditionalGeneration",
        {**BART, **HEADS, "num_mel_bins": 8, "max_source_positions": 16, "decoder_start_token_id": 1},
        4,
        False,
        False,
        None,
    ),
    ("ViT", "ForImageClassification", {**IMAGE, "patch_size": 8, "hidden_dropout_prob": 0.0}, 2, False, None, None),
    ("Dinov2", "Model", {**IMAGE, "patch_size": 8, "use_swiglu_ffn": True}, 2, True, True, None),
    ("RecurrentGemma", "ForCausalLM", {**DECODER, "lru_width": 32, "attention_window_size": 16}, 2, True, True, None),
]


def tiny(family: str, suffix: str, config: dict) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, family + suffix)(getattr(transformers, family + "Config")(**config))
    return model.eval()


@pytest.mark.parametrize(("family", "suffix", "config", "count", "gated", "container", "fused"), FAMILIES)
def test_family(family, suffix, config, count, gated, container, fused):
    model = tiny(family, suffix, config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    places, skipped = find(model, "mlp")
    assert len(places) == count and not skipped, (places, skipped)
    for p in places:
        assert p.kind == "mlp" and (p.gate is not None) == gated and p.fused == fused and p.activation is not None
        assert container is None or p.container == container
        assert p.path == (p.path if p.container else p.down)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_attention_linears_and_head(family):
    model = tiny(family, "ForCausalLM", EXPERTS if family == "Mixtral" else DECODER)
    linear, skipped = find(model, "linear")
    assert [p.path.rpartition(".")[2] for p in linear] == ["q_proj", "k_proj", "v_proj", "o_proj"] * 2 and not skipped
    assert find(model, "attention")[0] == linear
    assert [p.path for p in find(model, "head")[0]] == ["lm_head"]
    assert [p.path for p in find(model, "model.layers.*.self_attn.?_proj")[0]] == [p.path for p in linear]


def test_mlp_with_a_convolution_inside_is_reported():
    config = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}
    lists = {"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
    places, skipped = find(tiny("Segformer", "Model", {**config, **lists, "image_size": 32}), "mlp")
    assert not places and len(skipped) == 2 and all("convolution" in s.reason for s in skipped)


def test_models_within_models_run_alone():
    vision = {"model_type": "siglip_vision_model", **IMAGE, "patch_size": 8}
    model = tiny(
        "Llava",
        "ForConditionalGeneration",
        {"vision_config": vision, "text_config": {"model_type": "llama", **DECODER}},
    )
    paths = [p.path for p in find(model, "mlp")[0]]
    assert sum("vision" in p for p in paths) >= 2 and sum("language_model" in p for p in paths) == 2


def test_head_of_a_model_without_one():
    places, skipped = find(tiny("Bert", "Model", ENCODER), "head")
    assert not places and "no output layer" in skipped[0].reason
    classifier = tiny("Bert", "ForSequenceClassification", ENCODER)
    assert [p.path for p in find(classifier, "head")[0]] == ["classifier"]


def test_rows_are_data():
    rows = [(r.up, r.down, r.gate) for r in _families.MLP_NAMES]
    assert len(set(rows)) == len({(*r, n.activation) for r, n in zip(rows, _families.MLP_NAMES, strict=True)}) - 1
    assert not [n for n, f in inspect.getmembers(_families, inspect.isfunction) if n.startswith("convert")]


def test_names_serve_where_nothing_runs():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 32), nn.Linear(8, 32)
            self.down_proj, self.act_fn = nn.Linear(32, 8), nn.SiLU()

        def forward(self, x, *, cache):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = nn.Sequential(Strange())
    (place,), skipped = find(model, "mlp")
    assert (place.path, place.gate, place.container) == ("0.down_proj", "0.gate_proj", False) and not skipped
    assert place.activation is model[0].act_fn
