from __future__ import annotations

import pytest
import torch

from sparingly.ops import fallbacks, gather_accumulate
from sparingly.ops.gather_accumulate import OP, cpu
from sparingly.ops.gather_accumulate.reference import reference

ROWS = [torch.float32, torch.bfloat16, torch.int8]
# Sums of up to 40 float32 products; one wrong row changes a sum by about 1.
TOLERANCE = 2e-6


def answer(case):
    weights = case.weights.double() * case.valid
    return torch.einsum("tk,tkd->td", weights, case.wide[case.ids.clamp(min=0)])


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("shape", [{}, {"d": 1}, {"d": 64}, {"tokens": 1, "d": 300, "k": 40}])
def test_sums_equal_float64(make, error, poisoned, dtype, shape):
    case = make(dtype, **shape)
    sums = gather_accumulate(case.weights, case.rows, case.ids, case.scale)
    assert sums.dtype == torch.float32
    assert error(sums, answer(case)) < TOLERANCE
    assert error(reference(case.weights, case.rows, case.ids, case.scale), answer(case)) < TOLERANCE
    assert not fallbacks()


@pytest.mark.parametrize("dtype", ROWS)
def test_one_wrong_id_is_noticed(make, error, dtype):
    case = make(dtype)
    expected = answer(case)
    case.ids[1, 3] = (case.ids[1, 3] + 1) % case.rows.shape[0]
    assert error(gather_accumulate(case.weights, case.rows, case.ids, case.scale), expected) > 1000 * TOLERANCE


@pytest.mark.parametrize("shape", [{}, {"tokens": 1}])
def test_two_chunks_equal_one(make, two_threads, error, shape):
    case = make(**shape)
    assert error(gather_accumulate(case.weights, case.rows, case.ids), answer(case)) < TOLERANCE


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("shape", [{"tokens": 1, "k": 40}, {"tokens": 2, "k": 5}, {"tokens": 3, "k": 13}])
@pytest.mark.parametrize("dtype", ROWS)
def test_threads_share_the_rows_of_a_token(make, many_threads, error, poisoned, dtype, shape, threads):
    case = make(dtype, **shape)
    started = many_threads(cpu, threads)
    sums = gather_accumulate(case.weights, case.rows, case.ids, case.scale)
    assert sorted(started) == [(chunk, chunk + 1) for chunk in range(min(threads, case.ids.numel()))]
    assert error(sums, answer(case)) < TOLERANCE
    assert torch.equal(gather_accumulate(case.weights, case.rows, case.ids, case.scale), sums)


def test_tokens_that_have_only_pads_on_some_threads(make, many_threads, error, poisoned):
    case = make(tokens=2, k=24)
    case.ids[0, :20], case.ids[1] = -1, -1
    case.valid = case.ids >= 0
    many_threads(cpu, 4)
    sums = gather_accumulate(case.weights, case.rows, case.ids)
    assert error(sums, answer(case)) < TOLERANCE and (sums[1] == 0).all()


def test_pads_add_nothing(make):
    case = make()
    clean = gather_accumulate(case.weights, case.rows, case.ids)
    dirty = case.weights.masked_fill(~case.valid, float("nan"))
    assert torch.equal(gather_accumulate(dirty, case.rows, case.ids), clean)
    assert (gather_accumulate(dirty, case.rows, torch.full_like(case.ids, -1)) == 0).all()


@pytest.mark.parametrize("tokens, k", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do(make, tokens, k):
    rows = make().rows
    sums = gather_accumulate(torch.empty(tokens, k), rows, torch.empty(tokens, k, dtype=torch.int64))
    assert sums.shape == (tokens, rows.shape[1]) and (sums == 0).all()


@pytest.mark.parametrize("bad", [211, -2])
def test_id_out_of_range(make, bad):
    case = make()
    case.ids[2, 1] = bad
    with pytest.raises(IndexError, match=rf"0\.\.210.*got {bad}"):
        gather_accumulate(case.weights, case.rows, case.ids)


def test_bad_arguments(make):
    case = make()
    with pytest.raises(ValueError, match=r"\[5, 12\] and ids \[5, 13\]"):
        gather_accumulate(case.weights[:, :12], case.rows, case.ids)
    with pytest.raises(ValueError, match="scale goes with int8 rows only"):
        gather_accumulate(case.weights, case.rows, case.ids, case.bias)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_reach_active_rows_only(make, error, sparse):
    case = make()
    weights, rows = case.weights.requires_grad_(), case.rows.requires_grad_()
    pull = torch.randn(5, 67, generator=torch.Generator().manual_seed(1))
    gather_accumulate(weights, rows, case.ids, sparse_grad=sparse).backward(pull)
    wide_weights, wide_rows = (leaf.detach().double().requires_grad_() for leaf in (weights, rows))
    terms = (wide_weights * case.valid).unsqueeze(-1) * wide_rows[case.ids.clamp(min=0)]
    terms.sum(1).backward(pull.double())
    assert weights.grad is not None and rows.grad is not None
    assert wide_weights.grad is not None and wide_rows.grad is not None
    assert (weights.grad[~case.valid] == 0).all()
    assert error(weights.grad, wide_weights.grad) < TOLERANCE
    assert rows.grad.is_sparse == sparse
    untouched = torch.ones(rows.shape[0], dtype=torch.bool)
    untouched[case.ids[case.valid]] = False
    gradient = rows.grad.to_dense()
    assert (gradient[untouched] == 0).all()
    assert error(gradient, wide_rows.grad) < TOLERANCE


def test_opcheck_and_gradcheck(make):
    case = make(tokens=2, num_rows=7, d=3, k=4)
    leaves = [tensor.double().requires_grad_() for tensor in (case.weights, case.rows)]
    torch.library.opcheck(OP.definition, (*leaves, case.ids, None, False))
    torch.library.opcheck(OP.definition, (case.weights.requires_grad_(), case.rows, case.ids, None, False))
    assert torch.autograd.gradcheck(lambda weights, rows: gather_accumulate(weights, rows, case.ids), leaves)
    assert torch.autograd.gradgradcheck(lambda weights, rows: gather_accumulate(weights, rows, case.ids), leaves)
