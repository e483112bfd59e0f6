from __future__ import annotations

import pytest
import torch

from sparingly.ops import fallbacks, gather_dot
from sparingly.ops.gather_dot import OP
from sparingly.ops.gather_dot.reference import reference

ROWS = [torch.float32, torch.bfloat16, torch.int8]
# d = 67 sums of products of O(1) in float32: about sqrt(67) * 2**-24 of the largest; a wrong row gives about 1.
TOLERANCE = 2e-6


def answer(case, ids=None):
    ids = case.ids if ids is None else ids
    scores = torch.einsum("td,tkd->tk", case.hidden.double(), case.wide[ids.clamp(min=0)])
    scores = scores + case.bias.double()[ids.clamp(min=0)]
    return scores.masked_fill(ids < 0, -torch.inf)


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("shape", [{}, {"d": 1}, {"d": 64}, {"tokens": 1, "d": 300, "k": 40}])
def test_scores_equal_float64(make, error, poisoned, dtype, shape):
    case = make(dtype, **shape)
    scores = gather_dot(case.hidden, case.rows, case.ids, case.scale, case.bias)
    assert scores.dtype == torch.float32
    assert error(scores, answer(case)) < TOLERANCE
    assert not fallbacks()


@pytest.mark.parametrize("dtype", ROWS)
def test_one_wrong_id_is_noticed(make, error, dtype):
    case = make(dtype)
    wrong = case.ids.clone()
    wrong[1, 3] = (wrong[1, 3] + 1) % case.rows.shape[0]
    scores = gather_dot(case.hidden, case.rows, wrong, case.scale, case.bias)
    assert error(scores, answer(case)) > 1000 * TOLERANCE


@pytest.mark.parametrize("dtype", ROWS)
def test_two_chunks_equal_one(make, two_threads, dtype, error):
    case = make(dtype)
    assert error(gather_dot(case.hidden, case.rows, case.ids, case.scale, case.bias), answer(case)) < TOLERANCE


def test_bfloat16_hidden(make, error):
    case = make(torch.bfloat16)
    case.hidden = case.hidden.bfloat16()
    assert error(gather_dot(case.hidden, case.rows, case.ids, None, case.bias), answer(case)) < TOLERANCE


@pytest.mark.parametrize("dtype", ROWS)
def test_reference_and_kernel_agree(make, error, dtype):
    case = make(dtype)
    args = (case.hidden, case.rows, case.ids, case.scale, case.bias)
    assert error(gather_dot(*args), reference(*args)) < TOLERANCE


def test_only_selected_rows_are_read(make):
    case = make()
    clean = gather_dot(case.hidden, case.rows, case.ids)
    unused = torch.ones(case.rows.shape[0], dtype=torch.bool)
    unused[case.ids[case.valid]] = False
    case.rows[unused] = float("nan")
    assert torch.equal(gather_dot(case.hidden, case.rows, case.ids), clean)


