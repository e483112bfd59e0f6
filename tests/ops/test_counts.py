"""What operators put on the ledger, against counts made by hand."""

from __future__ import annotations

import pytest
import torch

from sparingly.energy.ledger import count
from sparingly.ops import gather_accumulate, gather_dot, row_adamw_, scatter_outer, topk_rows

# 2 tokens with 3 places each; 4 of the 6 name a row. Rows are 10 wide, hidden states float32.
IDS = torch.tensor([[5, -1, 7], [7, 2, -1]])
VISITED, D = 4, 10
SIZE = {torch.float32: 4, torch.bfloat16: 2, torch.int8: 1}


def entry(ledger, op):
    found = [value for (name, _), value in ledger.entries.items() if name == f"sparingly::{op}"]
    assert len(found) == 1 and found[0].calls == 1
    assert not ledger.unknown
    return found[0]


@pytest.fixture(params=SIZE, ids=str)
def rows(request):
    return torch.randint(-5, 5, (9, D)).to(request.param)


def test_gather_dot(rows):
    scale = torch.ones(9) if rows.dtype == torch.int8 else None
    vectors = 4 * VISITED * (2 if scale is not None else 1)
    with count() as ledger:
        gather_dot(torch.randn(2, D), rows, IDS, scale, torch.randn(9))
    work = entry(ledger, "gather_dot")
    assert work.macs == 4 * 10
    assert work.bytes_read == 4 * 10 * SIZE[rows.dtype] + vectors + 2 * 10 * 4 + 6 * 8
    assert work.bytes_written == 6 * 4
    assert {dtype for op, dtype in ledger.entries if op.startswith("sparingly")} == {str(rows.dtype)[6:]}


def test_gather_accumulate(rows):
    with count() as ledger:
        gather_accumulate(torch.randn(2, 3), rows, IDS)
    work = entry(ledger, "gather_accumulate")
    assert work.macs == 4 * 10
    assert work.bytes_read == 4 * 10 * SIZE[rows.dtype] + 6 * 4 + 6 * 8
    assert work.bytes_written == 2 * 10 * 4


def test_topk_rows(rows):
    with count() as ledger:
        topk_rows(torch.randn(2, D), rows, IDS, 5)
    work = entry(ledger, "topk_rows")
    assert (work.macs, work.other) == (4 * 10, 4)
    assert work.bytes_read == 4 * 10 * SIZE[rows.dtype] + 2 * 10 * 4 + 6 * 8
    assert work.bytes_written == 2 * 5 * (4 + 8)


def test_scatter_outer():
    with count() as ledger:
        scatter_outer(torch.randn(2, 3), torch.randn(2, D), IDS, 9)
    work = entry(ledger, "scatter_outer")
    assert work.macs == 4 * 10
    assert work.bytes_read == 4 * 10 * 4 + 6 * 4 + 2 * 10 * 4 + 6 * 8
    assert work.bytes_written == 4 * 10 * 4 + 9 * 10 * 4


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_row_adamw(dtype, size):
    state = (torch.randn(9, D).to(dtype), torch.zeros(9, D), torch.zeros(9, D), torch.zeros(9, dtype=torch.int32))
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    with count() as ledger:
        row_adamw_(*state, torch.tensor([1, 4, 8]), torch.randn(3, D), **options)
    work = entry(ledger, "row_adamw_")
    moved = 3 * (10 * (size + 4 + 4) + 4)
    assert work.bytes_read == moved + 3 * 8 + 2 * 3 * 10 * 4
    assert work.bytes_written == moved


def test_more_pads_and_more_rows_cost_nothing():
    with count() as small:
        gather_dot(torch.ones(2, D), torch.ones(9, D), IDS)
    padded = torch.cat([IDS, torch.full((2, 50), -1)], dim=1)
    with count() as large:
        gather_dot(torch.ones(2, D), torch.ones(9000, D), padded)
    assert entry(large, "gather_dot").macs == entry(small, "gather_dot").macs
    extra = entry(large, "gather_dot").bytes_read - entry(small, "gather_dot").bytes_read
    assert extra == 2 * 50 * 8


def test_a_sparse_training_step_makes_no_pass_over_the_bank():
    """Bytes of forward and backward together do not depend on how many rows the bank has."""
    totals = []
    for num_rows in (9, 90_000):
        rows = torch.ones(num_rows, D, requires_grad=True)
        hidden = torch.ones(2, D, requires_grad=True)
        bias = torch.zeros(num_rows, requires_grad=True)
        with count() as ledger:
            scores = gather_dot(hidden, rows, IDS, None, bias, sparse_grad=True)
            scores.masked_fill(IDS < 0, 0.0).sum().backward()
        totals.append((ledger.macs, ledger.bytes))
        assert rows.grad is not None and rows.grad.is_sparse and rows.grad._nnz() == 3
    assert totals[0] == totals[1]
    assert totals[0][0] == 3 * VISITED * D + VISITED


def test_the_reference_counts_its_copies():
    hidden, rows = torch.ones(2, D).double(), torch.ones(9, D).double()
    with count() as ledger:
        gather_dot(hidden, rows, IDS)
    work = entry(ledger, "gather_dot")
    assert work.macs == 4 * 10
    copies = 2 * 4 * 10 * 8
    assert work.bytes_read == 4 * 10 * 8 + 2 * 10 * 8 + 6 * 8 + copies
    assert work.bytes_written == 6 * 8 + copies


def test_nothing_is_recorded_without_a_ledger():
    with count() as ledger:
        pass
    gather_dot(torch.ones(2, D), torch.ones(9, D), IDS)
    assert not ledger.entries
