"""Exits in encoders with an attention mask: what goes past an exit is cut to those that are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sparingly as sp
from sparingly.nn._exit_batch import pooled

CLASSES = 3
SMALL = {"vocab_size": 40, "max_position_embeddings": 24, "num_labels": CLASSES, "initializer_range": 0.3}
BERT = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 32}
KINDS: dict[str, tuple[str, dict[str, int]]] = {
    "bert": ("bert.encoder.layer", BERT),
    "roberta": ("roberta.encoder.layer", BERT),
    "electra": ("electra.encoder.layer", BERT),
    "distilbert": ("distilbert.transformer.layer", {"dim": 16, "n_heads": 2, "n_layers": 4, "hidden_dim": 32}),
}


def sentences(n: int = 12, tokens: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of 2 to ``tokens`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, tokens + 1, (n, 1), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths).long()
    return {"input_ids": torch.randint(1, 40, (n, tokens), generator=generator) * mask, "attention_mask": mask}


def with_exits(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    layers, sizes = KINDS[kind]
    config = transformers.AutoConfig.for_model(kind, **SMALL, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        model = sp.add_exits_(net, at=[f"{layers}.0", f"{layers}.2"])
        sp.train_exits(model, [sentences(), sentences(seed=1)], lr=1e-2)
    return model


def rows_of(module: nn.Module) -> list[int]:
    """Grows by the number of examples at each call of the layer."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_later_layers_see_the_rest_and_its_mask(kind):
    model, x = with_exits(kind), sentences(60, seed=2)
    first, second, last = model.stage_answers(x)
    torch.testing.assert_close(last, model.net(**x).logits.softmax(1))
    model.thresholds.copy_(torch.tensor([first.amax(1).median(), second.amax(1).quantile(0.8)], dtype=torch.float64))
    rows = [rows_of(layer) for layer in model.net.get_submodule(KINDS[kind][0])]
    found = model(x)
    gone = [int((model.exits == place).sum()) for place in range(3)]
    assert all(gone) and rows == [[60], [60 - gone[0]], [60 - gone[0]], [gone[2]]]
    expected = torch.stack([first, second, last])[model.exits, torch.arange(60)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # The network by itself is as it was.
    torch.testing.assert_close(model.net(**x).logits.softmax(1), last)


def test_padding_changes_no_exit():
    model, x = with_exits("bert"), sentences(seed=3)
    longer = {name: nn.functional.pad(value, (0, 6)) for name, value in x.items()}
    for padded, plain in zip(model.stage_answers(longer), model.stage_answers(x), strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)


def test_mean_of_real_tokens():
    hidden, mask = torch.tensor([[[2.0], [4.0]], [[2.0], [4.0]]]), torch.tensor([[1, 1], [1, 0]])
    assert pooled(hidden, mask).tolist() == [[3.0], [2.0]] and pooled(hidden).tolist() == [[3.0], [3.0]]


class Gated(nn.Module):
    """A layer that takes a gate with an entry for each example as well."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, gates: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.linear(x) * gates[0]


class TwoGated(nn.Module):
    """``late``: the gate of the second layer is made anew, past the exit."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.a, self.b, self.flat, self.out = Gated(), Gated(), nn.Identity(), nn.Linear(4, CLASSES)
        self.late = late

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        hidden = self.b(self.a(x, (gate,)), (gate + 1 if self.late else gate,))
        # As long as the batch was at first, where a quarter is left.
        return self.out(self.flat(hidden.reshape(-1, 1)).view(-1, 4))


def test_tensors_are_known_by_what_they_are_and_not_by_their_length():
    x = {"x": torch.randn(8, 4), "gate": torch.rand(8, 1)}
    model = sp.add_exits_(TwoGated(late=False), at=["a"])
    sp.train_exits(model, [x])
    sure = model.sure(model.stage_answers(x)[0], 0)
    model.thresholds.fill_(float(sure.sort().values[2]))
    found = model(x)
    assert int((model.exits == 1).sum()) == 2
    stayed = model.exits == 1
    torch.testing.assert_close(found[stayed], model.net(**x).softmax(1)[stayed])
    with pytest.raises(ValueError, match="nothing can leave at 'a'"):
        sp.train_exits(sp.add_exits_(TwoGated(late=True), at=["a"]), [x])
