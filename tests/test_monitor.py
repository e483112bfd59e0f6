"""Drift: seen where inputs have changed, and not where they have not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import sparingly as sp


def calibrated() -> sp.Cascade:
    """Sure of inputs near 0 or 1; the second stage knows."""

    def scout(x: torch.Tensor) -> np.ndarray:
        return np.stack([1 - x.numpy(), x.numpy()], axis=1)

    def sage(x: torch.Tensor) -> np.ndarray:
        return np.eye(2)[(x.numpy() > 0.5).astype(int)]

    made: Any = sp.Cascade([scout, sage])
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wrong = torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.02
    sp.calibrate(made, [(x, ((x > 0.5) ^ wrong).long())], "accuracy", max_drop=0.05)
    made.thresholds.fill_(0.75)
    made.expected.copy_(torch.tensor([1500, 1500]))
    return made


def test_calibration_says_where_its_test_examples_left():
    made = sp.Cascade([lambda x: torch.eye(2)[[0] * len(x)], lambda x: torch.eye(2)[[0] * len(x)]])
    sp.calibrate(made, [(torch.zeros(800), torch.zeros(800, dtype=torch.int64))], "accuracy", max_drop=0.05)
    assert made.expected.tolist() == [600, 0] and made.left.tolist() == [0, 0]


def test_the_same_inputs_are_no_drift_and_others_are():
    generator, alarms = torch.Generator().manual_seed(2), 0
    made = calibrated()
    for _ in range(100):
        made.reset_counts()
        made(torch.rand(2000, generator=generator, dtype=torch.float64))
        drift = sp.monitor(made)
        assert drift.n == 2000 and sum(drift.live) == pytest.approx(1)
        alarms += drift.drifted
    assert alarms <= 5
    made.reset_counts()
    made(0.3 + 0.4 * torch.rand(2000, generator=generator, dtype=torch.float64))
    drift = sp.monitor(made)
    assert drift.drifted and drift.distance > 0.4 and "calibrate again" in str(drift)
    assert json.loads(json.dumps(drift.as_dict()))["drifted"] is True


def test_a_small_change_of_many_inputs_is_none():
    made = calibrated()
    made.expected.copy_(torch.tensor([500_000, 500_000]))
    made.left.copy_(torch.tensor([505_000, 495_000]))
    drift = sp.monitor(made)
    assert drift.p_value < 1e-6 and not drift.drifted
    assert sp.monitor(made, distance=0.004).drifted
    made.expected.copy_(torch.tensor([10, 0]))
    made.left.copy_(torch.tensor([3, 0]))
    assert sp.monitor(made).p_value == 1.0


def test_what_cannot_be_monitored():
    with pytest.raises(ValueError, match="not calibrated"):
        sp.monitor(sp.Cascade([len, len]))
    with pytest.raises(ValueError, match="no inputs have come"):
        sp.monitor(calibrated())
    with pytest.raises(ValueError, match="distance must be between 0 and 1, got 2"):
        sp.monitor(calibrated(), distance=2)
