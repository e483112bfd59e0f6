"""Shared by all tests: the same random numbers whatever the order they run in."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
