"""Products of groups of rows on the ledger."""

from __future__ import annotations

import pytest
import torch

from sparingly import energy


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this PyTorch has no grouped product")
def test_groups_without_rows_read_no_matrix():
    x, matrices = torch.randn(5, 16), torch.randn(4, 16, 8)
    ends = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    with energy.count() as counted:
        torch.nn.functional.grouped_mm(x, matrices, offs=ends)
    assert counted.macs == 5 * 16 * 8 and counted.coverage == 1
    assert counted.bytes_read == 4 * (5 * 16 + 2 * 16 * 8 + 4) and counted.bytes_written == 4 * 5 * 8
