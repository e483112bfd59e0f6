"""Selective layers inside transformers' Trainer, and their optimiser inside accelerate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sparingly as sp

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 2)
        self.ffn = sp.SelectiveFFN(12, 144, selector=sp.ProductKey(heads=2, k=4, key_dim=6))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.first(inputs)
        scores = self.last(hidden + self.ffn(hidden))
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def data() -> list[dict[str, torch.Tensor]]:
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return [{"inputs": one, "labels": (one[0] * one[1] > 0).long()} for one in inputs]


def test_trainer(tmp_path):
    model = Network()
    before = model.ffn.up.detach().clone()
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        save_strategy="steps",
        save_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    optimizer = sp.optimizer(model, lr=0.02)
    trainer = transformers.Trainer(model, arguments, train_dataset=data(), optimizers=(optimizer, None))
    first = trainer.evaluate(data())["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data())["eval_loss"] < 0.9 * first
    moved = (model.ffn.up != before).any(dim=1)
    assert torch.equal(moved, model.ffn.used) and 0 < int(moved.sum()) < 144

    again: Any = Network()
    optimizers = (sp.optimizer(again, lr=0.02), None)
    fresh = transformers.Trainer(again, arguments, train_dataset=data(), optimizers=optimizers)
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_accelerate():
    tool = accelerate.Accelerator(cpu=True)
    model = Network()
    model, optimizer = tool.prepare(model, sp.optimizer(model, lr=0.02))
    batch = torch.utils.data.default_collate(data())
    losses = []
    for _ in range(10):
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        tool.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
