"""Banks of more classes than were trained, inputs for them, and the sweep over their sizes."""

import pytest
import torch

from sparingly.workloads import _scaling
from sparingly.workloads._parts import Parts
from sparingly.workloads._scaling import Copies, learning_inputs, scaling
from sparingly.workloads._speller import Recipe, Speller, train_selective
from sparingly.workloads.spell_data import Vocabulary, misspellings

TRAINED = 9_000
SIZE = 24_000


@pytest.fixture(scope="module")
def speller():
    speller = Speller(Vocabulary(TRAINED))
    speller.name_classes()
    for _ in train_selective(speller, Recipe(30_000)):
        pass
    return speller


@pytest.fixture(scope="module")
def copies(speller):
    return Copies(speller.head.weight, speller.head.bias)


@pytest.fixture(scope="module")
def real(speller):
    """(states, classes) of real misspellings."""
    pairs = misspellings(speller.vocabulary)[1]
    return speller.states(pairs.typed[:3_000]), torch.from_numpy(pairs.classes[:3_000])


def quantiles(values):
    return torch.quantile(values.float(), torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))


def margins(states, rows, bias):
    best = (states @ rows.T + bias).topk(2).values
    return best[:, 0] - best[:, 1]


def nearest(rows, chosen):
    unit = torch.nn.functional.normalize(rows, dim=1)
    similar = unit[chosen] @ unit.T
    similar[torch.arange(len(chosen)), chosen] = -1
    return similar.amax(1)


def spectrum(rows):
    values = torch.linalg.eigvalsh(rows.T.double() @ rows.double()).flip(0)
    return values / values.sum()


