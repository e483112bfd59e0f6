"""A converted network decoded as one compiled call gives what its modules give, counts what they count, and notices
what changes."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparingly.calibrate import calibrate
from sparingly.convert import convert_
from sparingly.energy import count
from sparingly.nn._step_plan import LEDGER
from sparingly.nn.selective import reset, selective_modules
from sparingly.workloads._decoders import Decoder
from sparingly.workloads._planned_decoder import THREADS, PlannedDecoder

transformers = pytest.importorskip("transformers")

FAMILIES = {
    "Llama": {},
    # Units so many that a row of the gate is read in parts.
    "Llama with biases": {"mlp_bias": True, "attention_bias": True, "intermediate_size": 600},
    "Qwen2": {"tie_word_embeddings": True},
}
# And in int8.
WIDE = {"Llama, wide": {"intermediate_size": 2400}}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(name: str = "Llama") -> Any:
    """A tiny random network, odd numbers of heads and units, weights large enough that every part of it shows."""
    torch.manual_seed(5)
    family, options = re.split("[ ,]", name)[0], (FAMILIES | WIDE)[name]
    sizes = {"hidden_size": 36, "intermediate_size": 53, "num_hidden_layers": 3, "vocab_size": 120}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "max_position_embeddings": 512}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **heads, **options}, initializer_range=0.3)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if "norm" in key or "bias" in key:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


def converted(name: str = "Llama", setting: int = 60, rows: str | None = None) -> Any:
    """Calibrated, then every layer set to keep ``setting`` per cent, so that every cut cuts."""
    model = network(name)
    convert_(model, rows=rows)
    data = torch.randint(0, 120, (96, 12), generator=torch.Generator().manual_seed(2))
    calibrate(model, data, max_drop=0.5)
    for module in blocks(model):
        module.selector.setting = setting
    reset(model)
    return model


def blocks(model: Any) -> list[Any]:
    """The selective modules of the layers, without the output layer's."""
    return [module for name, module in selective_modules(model).items() if name != "lm_head"]


def ids(tokens: int = 20) -> Tensor:
    return torch.randint(0, 120, (tokens,), generator=torch.Generator().manual_seed(1))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def stepwise(engine: Any, tokens: Tensor, read: int = 5) -> Tensor:
    """Logits after each token from number ``read`` on, one token at a time."""
    return torch.stack([engine.prepare(tokens[:read]), *(engine.step(int(token)) for token in tokens[read:])])


def alone(engine: Any) -> Tensor:
    """Logits after each token, the first too by a step of its own: a prompt would round activations to bfloat16."""
    return torch.stack([engine.step(int(token)) for token in ids()])


def counts(model: Any) -> list[list[int]]:
    return [module.ran.tolist() for module in selective_modules(model).values()]


@pytest.mark.parametrize("setting", [100, 60, 20])
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_the_modules_and_counts_as_they_do(name: str, setting: int):
    model = converted(name, setting)
    wanted = stepwise(Decoder(model), ids())
    expected_counts = counts(model)
    reset(model)
    planned = PlannedDecoder(model)
    assert planned.why_modules is None
    assert error(stepwise(planned, ids()), wanted) < 2e-5
    assert counts(model) == expected_counts
    kept = [module.ran[1] / module.ran[0] / module.num_units for module in blocks(model)]
    assert (min(kept) == 1) if setting == 100 else (max(kept) < 1)


@pytest.mark.parametrize("setting", [100, 40])
@pytest.mark.parametrize("name", ["Llama with biases", "Qwen2", *WIDE])
def test_int8_rows_are_those_of_the_modules(name: str, setting: int):
    model = converted(name, setting, "int8")
    wanted = stepwise(Decoder(model), ids())
    expected_counts = counts(model)
    reset(model)
    planned = PlannedDecoder(model)
    assert planned.why_modules is None
    assert error(stepwise(planned, ids()), wanted) < 2e-5
    assert counts(model) == expected_counts
    plain = copy.deepcopy(model)
    for module in selective_modules(plain).values():
        module.rows = None
    assert error(stepwise(Decoder(plain), ids()), wanted) > 1e-3


def test_one_wrong_code_shows_and_changes_under_int8_rows_are_noticed():
    model = converted(setting=100, rows="int8")
    planned = PlannedDecoder(model)
    wanted = stepwise(planned, ids())
    layer = model.model.layers[1]
    for part in (*blocks(layer.self_attn), layer.mlp.gate_proj, layer.mlp):
        for name, made in part._made.items():
            if name.startswith("int8"):
                made.value.rows[3, 2] ^= 64
                assert error(stepwise(planned, ids()), wanted) > 1e-4, name
                made.value.rows[3, 2] ^= 64
    assert torch.equal(stepwise(planned, ids()), wanted)
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(1.5)
        layer.self_attn.q_proj.weight.mul_(1.5)
    found = stepwise(planned, ids())
    assert planned.why_modules is None
    assert error(found, stepwise(Decoder(model), ids())) < 2e-5 and error(found, wanted) > 1e-3
    layer.mlp.rows = None
    assert "layer 1: up's rows must be" in str(planned.why_modules)
    assert error(stepwise(planned, ids()), stepwise(Decoder(model), ids())) < 2e-5


