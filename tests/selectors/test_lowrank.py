"""The low-rank guess of which units will be active."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from sparingly.selectors import SELECTORS, LowRank

UNITS, WIDTH = 60, 12


def recall(selector: LowRank, x: torch.Tensor, scores: torch.Tensor) -> float:
    """Share of the truly best units that the selector names."""
    ids = selector.select(x).per_token(x.shape[0])
    best = scores.topk(ids.shape[1], dim=1).indices
    return float((ids[:, :, None] == best[:, None, :]).any(dim=2).float().mean())


def test_at_full_rank_it_names_the_truly_best():
    weight, bias, x = torch.randn(UNITS, WIDTH), torch.randn(UNITS), torch.randn(50, WIDTH)
    importance = torch.rand(UNITS)
    selector = LowRank(WIDTH)
    selector.fit(weight, bias, x, importance, F.silu)
    selector.setting = 20
    truth = F.silu(F.linear(x, weight, bias)).abs() * importance
    assert selector.select(x).ids.shape == (50, UNITS // 5)
    assert recall(selector, x, truth) > 0.999


def test_inputs_make_the_guess_better_than_weights_alone():
    # Inputs lie near a plane that the weights do not favour.
    plane, weight = torch.randn(3, WIDTH), torch.randn(UNITS, WIDTH)
    x = torch.randn(400, 3) @ plane + 0.05 * torch.randn(400, WIDTH)
    seen, blind = LowRank(3), LowRank(3)
    seen.fit(weight, None, x[:200])
    blind.fit(weight)
    for selector in (seen, blind):
        selector.setting = 20
    truth = x[200:] @ weight.t()
    assert recall(seen, x[200:], truth) > 0.9 > recall(blind, x[200:], truth) + 0.1


def test_all_units_are_shared_by_all_tokens():
    selector = LowRank(2)
    selector.fit(torch.randn(UNITS, WIDTH))
    selection = selector.select(torch.randn(3, WIDTH))
    assert selection.shared and torch.equal(selection.ids, torch.arange(UNITS))
    selector.setting = 5
    assert selector.select(torch.randn(3, WIDTH)).ids.shape == (3, 3)


def test_more_rank_than_there_is_does_no_harm():
    selector = LowRank(500)
    selector.fit(torch.randn(UNITS, WIDTH))
    assert selector.inward.shape == (WIDTH, WIDTH)


@pytest.mark.parametrize(
    ("weight", "hidden", "importance"),
    [
        (torch.ones(UNITS, WIDTH), torch.ones(3, WIDTH + 1), None),
        (torch.ones(UNITS, WIDTH), torch.ones(0, WIDTH), None),
        (torch.ones(UNITS, WIDTH), torch.full((3, WIDTH), float("nan")), None),
        (torch.ones(UNITS, WIDTH), None, torch.ones(UNITS + 1)),
        (torch.ones(UNITS, WIDTH), None, torch.full((UNITS,), float("nan"))),
        (torch.full((UNITS, WIDTH), float("inf")), None, None),
    ],
)
def test_a_fit_that_failed_leaves_the_old_one(weight, hidden, importance):
    selector = LowRank(2)
    selector.fit(torch.randn(UNITS, WIDTH))
    before = {name: value.clone() for name, value in selector.state_dict().items()}
    with pytest.raises(ValueError, match="must be"):
        selector.fit(weight, None, hidden, importance)
    assert all(torch.equal(value, before[name]) for name, value in selector.state_dict().items())


def test_inputs_that_are_all_zero_can_be_fitted():
    selector = LowRank(2)
    selector.fit(torch.randn(UNITS, WIDTH), None, torch.zeros(4, WIDTH))
    selector.setting = 10
    assert selector.outward.isfinite().all() and selector.select(torch.randn(2, WIDTH)).ids.shape == (2, 6)


def test_states_copies_and_casts_keep_the_fit():
    selector = LowRank(3)
    selector.fit(torch.randn(UNITS, WIDTH), torch.randn(UNITS), torch.randn(50, WIDTH))
    selector.setting = 30
    x = torch.randn(4, WIDTH)
    loaded = SELECTORS["LowRank"].from_config(selector.config() | {"setting": 30})
    loaded.load_state_dict(selector.state_dict())
    for again in (copy.deepcopy(selector), copy.deepcopy(selector).to(torch.bfloat16), loaded):
        assert torch.equal(again.select(x).ids, selector.select(x).ids)


def test_a_module_of_the_network_is_no_part_of_the_selector():
    selector, act = LowRank(2), torch.nn.PReLU()
    selector.fit(torch.randn(UNITS, WIDTH), activation=act)
    assert selector.activation is act and not list(selector.parameters())


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="rank must be a whole number from 1"):
        LowRank(0)
    with pytest.raises(RuntimeError, match="not fitted"):
        LowRank(1).select(torch.randn(1, 2))
