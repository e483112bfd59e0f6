"""Decoding loops give what transformers gives, dense and with modules of another kind in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparingly.energy import count
from sparingly.workloads._decoders import Decoder
from sparingly.workloads._decoding import Transformers, costs, greedy

transformers = pytest.importorskip("transformers")


def network(family: str = "Llama", **options: Any) -> Any:
    """A tiny random network with grouped heads and weights large enough that every part of it shows."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 120}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, initializer_range=0.3, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


def ids(tokens: int = 20) -> Tensor:
    return torch.randint(0, 120, (tokens,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def expected(model: Any, prompt: Tensor) -> Tensor:
    return model.double()(prompt.unsqueeze(0)).logits[0].float()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def stepwise(engine: Any, prompt: Tensor, read: int) -> Tensor:
    """Logits after each token from number ``read`` on, one token at a time."""
    return torch.stack([engine.prepare(prompt[:read]), *(engine.step(int(token)) for token in prompt[read:])])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
    ],
)
def test_equal_to_transformers(family: str, options: dict[str, Any]):
    model = network(family, **options)
    decoder = Decoder(model, max_tokens=32)
    wanted = expected(model, ids())
    assert error(decoder.logits(ids()), wanted) < 1e-5
    for read in (1, 7):
        assert error(stepwise(decoder, ids(), read), wanted[read - 1 :]) < 1e-5


def test_under_a_ledger_the_answer_is_the_same_and_every_weight_is_counted():
    model = network()
    decoder = Decoder(model)
    plain = stepwise(decoder, ids(), 19)[1]
    decoder.prepare(ids()[:19])
    with count() as ledger:
        counted = decoder.step(int(ids()[19]))
    assert error(counted, plain) < 1e-5
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    assert weights <= ledger.macs <= 1.2 * weights
    assert ledger.bytes >= 4 * weights


@pytest.mark.parametrize(("precision", "most"), [("bf16", 0.05), ("int8", 0.2)])
def test_lower_precisions_are_near(precision: str, most: float):
    model = network()
    found = stepwise(Decoder(model, precision), ids(), 7)
    assert 1e-6 < error(found, expected(model, ids())[6:]) < most


class Doubled(nn.Module):
    """Stands for a selective module; counts its tokens."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.selector, self.tokens = inner, "any", 0

    def forward(self, x: Tensor) -> Tensor:
        self.tokens += x.numel() // x.shape[-1]
        return 2 * self.inner(x)


@pytest.mark.parametrize("place", ["q_proj", "o_proj", "mlp", "down_proj", "lm_head"])
def test_modules_of_another_kind_are_called_as_they_stand(place: str):
    model = network()
    dense = expected(network(), ids())
    doubled = []
    for parent in list(model.modules()):
        child = getattr(parent, place, None)
        if isinstance(child, nn.Module) and not isinstance(parent, Doubled):
            doubled.append(Doubled(child))
            setattr(parent, place, doubled[-1])
    decoder = Decoder(model)
    found = stepwise(decoder, ids(), 7)
    assert {module.tokens for module in doubled} == {14 if place == "lm_head" else 20}
    assert error(found, expected(model, ids())[6:]) < 1e-5
    assert error(found, dense[6:]) > 1e-3


def test_a_prompt_forgets_the_one_before():
    decoder = Decoder(network())
    first = stepwise(decoder, ids(), 5)
    stepwise(decoder, ids().flip(0), 9)
    assert torch.equal(stepwise(decoder, ids(), 5), first)


def test_bad_input_is_refused():
    model = network()
    with pytest.raises(ValueError, match="precision must be one of"):
        Decoder(model, "fp8")
    with pytest.raises(ValueError, match="LlamaDecoderLayer"):
        Decoder(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="sliding window"):
        Decoder(network("Mistral", sliding_window=8))
    decoder = Decoder(model, max_tokens=4)
    with pytest.raises(ValueError, match="max_tokens"):
        decoder.prepare(ids(5))
    with pytest.raises(ValueError, match="at least one token"):
        decoder.prepare(ids(0))
    decoder.prepare(ids(4))
    with pytest.raises(ValueError, match="max_tokens"):
        decoder.step(3)


@pytest.mark.parametrize("tuned", [False, True])
def test_transformers_engine_and_greedy(tuned: bool):
    model = network()
    before = {name: value.stride() for name, value in model.state_dict().items()}
    engine = Transformers(model, tuned=tuned)
    assert {name: value.stride() for name, value in model.state_dict().items()} == before
    answer = model.generate(ids()[None], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert greedy(engine, ids(), 6) == answer[0, 20:].tolist() == greedy(Decoder(model), ids(), 6)
    assert error(stepwise(engine, ids(), 7), expected(model, ids())[6:]) < 1e-5


def test_costs_name_every_engine():
    engines = [Decoder(network()), Transformers(network(), "bf16")]
    found = costs(engines, [ids(4), ids(6)], tokens=3, rounds=2)
    assert [cost.engine for cost in found] == engines
    assert all(0 < cost.lo <= cost.cpu_s <= cost.hi and cost.prefill_cpu_s > 0 for cost in found)
    with pytest.raises(ValueError, match="needs prompts"):
        costs(engines, [])
