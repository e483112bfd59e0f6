"""Selectors that are trained with the network: product keys, experts, trees."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparingly.energy import count
from sparingly.selectors import Experts, ProductKey, Selector, Tree, selector_class

D, UNITS = 10, 48
ALL = [ProductKey(heads=3, k=4, key_dim=5), Experts(k=4), Tree(trees=3)]


def bank(units: int = UNITS, d: int = D) -> torch.Tensor:
    return torch.randn(units, d, generator=torch.Generator().manual_seed(1))


def fitted(selector: Selector, units: int = UNITS) -> Any:
    selector = copy.deepcopy(selector)
    selector.fit(bank(units))
    return selector


@pytest.fixture(params=ALL, ids=lambda one: type(one).__name__)
def selector(request) -> Any:
    return fitted(request.param)


def choose(selector: Selector, hidden: torch.Tensor) -> Any:
    return selector.select_from(hidden, bank(selector.num_units), None)


def test_a_selection_has_the_width_that_was_said(selector):
    found = choose(selector, torch.randn(7, D))
    assert found.ids.shape == (7, selector.width) and found.num_units == UNITS
    assert found.ids.max() < UNITS and found.ids.min() >= -1
    if found.weights is not None:
        assert found.weights.mean().item() == pytest.approx(1.0, abs=1e-5)


def test_state_config_and_copy_choose_alike(selector):
    hidden = torch.randn(7, D)
    expected = choose(selector, hidden)
    again = selector_class(type(selector).__name__).from_config(selector.config() | {"setting": selector.setting})
    again.fit(bank())
    again.load_state_dict(selector.state_dict())
    for other in (again, copy.deepcopy(selector)):
        found = choose(other, hidden)
        assert torch.equal(found.ids, expected.ids)
        assert found.weights is None or torch.equal(found.weights, expected.weights)


def test_every_setting_is_a_shorter_choice(selector):
    hidden, last = torch.randn(7, D), 0
    assert selector.settings() == sorted(selector.settings())
    for setting in selector.settings():
        selector.setting = setting
        found = choose(selector, hidden)
        assert found.ids.shape[1] == selector.width > last
        last = selector.width


def test_an_unfitted_one_says_so():
    for one in ALL[:2]:
        with pytest.raises(RuntimeError, match="is not fitted"):
            copy.deepcopy(one).select(torch.randn(2, D))


@pytest.mark.parametrize("kind, bad", [(ProductKey, {"heads": 0}), (ProductKey, {"k": 1.5}), (Experts, {"k": 0}),
                                       (Tree, {"trees": -1})])  # fmt: skip
def test_bad_options(kind, bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be a whole number from 1"):
        kind(**bad)


@pytest.mark.parametrize("one, units, message", [
    (ProductKey(k=4), 47, "product of two numbers of like size, such as 36; got 47"),
    (ProductKey(k=50), 48, r"k must be in 1\.\.num_units \(48\), got 50"),
    (Experts(k=50), 48, r"k must be in 1\.\.num_blocks \(48\), got 50"),
    (Tree(trees=5), 48, r"trees must divide num_units \(48\), got 5"),
])  # fmt: skip
def test_a_fit_that_fails_leaves_the_old_one(one, units, message):
    one = copy.deepcopy(one)
    one.fit(bank(100))
    before = {name: value.clone() for name, value in one.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        one.fit(bank(units))
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_product_keys_find_the_best_sums():
    selector = fitted(ProductKey(heads=2, k=5, key_dim=4))
    hidden = torch.randn(6, D)
    found = selector.select(hidden)
    queries = F.rms_norm((hidden @ selector.query.T).view(6, 2, 2, 4), (4,))
    left = torch.einsum("thd,hnd->thn", queries[:, :, 0], selector.left)
    right = torch.einsum("thd,hnd->thn", queries[:, :, 1], selector.right)
    best = (left.unsqueeze(3) + right.unsqueeze(2)).flatten(2).topk(5, dim=2)
    assert torch.equal(found.ids, best.indices.flatten(1))
    torch.testing.assert_close(found.weights, 5 * best.values.softmax(2).flatten(1))


def test_product_keys_cost_the_root_of_the_units():
    costs = {}
    for units in (48 * 48, 96 * 96):
        selector = fitted(ProductKey(heads=2, k=4, key_dim=4), units)
        with count() as ledger, torch.no_grad():
            selector.select(torch.randn(5, D))
        costs[units] = ledger.macs
        # The query and both halves' scores; the scaling of queries costs a few more.
        least = 5 * (2 * 8 * D + 2 * 2 * 4 * int(units**0.5))
        assert least <= ledger.macs <= 1.2 * least
    assert costs[96 * 96] < 2 * costs[48 * 48]


def test_product_keys_learn_by_gradient():
    selector = fitted(ProductKey(heads=2, k=5, key_dim=4))
    found = selector.select(torch.randn(6, D))
    (found.weights * torch.randn_like(found.weights)).sum().backward()
    for part in (selector.query, selector.left, selector.right):
        assert part.grad is not None and (part.grad != 0).any()


def test_experts_choose_by_score_and_bias_and_weigh_by_score():
    selector = fitted(Experts(k=3))
    hidden = torch.randn(6, D)
    with torch.no_grad():
        selector.bias[17] = 2.0
    found = selector.select(hidden)
    scores = (hidden @ selector.vectors.T).sigmoid()
    assert (found.ids[:, 0] == 17).all()
    chosen = scores.gather(1, found.ids)
    torch.testing.assert_close(found.weights, chosen / chosen.mean(1, keepdim=True))


def test_the_bias_gets_the_excess_load_and_so_the_load_evens_out():
    torch.manual_seed(3)
    selector = fitted(Experts(k=2))
    optimizer = torch.optim.AdamW([selector.bias], lr=0.01)
    hidden = torch.randn(512, D) + 1.0

    def busiest() -> float:
        load = torch.bincount(selector.select(hidden).ids.flatten(), minlength=UNITS).float()
        return float(load.max() / load.mean())

    before = busiest()
    for _ in range(300):
        weights = selector.select(hidden).weights
        assert weights is not None
        weights.sum().backward()
        assert selector.bias.grad is not None and abs(float(selector.bias.grad.sum())) < 1e-6
        optimizer.step()
        optimizer.zero_grad()
    assert before > 3 and busiest() < 1.5


def test_accumulated_batches_balance_as_one():
    hidden = torch.randn(64, D)
    grads = []
    for parts in (1, 4):
        selector = fitted(Experts(k=2))
        torch.manual_seed(0)
        with torch.no_grad():
            selector.vectors.copy_(bank())
        for part in hidden.chunk(parts):
            weights = selector.select(part).weights
            assert weights is not None
            (weights.sum() / parts).backward()
        assert selector.bias.grad is not None
        grads.append(selector.bias.grad / parts)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("units", [48, 45, 21])
@pytest.mark.parametrize("bias", [False, True])
def test_paths_go_by_the_units_own_scores(units, bias):
    selector, rows = fitted(Tree(trees=3), units), bank(units)
    offsets = torch.randn(units, generator=torch.Generator().manual_seed(2)) if bias else None
    hidden = torch.randn(9, D)
    found = selector.select_from(hidden, rows, offsets)
    scores = hidden @ rows.T + (0 if offsets is None else offsets)
    size = units // 3
    for token in range(9):
        expected = []
        for tree in range(3):
            node, path = 0, []
            while node < size:
                path.append(tree * size + node)
                node = 2 * node + 1 + int(scores[token, path[-1]] > 0)
            expected += path + [-1] * (size.bit_length() - len(path))
        assert found.ids[token].tolist() == expected
    wide = selector.select_from(hidden.double(), rows.double(), None if offsets is None else offsets.double())
    assert torch.equal(wide.ids, found.ids)


def test_a_tree_counts_the_units_that_it_asked():
    selector = fitted(Tree(trees=3), 45)
    with count() as ledger:
        found = choose(selector, torch.randn(9, D))
    asked = int((found.ids.view(-1, 4) >= 0).sum(1).sub(1).sum())
    work = next(entry for (name, _), entry in ledger.entries.items() if name == "sparingly::tree")
    assert work.macs == asked * D and work.bytes_read == asked * D * 4 + 9 * D * 4


def test_a_tree_alone_cannot_choose():
    with pytest.raises(RuntimeError, match="select_from"):
        fitted(Tree()).select(torch.randn(2, D))


def test_keys_of_units_that_never_ran_are_moved_beside_others():
    selector = fitted(ProductKey(heads=2, k=4, key_dim=5), 48)  # 6 by 8
    used = torch.zeros(6, 8, dtype=torch.bool)
    used[:4, :7] = True
    before = copy.deepcopy(selector)
    donors = selector.revive(used.flatten()).view(6, 8)
    assert (donors[:4, :7] == -1).all() and (donors[4:] >= 0).all() and (donors[:, 7] >= 0).all()
    assert used.flatten()[donors[donors >= 0]].all()
    assert torch.equal(selector.left[:, :4], before.left[:, :4]) and torch.equal(
        selector.right[:, :7], before.right[:, :7]
    )
    for moved, found in ((selector.left[:, 4], before.left[:, int(donors[4, 0]) // 8]),
                         (selector.right[:, 7], before.right[:, int(donors[0, 7]) % 8])):  # fmt: skip
        assert 0 < (moved - found).norm() < 0.5 * found.norm()


def test_experts_that_never_ran_are_moved_beside_others():
    selector = fitted(Experts(k=2))
    used = torch.arange(UNITS) % 3 > 0
    before = selector.vectors.detach().clone()
    donors = selector.revive(used)
    assert ((donors >= 0) == ~used).all() and used[donors[~used]].all()
    assert torch.equal(selector.vectors[used], before[used])
    gap = (selector.vectors[~used] - before[donors[~used]]).norm(dim=1)
    assert (gap > 0).all() and (gap < before.norm(dim=1).mean()).all()


def test_nothing_used_or_all_used_changes_nothing(selector):
    for used in (torch.zeros(UNITS, dtype=torch.bool), torch.ones(UNITS, dtype=torch.bool)):
        before = {name: value.clone() for name, value in selector.state_dict().items()}
        assert (selector.revive(used) == -1).all()
        assert all(torch.equal(value, before[name]) for name, value in selector.state_dict().items())
