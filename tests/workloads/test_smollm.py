"""What the workload computes, on numbers and a tiny network; SmolLM2 itself is not needed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from sparingly.convert import convert_
from sparingly.nn.selective import selective_modules
from sparingly.workloads import smollm


def test_a_drop_is_relative_and_paired():
    dense = torch.full((50,), 2.0, dtype=torch.float64)
    own = dense + torch.tensor([0.0, 0.02], dtype=torch.float64).repeat(25)
    entry = smollm._perplexities(dense, own)
    assert entry["dense"]["value"] == pytest.approx(math.exp(2))
    assert entry["drop"]["value"] == pytest.approx(math.expm1(0.01))
    assert entry["drop"]["lo"] < entry["drop"]["value"] < entry["drop"]["hi"]
    # The interval is that of the differences: a shift of both sides leaves it.
    again = smollm._perplexities(dense + torch.arange(50), own + torch.arange(50))
    assert again["drop"] == pytest.approx(entry["drop"])


def test_calls_are_timed_in_pairs_on_one_thread():
    before, threads = torch.get_num_threads(), set()

    def dear(part: torch.Tensor) -> None:
        threads.add(torch.get_num_threads())
        torch.mm(torch.randn(300, 300), torch.randn(300, 300))

    ratio = smollm._paired_calls(dear, lambda part: None, torch.zeros(20, 4), 3)
    assert ratio["cpu_s"]["lo"] <= ratio["cpu_s"]["value"] <= ratio["cpu_s"]["hi"]
    assert threads == {1} and torch.get_num_threads() == before


def test_modes_grow():
    sizes = [smollm.MODES[name].calibration for name in ("quick", "default", "full")]
    assert sizes == sorted(sizes)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Any:
    """The workload with a tiny random network in the place of SmolLM2, every layer of which leaves units out."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 120}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()
    model = copy.deepcopy(dense)
    convert_(model)
    smollm._fit(model, torch.randint(0, 120, (16, 12)), 60)
    made = smollm.SmolLM(smollm.Mode("tiny", 0.5, 4, 4, 64, 1, 1, 0), lambda what, part: None)
    made.dense, made.selective = dense, model
    monkeypatch.setattr(made, "windows", lambda part, kind, n: torch.randint(0, 120, (n, 64)))
    return made


def test_decoding_is_measured_in_three_precisions_and_int8_beside_what_it_loses(run):
    entry = run.decode()
    for key in ("saving", "saving_bf16", "saving_int8"):
        assert entry[key]["macs"] > 0 and entry[key]["bytes"] > 0 and entry[key]["cpu_s"]["value"] > 0
    for side in ("dense", "selective"):
        assert entry[f"{side}_bytes"] > entry[f"{side}_bytes_bf16"] > entry[f"{side}_bytes_int8"]
    assert "int8" in entry["engine_int8"]
    quality = entry["quality_int8"]
    assert quality["n"] == 8 and abs(quality["drop"]["value"]) < 1
    assert {layer.rows for layer in selective_modules(run.selective).values()} == {None}
    planned = run.decoder("int8")
    assert planned.precision == "int8" and {layer.rows for layer in selective_modules(planned.lm_head).values()} == {
        "int8"
    }


def test_int8_quality_is_that_of_the_int8_network(run):
    same = run._quality_int8()["drop"]["value"]
    for layer in selective_modules(run.selective).values():
        layer.off = True
    assert abs(run._quality_int8()["drop"]["value"]) < 1e-5 < abs(same)
