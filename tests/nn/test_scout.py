"""Scouts learn what a large network answers, whatever its inputs are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparingly as sp
from sparingly.nn.scout import scout_for

CLASSES = 3


def large(x: torch.Tensor) -> np.ndarray:
    """Knows by which of the first three features is largest."""
    return (4 * x.flatten(1)[:, :CLASSES].double()).softmax(1).numpy()


def agreement(scout: nn.Module, x: torch.Tensor) -> float:
    return float((scout(x).argmax(1) == torch.from_numpy(large(x)).argmax(1)).float().mean())


@pytest.mark.parametrize("shape", [(12,), (1, 9, 9)])
def test_a_scout_learns_from_answers_alone(shape):
    torch.manual_seed(0)
    x = torch.randn(2000, *shape)
    scout = sp.distill_scout(large, x.split(100), epochs=12, lr=1e-2)
    assert not scout.training and agreement(scout, torch.randn(500, *shape)) > (0.9 if len(shape) == 1 else 0.5)
    cascade: Any = sp.Cascade([scout, large])
    y = torch.from_numpy(large(x)).argmax(1)
    contract = sp.calibrate(cascade, (x, y), "accuracy", max_drop=0.1)
    assert contract.holds


def test_a_scout_of_tokens():
    torch.manual_seed(0)
    ids = torch.randint(0, 50_000, (600, 8))
    ids[:, 0] = torch.arange(600) % CLASSES

    def knows(x: torch.Tensor) -> torch.Tensor:
        return torch.eye(CLASSES)[x[:, 0]]

    scout = sp.distill_scout(knows, ids.split(50), epochs=20, lr=2e-2)
    assert float((scout(ids).argmax(1) == ids[:, 0]).float().mean()) > 0.9


def test_ones_own_scout_is_trained_in_place_and_the_network_stays():
    net: Any = nn.Sequential(nn.Linear(5, CLASSES), nn.Dropout(0.5))
    scout = nn.Linear(5, CLASSES)
    before, weight = net[0].weight.clone(), scout.weight.clone()
    assert sp.distill_scout(net, [(torch.randn(20, 5), torch.zeros(20))], scout) is scout
    assert torch.equal(net[0].weight, before) and net.training and net[0].weight.grad is None
    assert not torch.equal(scout.weight, weight)


def test_progress_is_told():
    told = []
    sp.distill_scout(
        large, torch.randn(40, 6).split(10), epochs=2, progress=lambda what, share: told.append((what, share))
    )
    assert len(told) == 4 + 8 and all(0 <= share < 1 for _, share in told)


def test_what_is_refused():
    x = torch.randn(20, 5)
    cases: Any = (
        ([], {}, "at least 1 batch"),
        ([x], {"epochs": 0}, "at least 1 batch and 1 epoch, got 1 and 0"),
        ([x], {"scout": nn.Linear(5, 7)}, r"logits \[20, 3\], got \[20, 7\]"),
        ([x * float("nan")], {}, "must give probabilities"),
    )
    for batches, options, match in cases:
        with pytest.raises(ValueError, match=match):
            sp.distill_scout(large, batches, **options)
    with pytest.raises(TypeError, match=r"give distill_scout a network: scout="):
        scout_for(["some", "texts"], CLASSES)
