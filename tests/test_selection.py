"""Selection: shapes and dtypes are checked, and shared ids serve any number of tokens."""

import pytest
import torch

import sparingly as sp


def test_shared_ids_are_the_same_for_every_token():
    selection = sp.Selection(torch.tensor([4, 2]), 10)
    assert selection.shared and selection.k == 2
    assert selection.per_token(3).tolist() == [[4, 2]] * 3


def test_ids_per_token_fit_one_number_of_tokens_only():
    selection = sp.Selection(torch.tensor([[1, -1], [0, 3]]), 10, torch.ones(2, 2))
    assert not selection.shared
    assert selection.per_token(2) is selection.ids
    with pytest.raises(ValueError, match="is for 2 tokens, got 3"):
        selection.per_token(3)


@pytest.mark.parametrize(
    ("ids", "num_units", "weights", "error"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), 5, None, TypeError),
        (torch.zeros(2, 2, 2, dtype=torch.int64), 5, None, ValueError),
        (torch.zeros(2, dtype=torch.int64), -1, None, ValueError),
        (torch.zeros(2, 2, dtype=torch.int64), 5, torch.ones(2, 3), ValueError),
        (torch.zeros(2, dtype=torch.int64), 5, torch.ones(2), ValueError),
        (torch.zeros(2, 2, dtype=torch.int64), 5, torch.ones(2, 2, dtype=torch.int64), TypeError),
    ],
)
def test_what_does_not_fit_is_refused(ids, num_units, weights, error):
    with pytest.raises(error):
        sp.Selection(ids, num_units, weights)


def test_it_is_frozen():
    selection = sp.Selection(torch.tensor([1]), 3)
    with pytest.raises(AttributeError):
        selection.num_units = 4  # pyright: ignore[reportAttributeAccessIssue]
