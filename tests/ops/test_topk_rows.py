from __future__ import annotations

import pytest
import torch

from sparingly.ops import fallbacks, gather_dot, topk_rows
from sparingly.ops.topk_rows import OP, cpu
from sparingly.ops.topk_rows.reference import reference

ROWS = [torch.float32, torch.bfloat16, torch.int8]
TOLERANCE = 2e-6


def answer(case, k):
    """(float64 scores, classes) of the best k, in order, by plain Python."""
    scores = torch.einsum("td,tkd->tk", case.hidden.double(), case.wide[case.ids.clamp(min=0)])
    scores = scores + case.bias.double()[case.ids.clamp(min=0)]
    best, classes = [], []
    for token in range(case.ids.shape[0]):
        places = [place for place in range(case.ids.shape[1]) if case.valid[token, place]]
        places.sort(key=lambda place, token=token: (-float(scores[token, place]), place))
        missing = max(0, k - len(places))
        best.append([float(scores[token, place]) for place in places[:k]] + [-torch.inf] * missing)
        classes.append([int(case.ids[token, place]) for place in places[:k]] + [-1] * missing)
    return torch.tensor(best, dtype=torch.float64), torch.tensor(classes)


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("k", [1, 2, 5, 13, 20])
@pytest.mark.parametrize("compute", [topk_rows, reference])
def test_best_equal_float64(make, error, poisoned, dtype, k, compute):
    case = make(dtype, k=13)
    scores, classes = compute(case.hidden, case.rows, case.ids, k, case.scale, case.bias)
    best, expected = answer(case, k)
    assert torch.equal(classes, expected)
    assert error(scores, best) < TOLERANCE
    assert not fallbacks()


def test_one_wrong_id_is_noticed(make, error):
    case = make()
    best, expected = answer(case, 3)
    place = int((case.ids[1] == expected[1, 0]).nonzero()[0])
    case.ids[1, place] = (case.ids[1, place] + 1) % case.rows.shape[0]
    scores, classes = topk_rows(case.hidden, case.rows, case.ids, 3, None, case.bias)
    assert error(scores, best) > 1000 * TOLERANCE and not torch.equal(classes, expected)


def test_two_chunks_equal_one(make, two_threads):
    case = make()
    assert torch.equal(topk_rows(case.hidden, case.rows, case.ids, 4, None, case.bias)[1], answer(case, 4)[1])


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("k", [1, 4, 60])
@pytest.mark.parametrize("shape", [{"tokens": 1, "k": 40}, {"tokens": 2, "k": 5}, {"tokens": 3, "k": 13}])
def test_threads_share_the_rows_of_a_token(make, many_threads, poisoned, shape, k, threads):
    case = make(torch.int8, **shape)
    args = (case.hidden, case.rows, case.ids, k, case.scale, case.bias)
    alone = topk_rows(*args)
    started = many_threads(cpu, threads)
    scores, classes = topk_rows(*args)
    assert sorted(started) == [(chunk, chunk + 1) for chunk in range(min(threads, case.ids.numel()))]
    assert torch.equal(scores, alone[0]) and torch.equal(classes, alone[1])
    assert torch.equal(classes, answer(case, k)[1])


@pytest.mark.parametrize("score", [0.0, float("nan"), -torch.inf])
def test_of_equal_scores_the_first_wins_across_threads(make, many_threads, score):
    case = make(tokens=1, k=40)
    bias = torch.full_like(case.bias, score)
    many_threads(cpu, 4)
    scores, classes = topk_rows(case.hidden, torch.zeros_like(case.rows), case.ids, 12, None, bias)
    assert classes[0].tolist() == case.ids[case.valid][:12].tolist()
    assert torch.equal(scores[0], bias[:12]) or scores.isnan().all()


@pytest.mark.parametrize("compute", [topk_rows, reference])
def test_of_equal_scores_the_first_wins(make, compute):
    case = make()
    case.rows[:] = case.rows[0]
    _, classes = compute(case.hidden, case.rows, case.ids, 4)
    for token in range(case.ids.shape[0]):
        assert classes[token].tolist() == case.ids[token][case.valid[token]][:4].tolist()


@pytest.mark.parametrize("compute", [topk_rows, reference])
def test_nan_is_not_hidden(make, compute):
    case = make()
    case.rows[case.ids[1, 2]] = float("nan")
    scores, classes = compute(case.hidden, case.rows, case.ids, 3)
    assert classes[1, 0] == case.ids[1, 2] and scores[1, 0].isnan() and not scores[1, 1:].isnan().any()


@pytest.mark.parametrize("compute", [topk_rows, reference])
def test_rows_of_minus_infinity_are_still_named(make, compute):
    case = make()
    bias = torch.full_like(case.bias, -torch.inf)
    scores, classes = compute(case.hidden, case.rows, case.ids, 13, None, bias)
    assert (scores == -torch.inf).all()
    for token in range(case.ids.shape[0]):
        named = case.ids[token][case.valid[token]].tolist()
        assert classes[token].tolist() == named + [-1] * (13 - len(named))


@pytest.mark.parametrize("tokens, m", [(0, 3), (3, 0)])
@pytest.mark.parametrize("compute", [topk_rows, reference])
def test_nothing_to_do(make, tokens, m, compute):
    case = make()
    scores, classes = compute(case.hidden[:tokens], case.rows, torch.empty(tokens, m, dtype=torch.int64), 2)
    assert scores.shape == (tokens, 2) and (scores == -torch.inf).all() and (classes == -1).all()


@pytest.mark.parametrize("bad", [211, -2])
def test_bad_arguments(make, bad):
    case = make()
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        topk_rows(case.hidden, case.rows, case.ids, 0)
    case.ids[2, 1] = bad
    with pytest.raises(IndexError, match=f"got {bad}"):
        topk_rows(case.hidden, case.rows, case.ids, 2)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_are_those_of_the_rows_returned(make, error, sparse):
    case = make()
    leaves = [case.hidden.requires_grad_(), case.rows.requires_grad_(), case.bias.requires_grad_()]
    pull = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    scores, classes = topk_rows(case.hidden, case.rows, case.ids, 3, None, case.bias, sparse_grad=sparse)
    assert not classes.requires_grad
    scores.backward(pull)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    gather_dot(wide[0], wide[1], classes, None, wide[2]).backward(pull.double())
    for leaf, expected in zip(leaves, wide, strict=True):
        assert leaf.grad is not None and expected.grad is not None
        assert error(leaf.grad.to_dense(), expected.grad) < TOLERANCE
    assert case.rows.grad is not None and case.rows.grad.is_sparse == sparse


def test_opcheck_and_gradcheck(make):
    case = make(tokens=2, num_rows=7, d=3, k=4)
    leaves = [tensor.double().requires_grad_() for tensor in (case.hidden, case.rows)]
    torch.library.opcheck(OP.definition, (*leaves, case.ids, 2, None, case.bias, False))
    torch.library.opcheck(OP.definition, (case.hidden, case.rows, case.ids, 6, None, None, False))
    assert torch.autograd.gradcheck(lambda hidden, rows: topk_rows(hidden, rows, case.ids, 2)[0], leaves)
