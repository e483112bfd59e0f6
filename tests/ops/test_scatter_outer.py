from __future__ import annotations

import pytest
import torch

from sparingly.ops import fallbacks, scatter_outer
from sparingly.ops.scatter_outer import OP
from sparingly.ops.scatter_outer.reference import reference

TOLERANCE = 2e-6


def answer(case, num_slots):
    terms = (case.weights.double() * case.valid).unsqueeze(-1) * case.hidden.double().unsqueeze(1)
    sums = torch.zeros(num_slots, case.hidden.shape[1], dtype=torch.float64)
    return sums.index_add(0, case.ids.clamp(min=0).flatten(), terms.flatten(0, 1))


@pytest.mark.parametrize("num_slots", [211, 7])
@pytest.mark.parametrize("d", [1, 67])
def test_sums_equal_float64(make, error, poisoned, num_slots, d):
    case = make(num_rows=num_slots, d=d)
    sums = scatter_outer(case.weights, case.hidden, case.ids, num_slots)
    assert error(sums, answer(case, num_slots)) < TOLERANCE
    assert error(reference(case.weights, case.hidden, case.ids, num_slots), answer(case, num_slots)) < TOLERANCE
    assert not fallbacks()


def test_one_wrong_slot_is_noticed(make, error):
    case = make()
    expected = answer(case, 211)
    case.ids[1, 3] = (case.ids[1, 3] + 1) % 211
    assert error(scatter_outer(case.weights, case.hidden, case.ids, 211), expected) > 1000 * TOLERANCE


def test_two_chunks_equal_one(make, two_threads, error):
    case = make(num_rows=7)
    assert error(scatter_outer(case.weights, case.hidden, case.ids, 7), answer(case, 7)) < TOLERANCE


def test_pads_add_nothing(make):
    case = make()
    dirty = case.weights.masked_fill(~case.valid, float("nan"))
    assert torch.equal(
        scatter_outer(dirty, case.hidden, case.ids, 211), scatter_outer(case.weights, case.hidden, case.ids, 211)
    )


@pytest.mark.parametrize("bad", [211, -2])
def test_slot_out_of_range(make, bad):
    case = make()
    case.ids[2, 1] = bad
    with pytest.raises(IndexError, match=f"got {bad}"):
        scatter_outer(case.weights, case.hidden, case.ids, 211)


def test_bad_shapes(make):
    case = make()
    with pytest.raises(ValueError, match=r"vectors \[tokens, d\], got \[4, 67\]"):
        scatter_outer(case.weights, case.hidden[:4], case.ids, 211)


def test_opcheck_and_gradcheck(make):
    case = make(tokens=2, num_rows=7, d=3, k=4)
    leaves = [tensor.double().requires_grad_() for tensor in (case.weights, case.hidden)]
    torch.library.opcheck(OP.definition, (*leaves, case.ids, 7))
    torch.library.opcheck(OP.definition, (case.weights, case.hidden, case.ids, 7))
    assert torch.autograd.gradcheck(lambda weights, vectors: scatter_outer(weights, vectors, case.ids, 7), leaves)