def test_a_longer_sequence_and_a_second_one():
    model = converted()
    wanted, planned = stepwise(Decoder(model), ids(300)), PlannedDecoder(model)
    for _ in range(2):
        assert error(stepwise(planned, ids(300)), wanted) < 1e-4
    with pytest.raises(ValueError, match="at most"):
        for _ in range(300):
            planned.step(1)


def test_one_wrong_row_shows():
    model = converted(setting=100)
    wanted = stepwise(Decoder(copy.deepcopy(model)), ids())
    planned = PlannedDecoder(model)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                 "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
        weight = model.model.layers[1].get_submodule(part).weight
        before = weight.data[:, 3].clone()
        weight.data[:, 3] += 1.0
        assert error(stepwise(planned, ids()), wanted) > 1e-3, part
        weight.data[:, 3] = before
    assert error(stepwise(planned, ids()), wanted) < 2e-5


def test_bfloat16_weights_with_float32_activations():
    model = converted()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    wanted = alone(Decoder(model))
    for module in model.model.layers.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.bfloat16()
    planned = PlannedDecoder(model)
    assert planned.why_modules is None
    assert error(alone(planned), wanted) < 2e-5
    assert model.model.layers[0].mlp.up_proj.weight.dtype is torch.bfloat16


def test_nan_and_infinity_show():
    model = converted(setting=20)
    planned, modules = PlannedDecoder(model), Decoder(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 2] = float("nan")
        model.model.embed_tokens.weight[9, 2] = float("inf")
    for engine in (planned, modules):
        for token in (7, 9):
            engine.prepare(ids()[:5])
            assert engine.step(token).isnan().all()
            assert engine.step(3).isnan().all()  # its keys and values are in the cache
            assert engine.prepare(ids()[:5]).isfinite().all()


def test_what_changes_is_noticed():
    model = converted()
    planned, tokens = PlannedDecoder(model), ids()
    before = stepwise(planned, tokens)

    def check() -> None:
        nonlocal before
        found = stepwise(planned, tokens)
        assert error(found, stepwise(Decoder(model), tokens)) < 2e-5
        assert error(found, before) > 1e-4
        before = found

    attention, mlp = model.model.layers[1].self_attn, model.model.layers[2].mlp
    attention.k_proj.selector.setting = 20
    check()
    mlp.selector.setting = 20
    check()
    with torch.no_grad():
        mlp.up_proj.weight.mul_(1.5)  # a part of `resting`, which is made from it
    check()
    attention.o_proj.load_state_dict({"weight": attention.o_proj.weight * 2}, strict=False, assign=True)
    check()
    attention.q_proj.off = True
    assert "switched off" in str(planned.why_modules)
    check()
    attention.q_proj.off = False
    assert planned.why_modules is None
    attention.v_proj.register_forward_hook(lambda module, given, out: 2 * out)
    assert "hooks" in str(planned.why_modules)
    check()


def test_other_layers_take_the_path_of_the_modules():
    plain = network()
    planned = PlannedDecoder(plain)
    assert "not a SelectiveMLP" in str(planned.why_modules)
    assert torch.equal(stepwise(planned, ids()), stepwise(Decoder(plain), ids()))
    unfitted = network()
    convert_(unfitted)
    assert "not calibrated" in str(PlannedDecoder(unfitted).why_modules)
    model = converted()
    (original,) = model.model.layers[1].self_attn.o_proj._original
    model.model.layers[1].self_attn.o_proj = original
    assert "layer 1: o_proj is not a SelectiveLinear" in str(PlannedDecoder(model).why_modules)


def test_a_module_put_in_later_is_used_by_prompts_and_tokens():
    model = converted()
    planned = PlannedDecoder(model)
    before = stepwise(planned, ids())
    attention = model.model.layers[1].self_attn
    (original,) = attention.o_proj._original
    attention.o_proj = copy.deepcopy(original)
    found = stepwise(planned, ids())
    assert planned.why_modules is not None
    assert error(found, stepwise(Decoder(model), ids())) < 2e-5
    assert (found - before).abs().amax(dim=1).min() > 1e-4


def test_two_threads_and_a_ledger_take_the_path_of_the_modules():
    model = converted()
    planned = PlannedDecoder(model)
    wanted = stepwise(planned, ids())
    torch.set_num_threads(2)
    assert planned.why_modules == THREADS
    assert error(stepwise(planned, ids()), wanted) < 2e-5
    torch.set_num_threads(1)
    stepwise(planned, ids()[:19])
    reset(model)
    with count() as ledger:
        assert planned.why_modules == LEDGER
        counted = planned.step(int(ids()[19]))
    assert error(counted, wanted[-1]) < 2e-5
    units = sum(int(module.ran[1]) for module in blocks(model))
    assert ledger.macs > units > 0