@pytest.mark.parametrize("tokens, k", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do(make, tokens, k):
    case = make()
    ids = torch.empty(tokens, k, dtype=torch.int64)
    assert gather_dot(case.hidden[:tokens], case.rows, ids).shape == (tokens, k)


def test_only_pads(make):
    case = make()
    scores = gather_dot(case.hidden, case.rows, torch.full_like(case.ids, -1))
    assert (scores == -torch.inf).all()


@pytest.mark.parametrize("bad", [211, -2, 2**62, -(2**63)])
@pytest.mark.parametrize("float64", [False, True])
def test_id_out_of_range(make, bad, float64):
    case = make()
    case.ids[2, 1] = bad
    hidden, rows = (case.hidden.double(), case.rows.double()) if float64 else (case.hidden, case.rows)
    with pytest.raises(IndexError, match=rf"0\.\.210.*got {bad}"):
        gather_dot(hidden, rows, case.ids)


def test_bad_arguments(make):
    case = make()
    with pytest.raises(ValueError, match=r"tokens, 67\], got \[5, 66\]"):
        gather_dot(case.hidden[:, :66], case.rows, case.ids)
    with pytest.raises(TypeError, match="int64"):
        gather_dot(case.hidden, case.rows, case.ids.int())
    with pytest.raises(ValueError, match="tokens = 5"):
        gather_dot(case.hidden, case.rows, case.ids[:4])
    with pytest.raises(ValueError, match="scale goes with int8 rows only"):
        gather_dot(case.hidden, case.rows, case.ids, case.bias)
    with pytest.raises(ValueError, match=r"bias must be \[num_rows\] = \[211\], got \[210\]"):
        gather_dot(case.hidden, case.rows, case.ids, None, case.bias[:210])
    with pytest.raises(TypeError, match="float16"):
        gather_dot(case.hidden.half(), case.rows, case.ids)


def test_rows_that_are_not_contiguous_fall_back_and_say_so(make, error):
    case = make()
    scores = gather_dot(case.hidden, case.rows.t().contiguous().t(), case.ids, None, case.bias)
    assert error(scores, answer(case)) < TOLERANCE
    assert "not contiguous" in fallbacks()["gather_dot", "cpu"].reason


def test_strided_hidden_and_ids(make, error):
    case = make()
    hidden, ids = case.hidden.t().contiguous().t(), case.ids.t().contiguous().t()
    assert error(gather_dot(hidden, case.rows, ids, None, case.bias), answer(case)) < TOLERANCE


def test_memory_that_cannot_be_addressed_is_refused(make):
    case = make()
    with pytest.raises(RuntimeError, match="resolve_neg"):
        gather_dot(torch._neg_view(case.hidden), case.rows, case.ids)  # pyright: ignore[reportPrivateImportUsage]
    with pytest.raises(RuntimeError):
        gather_dot(case.hidden, case.rows.to_mkldnn(), case.ids)


def test_another_default_device_does_not_matter(make):
    case = make()
    expected = gather_dot(case.hidden, case.rows, case.ids)
    with torch.device("meta"):
        scores = gather_dot(case.hidden, case.rows, case.ids)
    assert torch.equal(scores, expected)


def test_nan_and_infinity_pass_through(make):
    case = make()
    case.hidden[1, 0] = float("nan")
    case.hidden[3, 0] = float("inf")
    scores = gather_dot(case.hidden, case.rows, case.ids)
    assert scores[1].isnan().all() and scores[3].isinf().all() and scores[0][case.valid[0]].isfinite().all()


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_reach_active_rows_only(make, error, sparse):
    case = make()
    pull = torch.randn(case.ids.shape, generator=torch.Generator().manual_seed(1))
    leaves = [case.hidden.requires_grad_(), case.rows.requires_grad_(), case.bias.requires_grad_()]
    gather_dot(case.hidden, case.rows, case.ids, None, case.bias, sparse_grad=sparse).backward(pull)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scores = (wide[0].unsqueeze(1) * wide[1][case.ids.clamp(min=0)]).sum(-1) + wide[2][case.ids.clamp(min=0)]
    scores.backward(pull.double() * case.valid)
    touched = case.ids[case.valid].unique()
    for leaf, expected in zip(leaves, wide, strict=True):
        assert leaf.grad is not None and expected.grad is not None
        gradient = leaf.grad
        if leaf is not case.hidden:
            assert gradient.is_sparse == sparse
            if sparse:
                assert torch.equal(gradient.coalesce().indices()[0], touched)
                gradient = gradient.to_dense()
            untouched = torch.ones(gradient.shape[0], dtype=torch.bool)
            untouched[touched] = False
            assert (gradient[untouched] == 0).all()
        assert error(gradient, expected.grad) < TOLERANCE


def test_nan_pulled_at_a_pad_goes_nowhere(make):
    case = make()
    pull = torch.ones(case.ids.shape).masked_fill(~case.valid, float("nan"))
    hidden, rows = case.hidden.requires_grad_(), case.rows.requires_grad_()
    gather_dot(hidden, rows, case.ids, sparse_grad=True).backward(pull)
    assert hidden.grad is not None and rows.grad is not None
    assert hidden.grad.isfinite().all() and rows.grad.to_dense().isfinite().all()


def test_bfloat16_rows_have_bfloat16_gradients(make):
    case = make(torch.bfloat16)
    rows = case.rows.requires_grad_()
    gather_dot(case.hidden, rows, case.ids, sparse_grad=True)[case.valid].sum().backward()
    assert rows.grad is not None and rows.grad.is_sparse and rows.grad.dtype == torch.bfloat16


def test_scale_has_no_gradient(make):
    case = make(torch.int8)
    with pytest.raises(NotImplementedError, match="inference"):
        gather_dot(case.hidden, case.rows, case.ids, case.scale.requires_grad_())[case.valid].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(make, dtype):
    case = make(tokens=2, num_rows=7, d=3, k=4)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (case.hidden, case.rows)]
    torch.library.opcheck(OP.definition, (*leaves, case.ids, None, case.bias, False))
    case = make(torch.int8, tokens=2, num_rows=7, d=3, k=4)
    torch.library.opcheck(OP.definition, (case.hidden, case.rows, case.ids, case.scale, None, False))


def test_gradcheck(make):
    case = make(tokens=2, num_rows=7, d=3, k=4)
    leaves = [tensor.double().requires_grad_() for tensor in (case.hidden, case.rows, case.bias)]

    def scores(hidden, rows, bias):
        return gather_dot(hidden, rows, case.ids, None, bias).masked_fill(~case.valid, 0.0)

    assert torch.autograd.gradcheck(scores, leaves)
    assert torch.autograd.gradgradcheck(scores, leaves)


def test_export_sees_through(make):
    class Head(torch.nn.Module):
        def forward(self, hidden, rows, ids):
            return gather_dot(hidden, rows, ids)

    case = make()
    program = torch.export.export(Head(), (case.hidden, case.rows, case.ids))
    assert any("sparingly.gather_dot" in str(node.target) for node in program.graph.nodes)
    scores = program.module()(case.hidden, case.rows, case.ids)
    assert torch.equal(scores, gather_dot(case.hidden, case.rows, case.ids))
