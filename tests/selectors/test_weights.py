"""Selectors that read weights when they are fitted know these weights again, and no others."""

from __future__ import annotations

import pytest
import torch

from sparingly.selectors import LowRank, Screen

UNITS, WIDTH = 300, 48


def fitted(kind, bank, bias):
    selector = Screen(8, 20) if kind == "Screen" else LowRank(4)
    selector.fit(bank, bias, torch.randn(200, WIDTH))
    return selector


@pytest.fixture(params=["Screen", "LowRank"])
def world(request):
    bank, bias = torch.randn(UNITS, WIDTH) * 0.04, torch.randn(UNITS) * 0.1
    return fitted(request.param, bank, bias), bank, bias


def test_the_same_values_are_known_wherever_they_lie(world):
    selector, bank, bias = world
    assert selector.holds_for(bank, bias)
    assert selector.holds_for(bank.t().contiguous().t(), bias.clone()) and selector.holds_for(bank.double(), bias)
    other = type(selector).from_config(selector.config())
    assert not other.holds_for(bank, bias)
    other.load_state_dict(selector.state_dict())
    assert other.holds_for(bank, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_them_is_known_too(world, dtype):
    selector, bank, bias = world
    cast = bank.to(dtype), bias.to(dtype)
    assert selector.to(dtype).holds_for(*cast) and selector.float().holds_for(cast[0].float(), cast[1].float())
    again = fitted(type(selector).__name__, *cast)
    assert again.holds_for(*cast) and again.float().holds_for(cast[0].float(), cast[1].float())
    assert not again.holds_for(cast[0] * 1.01, cast[1])


def test_a_step_of_training_and_a_single_row_are_other_weights(world):
    selector, bank, bias = world
    for change in ("step", "row", "element", "bias", "order", "nan", "size"):
        rows, offsets = bank.clone(), bias.clone()
        if change == "step":
            rows += 1e-5 * torch.randn_like(rows).sign()
        elif change == "row":
            rows[UNITS - 1] *= 1.01
        elif change == "element":
            rows[7, 5] += 0.001
        elif change == "bias":
            offsets[3] += 0.001
        elif change == "order":
            rows = rows.flip(1)
        elif change == "nan":
            rows[1, 1] = float("nan")
        else:
            rows, offsets = rows[:-1], offsets[:-1]
        assert not selector.holds_for(rows, offsets), change
    assert not selector.holds_for(bank, None)
