"""What the workload computes, on numbers and a tiny network; SmolLM2 itself is not needed."""

from __future__ import annotations

import math

import pytest
import torch

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
