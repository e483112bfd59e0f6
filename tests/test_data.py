"""Data: what their hash sees."""

import pytest
import torch

from sparingly._data import data_hash


def test_the_hash_sees_values_shape_dtype_and_nesting():
    base = torch.arange(6, dtype=torch.int64)
    different = [
        base,
        base + 1,
        base.view(2, 3),
        base.to(torch.int32),
        base.view(torch.float64),
        [base],
        (base, base),
        [[base], base],
        {"a": base},
        {"b": base},
        {"a": base, "b": None},
        [base, "x"],
        [base, 1],
        [base, 1.0],
        [base, True],
        torch.zeros(0),
        torch.zeros(0, 3),
        torch.tensor(1.0, dtype=torch.bfloat16),
    ]
    hashes = [data_hash(data) for data in different]
    assert len(set(hashes)) == len(different)
    assert all(len(one) == 64 for one in hashes)
    assert data_hash({"a": base, "b": 1}) == data_hash({"b": 1, "a": base.clone()})
    assert data_hash((base,)) == data_hash([base.numpy()])
    assert data_hash(base.view(2, 3).t().contiguous()) == data_hash(base.view(2, 3).t())
    # Frozen: a contract that was saved must still be found by its data.
    assert data_hash([base]) == "a8730cca0454587334ad87276fe4d00338489d9f31963dadb9861c409a8dd09b"


def test_what_cannot_be_hashed_is_refused():
    with pytest.raises(TypeError, match="got generator; make a list"):
        data_hash(value for value in (1, 2))