def test_a_turn_is_orthogonal_and_moves_nothing_for_copy_0(copies):
    assert torch.equal(copies.turn(0), torch.eye(256))
    for copy in (1, 2):
        turn = copies.turn(copy).double()
        torch.testing.assert_close(turn @ turn.T, torch.eye(256, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_bank_holds_the_trained_classes_first_and_banks_agree(copies):
    rows, bias = copies.bank(SIZE)
    assert copies.counts(SIZE) == [TRAINED, TRAINED, SIZE - 2 * TRAINED]
    assert torch.equal(rows[:TRAINED], copies.weight) and torch.equal(bias[:TRAINED], copies.bias)
    assert torch.equal(bias[TRAINED : 2 * TRAINED], copies.bias)
    smaller, _ = copies.bank(4_000)
    assert torch.equal(smaller, rows[:4_000])
    larger, _ = copies.bank(SIZE + 1)
    torch.testing.assert_close(larger[:SIZE], rows)


def test_rows_have_the_norms_spectrum_and_neighbourhoods_of_trained_ones(copies):
    rows, _ = copies.bank(SIZE)
    trained = copies.weight
    torch.testing.assert_close(rows[TRAINED : 2 * TRAINED].norm(dim=1), trained.norm(dim=1))
    moved = (spectrum(rows) - spectrum(trained)).abs().sum()
    assert moved < 0.05 < (spectrum(torch.randn(SIZE, 256)) - spectrum(trained)).abs().sum()
    chosen = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(0))[:600]
    before = quantiles(nearest(trained, chosen))
    for first in (TRAINED, 2 * TRAINED):
        now = quantiles(nearest(rows, first + chosen[chosen < SIZE - first]))
        # Copies lie among the classes: no class is further from its nearest one, and typical ones are hardly nearer.
        assert (now > before - 0.02).all(), (before, now)
        assert ((now - before)[2:] < 0.1).all(), (before, now)


def test_a_class_is_as_like_its_copy_as_its_nearest_class(copies):
    rows, _ = copies.bank(3 * TRAINED)
    like = nearest(copies.weight, torch.arange(0, TRAINED, 10))
    for copy in (1, 2):
        cosine = torch.nn.functional.cosine_similarity(copies.weight, rows[copy * TRAINED : (copy + 1) * TRAINED])
        assert torch.quantile(like, 0.02) < cosine.mean() < torch.quantile(like, 0.98)


def test_inputs_of_copies_have_the_margins_of_real_ones_and_find_their_class(copies, real):
    states, classes = real
    rows, bias = copies.bank(2 * TRAINED)
    inputs, wanted = copies.inputs(states, classes, 2 * TRAINED, 3_000)
    copied = wanted >= TRAINED
    assert 0.45 < copied.float().mean() < 0.55
    trained = quantiles(margins(states, copies.weight, copies.bias))
    for part in (copied, ~copied):
        now = quantiles(margins(inputs[part], rows, bias))
        assert ((now / trained - 1).abs() < 0.35).all(), (trained, now)
    right = ((inputs @ rows.T + bias).argmax(1) == wanted).float()
    before = ((states @ copies.weight.T + copies.bias).argmax(1) == classes).float().mean()
    assert abs(right[copied].mean() - before) < 0.08
    # The check can fail: turned back, they are inputs of the trained classes.
    back = (inputs[copied] @ copies.turn(1).T @ rows.T + bias).argmax(1)
    assert (back == wanted[copied]).float().mean() < 0.05
    assert ((back == wanted[copied] - TRAINED).float().mean() - before).abs() < 0.08


def test_inputs_are_those_whose_class_is_kept_and_none_is_used_twice(copies, real):
    states, classes = real
    inputs, wanted = copies.inputs(states, classes, 2_000, 500)
    assert len(inputs) == len(wanted) == 500 and int(wanted.max()) < 2_000
    inputs, wanted = copies.inputs(states, classes, SIZE, 3_000)
    back = torch.cat([inputs[wanted // TRAINED == copy] @ copies.turn(copy).T for copy in range(3)])
    found = torch.cdist(back, states).argmin(1)
    assert len(found.unique()) == len(back) > 2_500
    assert int(wanted.max()) < SIZE


def test_learning_inputs_belong_to_every_copy_in_its_share(speller, copies):
    states = learning_inputs(speller, copies, SIZE, 0.1)
    assert states.shape == (sum(int(0.1 * many) for many in copies.counts(SIZE)), 256)
    rows, bias = copies.bank(SIZE)
    best = (states.float() @ rows.T + bias).argmax(1)
    shares = torch.bincount(best // TRAINED, minlength=3) / len(states)
    torch.testing.assert_close(shares, torch.tensor(copies.counts(SIZE)) / SIZE, atol=0.05, rtol=0)


def test_the_sweep_measures_each_size_once(speller, tmp_path, monkeypatch):
    monkeypatch.setattr(_scaling, "TOKENS", 800)
    parts = Parts(tmp_path, "mark")
    told = []
    pairs = misspellings(speller.vocabulary)
    rows = scaling(speller, pairs, lambda *words: told.append(words), parts.run, (5_000, 10_000))
    for row, size in zip(rows, (5_000, 10_000), strict=True):
        assert row["num_classes"] == size and row["tuned_on"] == row["tested_on"] == 800
        assert row["inputs"] == pytest.approx(size, abs=2)
        assert row["setting"] and row["agreement"]["value"] > 0.98
        assert 0 < row["selective_macs"] < 0.5 * 256 * size
        assert all(row[name] > 0 for name in ("selective_cpu_s", "dense_cpu_s", "index_cpu_s"))
        assert "why" not in row
    assert all(0 <= share < 1 for _, share in told) and [s for _, s in told] == sorted(s for _, s in told)
    del told[:]
    assert scaling(speller, pairs, lambda *words: told.append(words), parts.run, (5_000, 10_000)) == rows
    assert not told


def test_a_size_without_a_setting_has_no_selective_cost(speller, copies, monkeypatch, tmp_path):
    monkeypatch.setattr(_scaling.Graph, "settings", lambda self: [1])
    pairs = misspellings(speller.vocabulary)
    (row,) = scaling(speller, pairs, lambda *_: None, Parts(tmp_path, "mark").run, (TRAINED,))
    assert row["selective_cpu_s"] is None and row["agreement"] is None and row["setting"] is None
    assert row["why"].startswith("no setting kept 0.992: 1 gave 0.")
    assert row["dense_cpu_s"] > 0
