"""Shared by all tests: whatever the order they run in, the same random numbers and no fallbacks of other tests."""

import pytest
import torch

from sparingly.ops import clear_fallbacks


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_old_fallbacks() -> None:
    clear_fallbacks()
