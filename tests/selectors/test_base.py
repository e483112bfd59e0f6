"""The base: state that grows with a fit survives state_dict and deepcopy, bad banks are refused."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from sparingly import Selection, Selector
from sparingly.selectors import SELECTORS, selector_class
from sparingly.selectors.base import check_bank


class Largest(Selector):
    """The units with the longest rows, whatever the token: as small as a selector with state can be."""

    def __init__(self, budget: int, shared: bool = False):
        super().__init__()
        self.budget, self.shared = budget, shared
        self.register_buffer("chosen", torch.empty(0, dtype=torch.int64))
        self.inner = torch.nn.Module()
        self.inner.register_buffer("lengths", torch.empty(0))
        self.router = torch.nn.Parameter(torch.zeros(0, 3))

    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        check_bank(bank, bias)
        lengths = bank.norm(dim=1)
        self.chosen = lengths.topk(self.budget).indices
        self.inner.lengths = lengths
        self.router.data = lengths[: self.budget, None].expand(-1, 3).clone()
        self.num_units = bank.shape[0]

    def select(self, hidden: Tensor) -> Selection:
        self.check_fitted()
        ids = self.chosen if self.shared else self.chosen.expand(hidden.shape[0], -1).contiguous()
        return Selection(ids, self.num_units)

    def config(self) -> dict[str, Any]:
        return {"budget": self.budget, "shared": self.shared, "setting": self.setting}


def test_it_is_unfitted_until_it_is_fitted():
    selector = Largest(2)
    assert not selector.fitted and selector.num_units == -1
    with pytest.raises(RuntimeError, match="not fitted"):
        selector.select(torch.randn(1, 4))
    selector.fit(torch.randn(9, 4))
    assert selector.fitted and selector.num_units == 9


@pytest.mark.parametrize("shared", [False, True])
def test_the_best_of_the_selected_units_are_returned_and_the_rest_is_padded(shared):
    bank, bias, hidden = torch.randn(40, 8), torch.randn(40), torch.randn(5, 8)
    selector = Largest(6, shared)
    selector.fit(bank)
    exact = (hidden.double() @ bank.double().T + bias.double())[:, selector.chosen]
    want, places = exact.topk(6, dim=1)
    scores, classes = selector.topk(hidden, bank, bias, 8)
    assert classes.dtype == torch.int64 and scores.dtype == torch.float32
    torch.testing.assert_close(scores[:, :6].double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(classes[:, :6], selector.chosen[places])
    assert (classes[:, 6:] == -1).all() and (scores[:, 6:] == float("-inf")).all()


@pytest.mark.parametrize("assign", [False, True])
def test_a_fit_of_any_size_survives_state_dict(assign):
    selector, other = Largest(3), Largest(3)
    selector.fit(torch.randn(20, 4))
    other.fit(torch.randn(7, 4))
    other.load_state_dict(selector.state_dict(), assign=assign)
    assert other.num_units == 20
    assert torch.equal(other.chosen, selector.chosen)
    assert torch.equal(other.inner.lengths, selector.inner.lengths)  # pyright: ignore[reportArgumentType]
    assert torch.equal(other.router, selector.router)


def test_a_parameter_of_another_width_is_still_refused():
    selector, other = Largest(3), Largest(3)
    selector.fit(torch.randn(20, 4))
    selector.router.data = torch.zeros(5, 4)
    with pytest.raises(RuntimeError, match="size mismatch for router"):
        other.load_state_dict(selector.state_dict())


def test_copies_are_independent():
    selector = Largest(3)
    selector.fit(torch.randn(20, 4))
    twin = copy.deepcopy(selector)
    before = twin.chosen.clone()
    selector.fit(torch.randn(30, 4))
    assert (twin.num_units, selector.num_units) == (20, 30)
    assert torch.equal(twin.chosen, before)


def test_the_config_makes_the_same_selector_and_is_json():
    selector = Largest(3, shared=True)
    selector.setting = 7
    twin = Largest.from_config(json.loads(json.dumps(selector.config())))
    assert (twin.budget, twin.shared, twin.setting) == (3, True, 7)


def test_what_a_selector_does_not_have_is_none():
    selector, hidden, target = Largest(2), torch.randn(3, 4), torch.zeros(3, 1, dtype=torch.int64)
    assert selector.negatives(hidden, target, 4) is None
    assert selector.routing_loss(hidden, target) is None
    assert selector.settings() == []


@pytest.mark.parametrize(
    ("bank", "bias", "error", "match"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), None, TypeError, "int64"),
        (torch.zeros(3), None, ValueError, r"\[3\]"),
        (torch.zeros(0, 4), None, ValueError, "at least one unit"),
        (torch.zeros(3, 4), torch.zeros(2), ValueError, r"\[3\], got \[2\]"),
        (torch.tensor([[1.0], [float("nan")]]), None, ValueError, "unit 1"),
        (torch.ones(3, 1), torch.tensor([0.0, 0.0, float("inf")]), ValueError, "bias must be finite.*unit 2"),
    ],
)
def test_a_bad_bank_is_refused_and_the_old_fit_stays(bank, bias, error, match):
    selector = Largest(1)
    selector.fit(torch.tensor([[1.0], [5.0]]))
    with pytest.raises(error, match=match):
        selector.fit(bank, bias)
    assert selector.num_units == 2 and selector.chosen.tolist() == [1]


def test_a_bank_whose_sum_overflows_is_no_bad_bank():
    check_bank(torch.full((4, 4), 3e38))


def test_names_lead_to_classes_and_unknown_ones_are_refused():
    assert {"Dense", "Random", "Oracle", "Graph", "Partition"} <= SELECTORS.keys()
    for name in ("Dense", "Random", "Oracle"):
        assert selector_class(name).__name__ == name
    with pytest.raises(ValueError, match="got 'Largest'"):
        selector_class("Largest")
