"""Sums of one row from each table against float64, with gradients of the rows that were named and no others."""

from __future__ import annotations

import pytest
import torch

from sparingly.energy import count
from sparingly.ops import fallbacks, table_sums
from sparingly.ops.table_sums import OP
from sparingly.ops.table_sums.cpu import BLOCK
from sparingly.ops.table_sums.reference import reference

TABLES, SIZE, D, GROUPS = 6, 9, 5, 3


def work(tokens: int = 7, dtype: torch.dtype = torch.float32):
    torch.manual_seed(1)
    factors, rows = torch.rand(tokens, GROUPS), torch.randn(TABLES * SIZE, D)
    ids = torch.randint(0, SIZE, (tokens, TABLES)) + torch.arange(TABLES) * SIZE
    return factors.to(dtype), rows.to(dtype), ids.masked_fill(torch.rand(tokens, TABLES) < 0.3, -1)


def expected(factors, rows, ids):
    terms = torch.where((ids >= 0)[..., None], rows.double()[ids.clamp_min(0)], 0.0)
    return (terms.view(ids.shape[0], GROUPS, TABLES // GROUPS, D).sum(2) * factors.double()[..., None]).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 7, 2 * BLOCK + 3])
def test_the_sums(poisoned, tokens, dtype):
    given = work(tokens, dtype)
    for found in (table_sums(*given), reference(*given)):
        assert found.dtype == torch.float32 and found.shape == (tokens, GROUPS * D)
        torch.testing.assert_close(found.double(), expected(*given), rtol=1e-6, atol=1e-5)
    assert not fallbacks()


def test_two_threads_give_the_same(two_threads):
    factors, rows, ids = work(400)
    rows.requires_grad_()
    out = table_sums(factors, rows, ids, sparse_grad=True)
    torch.testing.assert_close(out.double(), expected(factors, rows, ids), rtol=1e-6, atol=1e-5)
    out.sum().backward()
    assert rows.grad is not None
    twin = rows.detach().double().requires_grad_()
    expected(factors, twin, ids).sum().backward()
    torch.testing.assert_close(rows.grad.to_dense().double(), twin.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparse", [True, False])
def test_gradients(sparse):
    factors, rows, ids = work(BLOCK + 5)
    weights, twin = torch.randn(BLOCK + 5, GROUPS * D), rows.double().requires_grad_()
    (expected(factors, twin, ids) * weights.double()).sum().backward()
    rows.requires_grad_()
    (table_sums(factors, rows, ids, sparse_grad=sparse) * weights).sum().backward()
    assert rows.grad is not None and rows.grad.is_sparse == sparse
    torch.testing.assert_close(rows.grad.to_dense().double(), twin.grad, rtol=1e-5, atol=1e-5)
    if sparse:
        named = ids[ids >= 0].unique()
        assert torch.equal(rows.grad._indices()[0], named)


def test_the_operator_is_one_of_pytorchs():
    factors, rows, ids = work()
    torch.library.opcheck(OP.definition, (factors, rows.requires_grad_(), ids, False))
    exact = rows.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda one: table_sums(factors.double(), one, ids), (exact,))


def test_count():
    factors, rows, ids = work()
    visited = int((ids >= 0).sum())
    with count() as ledger:
        table_sums(factors, rows, ids)
    ((_, work_done),) = ledger.entries.items()
    assert work_done.macs == visited * D
    assert work_done.bytes_read == visited * D * 4 + factors.nbytes + ids.nbytes
    assert work_done.bytes_written == 7 * GROUPS * D * 4


def test_a_row_of_another_table_is_named():
    factors, rows, ids = work()
    for wrong in (0, 2 * SIZE, TABLES * SIZE, -2):
        ids[4, 1] = wrong
        for run in (table_sums, reference):
            with pytest.raises(IndexError, match=rf"ids\[4, 1\] must be -1 or in 9\.\.17, .* got {wrong}"):
                run(factors, rows, ids)


def test_bad_arguments():
    factors, rows, ids = work()
    with pytest.raises(ValueError, match="6 must divide the 53 rows"):
        table_sums(factors, rows[:-1], ids)
    with pytest.raises(ValueError, match="4 groups of factors must divide the 6 places"):
        table_sums(torch.rand(7, 4), rows, ids)
    with pytest.raises(NotImplementedError, match="gather_accumulate"):
        table_sums(factors.requires_grad_(), rows, ids).sum().backward()
