"""Mixtures of transformers whose experts share one parameter: convert, equal answers, restore, save and load."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sparingly as sp
from sparingly.convert._find import find
from sparingly.nn.experts import SelectiveExperts

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
NARROW = {"moe_intermediate_size": 24}
DEEPSEEK = {**MLA, "v_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}

# Family, configuration besides COMMON, how many modules of experts, experts a token, layout of the fused parameter.
FAMILIES = [
    ("Mixtral", {"num_local_experts": 4}, 2, 2, "gate_up"),
    (
        "Qwen2Moe",
        {"num_experts": 4, **NARROW, "shared_expert_intermediate_size": 24},
        2,
        2,
        "gate_up",
    ),
    ("Qwen3Moe", {"num_experts": 4, **NARROW}, 2, 2, "gate_up"),
    ("Olmoe", {"num_experts": 4}, 2, 2, "gate_up"),
    ("DeepseekV3", {**DEEPSEEK, "first_k_dense_replace": 0}, 2, 2, "gate_up"),
    ("GptOss", {"num_local_experts": 4}, 2, 2, "interleaved"),  # biases, clamps, [experts, in, out]
    ("Llama4", {"num_local_experts": 4, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}, 2, 1, "gate_up"),
    (
        "NemotronH",
        {"layers_block_type": ["moe", "attention"], "n_routed_experts": 4, **NARROW},
        1,
        2,
        "",
    ),
    ("GraniteMoe", {"num_local_experts": 4}, 2, 2, "gate_up"),
    ("Dbrx", {}, 2, 2, "gate_up"),  # two dimensions, the experts' rows one after another, in a child
]


def tiny(family: str, config: dict) -> Any:
    torch.manual_seed(0)
    merged = {**COMMON, **config}
    if family == "NemotronH":
        merged = {**merged, "moe_shared_expert_intermediate_size": 24, "mamba_num_heads": 4, "mamba_head_dim": 8}
        del merged["num_hidden_layers"]
    if family == "Dbrx":
        experts = {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
        attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
        merged = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 64, "pad_token_id": 0}
        merged |= {"ffn_config": experts, "attn_config": attention}
    kind = "Llama4Text" if family == "Llama4" else family
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{kind}Config")(**merged)).eval()


IDS = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def answers(model: nn.Module) -> list[torch.Tensor]:
    """Prefill of two texts, and one token."""
    return [model(IDS).logits, model(IDS[:1, :1]).logits]


@pytest.mark.parametrize(("family", "config", "modules", "per_token", "layout"), FAMILIES)
def test_family(family, config, modules, per_token, layout, tmp_path):
    model = tiny(family, config)
    before, dense = {k: v.clone() for k, v in model.state_dict().items()}, answers(model)
    changes = sp.convert_(model, sp.Threshold(0.0))
    experts = [module for module in model.modules() if isinstance(module, SelectiveExperts)]
    assert len(experts) == sum(change.kind == "experts" for change in changes.changed) == modules
    assert all(layer.per_token == per_token for layer in experts)
    assert not layout or all(layer.form.layout == layout for layer in experts)
    selective = answers(model)
    for want, got in zip(dense, selective, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    # The one token was served by units, and every unit of its experts ran.
    assert all(layer.ran[0] == 1 and layer.ran[1] == layer.num_units for layer in experts)
    sp.save(model, tmp_path / "model")
    loaded = sp.load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(answers(loaded), selective, strict=True))
    assert {k: v.shape for k, v in model.state_dict().items() if "selector" not in k} == {
        k: v.shape for k, v in before.items()
    }
    sp.restore_(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(answers(model), dense, strict=True))


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4"])
def test_calibrated(family, tmp_path):
    config = next(row[1] for row in FAMILIES if row[0] == family)
    model = tiny(family, config)
    sp.convert_(model, sp.Threshold())
    generator = torch.Generator().manual_seed(3)
    contract = sp.calibrate(model, torch.randint(1, 64, (96, 8), generator=generator), "agreement", 0.3, 0.9)
    assert contract is not None
    experts = [module for module in model.modules() if isinstance(module, SelectiveExperts)]
    for layer in experts:
        layer.off, layer.selector.setting = False, 50
    model.eval()
    with torch.no_grad():
        one = model(IDS[:1, :1]).logits
    rows = [row for row in sp.explain(model).layers if row.kind == "SelectiveExperts"]
    assert len(rows) == len(experts) and all(0.1 < (row.share_run or 0) < 0.9 for row in rows)
    assert all(layer.ran[0] == 1 for layer in experts)
    with torch.no_grad():
        # Five tokens at once take the product of all: the same answers for the first of them.
        many = model(IDS[:1, :5]).logits[:, :1]
    torch.testing.assert_close(one, many, rtol=1e-3, atol=1e-5)
    sp.save(model, tmp_path / "model")
    loaded = sp.load(tmp_path / "model")
    assert torch.equal(answers(loaded)[1], one)
    assert torch.equal(answers(copy.deepcopy(model))[1], one)


def test_generates_and_trains():
    model = tiny("Mixtral", {"num_local_experts": 4})
    dense = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    sp.convert_(model, sp.Threshold(0.0))
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=4, do_sample=False), dense)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    experts: list[Any] = [layer for layer in model.modules() if isinstance(layer, SelectiveExperts)]
    assert experts and all(layer.down_proj.grad.any() for layer in experts)


def test_places_and_refusals():
    model = tiny("Mixtral", {"num_local_experts": 4})
    places, skipped = find(model, "mlp")
    assert not skipped and [(p.path, p.kind, p.per_token) for p in places] == [
        (f"model.layers.{i}.mlp.experts", "experts", 2) for i in range(2)
    ]
    assert [p.path for p in find(model, "model.layers.1.mlp*")[0]] == ["model.layers.1.mlp.experts"]
    with pytest.raises(ValueError, match="take Threshold or Zeros, got LowRank"):
        sp.convert_(model, sp.LowRank(4))
    sp.convert_(model, sp.Threshold(0.0))
    with pytest.raises(ValueError, match="selective already"):
        sp.convert_(model, sp.Threshold(0.0))


def test_layers_of_experts_apart_are_reported():
    config = {k: v for k, v in COMMON.items() if k not in ("num_attention_heads", "head_dim")}
    model = transformers.JetMoeForCausalLM(
        transformers.JetMoeConfig(**config, num_local_experts=4, kv_channels=8, intermediate_size=48)
        if "intermediate_size" not in config
        else transformers.JetMoeConfig(**config, num_local_experts=4, kv_channels=8)
    )
    with pytest.raises(ValueError, match="one layer of all experts by itself"):
        sp.convert_(model, sp.Threshold(0.0))


def test_experts_have_no_int8_rows_and_are_left_alone_with_the_reason():
    model = tiny("Mixtral", {"num_local_experts": 4, "num_hidden_layers": 1})
    changes = sp.convert_(model, rows="int8")
    skipped = {skip.path for skip in changes.skipped if "int8 rows are for" in skip.reason}
    assert skipped == {"model.layers.0.mlp.experts"}
    assert "lm_head" in {change.path for change in changes.changed}
    sp.restore_(model)
    sp.convert_(model, where="mlp")
    with pytest.raises(ValueError, match="this is SelectiveExperts with Threshold"):
        model.model.layers[0].mlp.experts.rows = "int8"
