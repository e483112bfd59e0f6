"""Single tokens as one compiled call inside ``generate()``: the same text, a cache that anything can go on with, and
the modules wherever a call is another one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import sparingly as sp
from sparingly.convert import convert_, restore_
from sparingly.nn.decoding import CompiledSteps, compiled_steps
from sparingly.nn.selective import selective_modules
from sparingly.selectors import InputThreshold, Threshold

transformers: Any = pytest.importorskip("transformers")

PARTS = {"mlp": Threshold(0.02), "linear": InputThreshold(0.05)}
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 512}


def dense(family: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def converted(family: str = "Llama", **more: Any) -> Any:
    model = dense(family, **more)
    convert_(model, PARTS)
    return model


def prompt(tokens: int = 5, rows: int = 1) -> torch.Tensor:
    return torch.randint(96, (rows, tokens), generator=torch.Generator().manual_seed(2))


def by_modules(model: Any) -> Any:
    """A copy that runs its modules."""
    plain = copy.deepcopy(model)
    (steps,) = compiled_steps(plain)
    del steps.stack.forward
    return plain


def text(model: Any, ids: torch.Tensor, tokens: int = 90, **more: Any) -> Any:
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options, output_logits=True, **more)


def near(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    for own, other in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family, more", [("Llama", {}), ("Mistral", {"sliding_window": None}), ("Qwen2", {})])
def test_generate_takes_compiled_steps_and_writes_the_same(family, more):
    model = converted(family, **more)
    found = text(model, prompt())
    (steps,) = compiled_steps(model)
    assert steps.why_modules is None
    near(found, text(by_modules(model), prompt()))
    ran = {name: layer.ran.tolist() for name, layer in selective_modules(model).items()}
    assert all(counts[0] == 89 and counts[1] > 0 for counts in ran.values())
    assert "one compiled call" in str(sp.explain(model))


def test_a_layer_that_is_corrupted_is_seen():
    model, plain = converted(), by_modules(converted())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1.0
    with pytest.raises(AssertionError):
        near(text(model, prompt(), 20), text(plain, prompt(), 20))


def test_weights_settings_and_modules_that_change_are_noticed():
    model = converted()
    text(model, prompt(), 4)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.q_proj.weight.mul_(0.5)
    near(text(model, prompt(), 8), text(by_modules(model), prompt(), 8))
    layer.mlp.off = True
    near(text(model, prompt(), 8), text(by_modules(model), prompt(), 8))
    assert "switched off" in str(compiled_steps(model)[0].why_modules)
    layer.mlp.off = False
    seen: list[int] = []
    handle = layer.input_layernorm.register_forward_hook(lambda *_: seen.append(1))
    text(model, prompt(), 3)
    assert len(seen) == 3 and "hooks" in str(compiled_steps(model)[0].why_modules)
    handle.remove()
    text(model, prompt(), 3)
    assert len(seen) == 3 and compiled_steps(model)[0].why_modules is None


@torch.no_grad()
def test_a_cache_goes_on_in_the_modules_and_back():
    """One token, then several at once, then one again, and cut back in between."""
    model = converted()
    plain = by_modules(model)
    ids = prompt(40)
    caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    steps = (ids[:, :6], ids[:, 6:7], ids[:, 7:8], ids[:, 8:12], ids[:, 12:13], "crop", ids[:, 11:12], ids[:, 12:13])
    for part in steps:
        if isinstance(part, str):
            for cache in caches:
                cache.crop(-2)
            continue
        own, other = (net(part, past_key_values=kept).logits for net, kept in zip((model, plain), caches, strict=True))
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
        assert (compiled_steps(model)[0].why_modules is None) == (part.shape[1] == 1)
    for own, other in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(own.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.values, other.values, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_two_sequences_in_turns_keep_their_own_caches():
    model = converted()
    plain, ids = by_modules(model), prompt(12, 2)
    caches = [[transformers.DynamicCache(config=model.config) for _ in range(2)] for _ in range(2)]
    for place in range(12):
        for row in range(2):
            token = ids[row : row + 1, place : place + 1]
            pair = zip((model, plain), caches[row], strict=True)
            own, other = (net(token, past_key_values=kept).logits for net, kept in pair)
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_bfloat16_gives_its_cache_back_in_bfloat16():
    model = converted().to(torch.bfloat16)
    found = text(model, prompt(), 10)
    assert compiled_steps(model)[0].why_modules is None and found.logits[0].dtype == torch.float32
    with torch.no_grad():
        cache = found.past_key_values
        model(prompt(3), past_key_values=cache)
        assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
    wanted = text(by_modules(converted()), prompt(), 1)
    torch.testing.assert_close(found.logits[0], wanted.logits[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "call, reason",
    [
        ({}, "no cache"),
        ({"past_key_values": "static"}, "DynamicCache"),
        ({"past_key_values": "plain", "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}, "mask"),
        ({"past_key_values": "plain", "position_ids": torch.tensor([[3]])}, "position"),
        ({"past_key_values": "plain", "output_hidden_states": True}, "output_hidden_states"),
    ],
)
@torch.no_grad()
def test_any_other_call_takes_the_modules(call, reason):
    model = converted()
    plain = by_modules(model)
    found = []
    for net in (model, plain):
        options = dict(call)
        if "past_key_values" in options:
            kind = options["past_key_values"]
            static = kind == "static"
            cache = transformers.StaticCache(config=model.config, max_cache_len=16) if static else None
            options["past_key_values"] = net.model(prompt(), past_key_values=cache, use_cache=True).past_key_values
        found.append(net(prompt(1), **options).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert reason in str(compiled_steps(model)[0].why_modules)


def test_gradients_and_sliding_windows_take_the_modules():
    model = converted()
    past = model.model(prompt(), use_cache=True).past_key_values
    model(prompt(1), past_key_values=past).logits.sum().backward()
    assert "gradients" in str(compiled_steps(model)[0].why_modules)
    narrow = converted("Mistral", sliding_window=8)
    near(text(narrow, prompt(), 20), text(by_modules(narrow), prompt(), 20))
    assert compiled_steps(narrow)[0].why_modules is not None


def test_a_network_that_is_selective_in_part_says_why_it_runs_by_modules():
    model = dense()
    convert_(model, Threshold(0.02), "mlp")
    near(text(model, prompt(), 5), text(by_modules(model), prompt(), 5))
    assert "q_proj is not a SelectiveLinear" in str(sp.explain(model))


def test_beams_batches_and_sampling_work():
    model = converted()
    plain = by_modules(model)
    for options in ({"num_beams": 3}, {"do_sample": True, "top_p": 0.9}):
        results = []
        for net in (model, plain):
            torch.manual_seed(3)
            results.append(net.generate(prompt(), max_new_tokens=12, **options))
        assert torch.equal(*results)
    both = [net.generate(prompt(5, 2), max_new_tokens=8, do_sample=False) for net in (model, plain)]
    assert torch.equal(*both)


def test_copies_have_their_own_steps_and_restore_takes_them_away():
    model = converted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (steps,) = compiled_steps(twin)
        assert steps.stack is twin.model and steps.stack is not model.model
        with torch.no_grad():
            twin.model.layers[0].self_attn.o_proj.weight.zero_()
        assert not torch.equal(text(twin, prompt(), 6).logits[-1], text(model, prompt(), 6).logits[-1])
    restore_(model)
    assert not compiled_steps(model) and "forward" not in model.model.__dict__
    near(text(model, prompt(), 5), text(dense(), prompt(), 5))


def test_a_forward_of_the_users_own_stays():
    model = dense()
    model.model.forward = own = model.model.forward
    convert_(model, PARTS)
    assert model.model.forward is own and not compiled_steps(model)


def test_other_networks_get_no_steps():
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    convert_(net, Threshold(0.1), "mlp")
    assert not compiled_steps(net) and sp.explain(net).decoding is None
    assert not isinstance(net.__dict__.get("forward"), CompiledSteps)
