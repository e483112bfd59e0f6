"""Controls: Dense and Oracle against float64, Random by its statistics."""

import pytest
import torch

import sparingly as sp
from sparingly.selectors import _exact
from sparingly.selectors.controls import inclusion, stratified


@pytest.fixture
def problem():
    return torch.randn(7, 16), torch.randn(500, 16), torch.randn(500)


def exact(hidden, bank, bias, k):
    return (hidden.double() @ bank.double().T + bias.double()).topk(k, dim=1)


@pytest.mark.parametrize("block", [64, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_exact_in_any_number_of_blocks(problem, block, dtype, monkeypatch):
    monkeypatch.setattr(_exact, "BLOCK_ELEMENTS", block)
    hidden, bank, bias = problem
    bank = bank.to(dtype)
    scores, classes = sp.Dense().topk(hidden, bank, bias, 9)
    want = exact(hidden, bank, bias, 9)
    assert torch.equal(classes, want.indices)
    torch.testing.assert_close(scores.double(), want.values, rtol=1e-5, atol=1e-5)
    bank[classes[0, 0], 0] += 100.0
    assert not torch.equal(sp.Dense().topk(hidden, bank, bias, 9)[0], scores)


def test_dense_reads_int8_rows_with_their_scales(problem):
    hidden, bank, bias = problem
    scale = bank.abs().amax(dim=1) / 127
    rows = (bank / scale[:, None]).round().to(torch.int8)
    scores, classes = sp.Dense().topk(hidden, rows, bias, 3, scale)
    want = exact(hidden, rows.double() * scale[:, None], bias, 3)
    assert torch.equal(classes, want.indices)
    torch.testing.assert_close(scores.double(), want.values, rtol=1e-5, atol=1e-4)


def test_dense_answers_before_a_fit_but_names_units_only_after(problem):
    hidden, bank, _ = problem
    dense = sp.Dense()
    assert dense.fitted
    with pytest.raises(RuntimeError, match="fit"):
        dense.select(hidden)
    dense.fit(bank)
    assert dense.select(hidden).ids.tolist() == list(range(500))


def test_the_oracle_finds_the_best_and_only_its_budget(problem):
    hidden, bank, bias = problem
    oracle = sp.Oracle(4)
    assert not oracle.fitted
    oracle.fit(bank, bias)
    want = exact(hidden, bank, bias, 4)
    assert torch.equal(oracle.select(hidden).ids, want.indices)
    scores, classes = oracle.topk(hidden, bank, bias, 6)
    assert torch.equal(classes[:, :4], want.indices)
    assert (classes[:, 4:] == -1).all() and (scores[:, 4:] == float("-inf")).all()
    assert oracle.bank.data_ptr() == bank.data_ptr()


def test_the_oracle_must_be_fitted_again_after_loading(problem):
    _, bank, bias = problem
    oracle, other = sp.Oracle(4), sp.Oracle(4)
    oracle.fit(bank, bias)
    other.load_state_dict(oracle.state_dict())
    assert not other.fitted


def test_random_draws_distinct_units_afresh(problem):
    hidden, bank, _ = problem
    chance = sp.Random(50)
    chance.fit(bank)
    first, second = chance.select(hidden).ids, chance.select(hidden).ids
    assert first.shape == (7, 50) and not torch.equal(first, second)
    assert all(row.unique().numel() == 50 for row in first)
    assert not torch.equal(first[0], first[1])
    assert sp.Random(900).from_config({"budget": 900}).budget == 900


@pytest.mark.parametrize(("num_units", "count"), [(100, 7), (10, 7), (1000, 1), (5, 5)])
def test_every_unit_is_drawn_as_often_as_its_inclusion_says(num_units, count):
    draws = stratified(num_units, count, (20_000,), torch.device("cpu"))
    assert (draws[:, 1:] > draws[:, :-1]).all()
    seen = torch.bincount(draws.flatten(), minlength=num_units) / 20_000
    want = inclusion(torch.arange(num_units), num_units, count)
    error = (want * (1 - want) / 20_000).sqrt()
    assert want.sum().item() == pytest.approx(count)
    assert ((seen - want).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("cls", [sp.Random, sp.Oracle])
def test_a_budget_of_nothing_is_refused(cls):
    with pytest.raises(ValueError, match="got 0"):
        cls(0)
