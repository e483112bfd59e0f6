"""The comparison of the spelling networks at convergence, on a small vocabulary."""

import numpy as np
import pytest
import torch

from sparingly.workloads._converged import converged, right
from sparingly.workloads._shares import difference, share
from sparingly.workloads._speller import Recipe, Speller, _softmax_backward, train_dense
from sparingly.workloads.spell_data import Vocabulary, misspellings

SMALL = {
    "dense": Recipe(20_000, batch=256, lr=1e-4, bag_lr=8e-3),
    "selective": Recipe(30_000, batch=128, negatives=128, lr=1e-3),
}


@pytest.fixture(scope="module")
def run():
    """(the result, what was said) of 1,000 classes and few examples."""
    said = []
    return converged(lambda text, part: said.append((text, part)), 1_000, SMALL), said


def test_both_sides_learn_and_say_what_they_were_given(run):
    vocabulary = Vocabulary(1_000)
    _, test = misspellings(vocabulary)
    untrained = Speller(vocabulary)
    untrained.name_classes()
    before = share(right(untrained, test))
    for which, recipe in SMALL.items():
        side = run[0][which]
        assert side["value"] > before["hi"] and side["lo"] < side["value"] < side["hi"]
        assert (side["batch"], side["lr"], side["bag_lr"]) == (recipe.batch, recipe.lr, recipe.bag_lr)
        assert recipe.examples - recipe.batch < side["examples"] <= recipe.examples
        assert side["cpu_s"] > 0
    assert run[0]["n"] == len(test.typed)


def test_the_paired_difference_is_that_of_the_values(run):
    result = run[0]
    gap = result["difference"]
    assert gap["value"] == pytest.approx(result["selective"]["value"] - result["dense"]["value"], abs=1e-12)
    assert gap["lo"] < gap["value"] < gap["hi"]


def test_progress_is_told_to_the_end(run):
    for which in SMALL:
        parts = [part for text, part in run[1] if which in text]
        assert parts.count(1.0) == 1 and min(parts) > 0


@pytest.mark.parametrize("lr, bag_lr", [(0.0, 1e-2), (1e-3, 0.0)])
def test_dense_uses_each_rate_for_its_own_parameters_and_leaves_the_threads(lr, bag_lr):
    speller, threads = Speller(Vocabulary(300)), torch.get_num_threads()
    speller.name_classes()
    banks = (speller.head.weight, speller.bag.weight)
    before = [bank.detach().clone() for bank in banks]
    list(train_dense(speller, Recipe(512, batch=128, lr=lr, bag_lr=bag_lr), float("inf")))
    for bank, old, rate in zip(banks, before, (lr, bag_lr), strict=True):
        # Four steps of Adam at 0.1, 0.75, 0.5 and 0.25 times the rate: at most 1.6 of it, a little more by momentum.
        assert 0.5 * rate <= (bank.detach() - old).abs().max().item() <= 2 * rate
    assert torch.get_num_threads() == threads


def test_dense_gradients_are_those_of_cross_entropy():
    random = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(16, 300, dtype=torch.float64)
    hidden = torch.randn(32, 16, generator=random, dtype=torch.float64, requires_grad=True)
    target = torch.randint(300, (32,), generator=random)
    torch.nn.functional.cross_entropy(linear(hidden), target).backward()
    expected = [hidden.grad, linear.weight.grad, linear.bias.grad]
    linear.weight.grad, linear.bias.grad = torch.full_like(linear.weight, torch.nan), None
    scores = torch.full((32, 300), torch.nan, dtype=torch.float64)
    found = [_softmax_backward(linear, hidden.detach(), target, scores), linear.weight.grad, linear.bias.grad]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_intervals():
    figure = share(np.array([True] * 90 + [False] * 10))
    assert figure["lo"] == pytest.approx(0.8256, abs=1e-3) and figure["hi"] == pytest.approx(0.9448, abs=1e-3)
    assert difference(np.array([1, 1, 0, 1], bool), np.array([1, 0, 0, 1], bool))["value"] == 0.25
