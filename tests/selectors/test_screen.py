"""The screen: finds the best, scores the rest right on average, reads what it says, and both its codes agree."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

import sparingly as sp
from sparingly.ops._numba import kernel
from sparingly.selectors import Screen, _screen, selector_class
from sparingly.selectors.screen import _reference

N, D = 3_000, 48  # not a whole number of blocks of 64


@pytest.fixture(scope="module")
def world():
    """Rows with a decaying spectrum, a common direction and a bias, and inputs that are far from round."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.linspace(0, -1.5, D).exp()
    bank = torch.randn(N, D, generator=generator) * spectrum.flip(0) + 2.0
    bias = 0.3 * torch.randn(N, generator=generator)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    hidden = (torch.randn(2_300, D, generator=generator) * spectrum) @ turn + 0.5
    return bank @ turn, bias, hidden[:300].contiguous(), hidden[300:].contiguous()


def fitted(world, rank=24, keep=64, inputs=True):
    bank, bias, _, seen = world
    screen = Screen(rank, keep)
    screen.fit(bank, bias, seen if inputs else None)
    return screen


def exact(world):
    bank, bias, hidden, _ = world
    return hidden.double() @ bank.double().T + bias.double()


def agreement(screen, world):
    bank, bias, hidden, _ = world
    return (screen.topk(hidden, bank, bias, 1)[1][:, 0] == exact(world).argmax(1)).float().mean().item()


def test_it_finds_the_best_and_random_at_the_same_budget_does_not(world):
    bank, bias, hidden, _ = world
    random, oracle = sp.Random(64), sp.Oracle(64)
    for control in (random, oracle):
        control.fit(bank, bias)
    best = exact(world).argmax(1)
    assert agreement(fitted(world), world) >= 0.98
    assert (random.topk(hidden, bank, bias, 1)[1][:, 0] == best).float().mean() < 0.2
    assert (oracle.topk(hidden, bank, bias, 1)[1][:, 0] == best).float().mean() >= 0.99


def test_inputs_make_the_projection_better(world):
    few = {inputs: agreement(fitted(world, 8, 8, inputs), world) for inputs in (False, True)}
    assert few[True] > few[False] + 0.05


def test_full_rank_and_every_class_kept_is_exact(world):
    bank, bias, hidden, _ = world
    screen = fitted(world, D, N)
    assert torch.allclose(screen.logits(hidden, bank, bias).double(), exact(world), rtol=1e-5, atol=1e-4)
    assert screen.select(hidden[:2]).ids.tolist() == [list(range(N))] * 2


def test_scores_are_the_exact_ones_of_the_classes_selected(world):
    bank, bias, hidden, _ = world
    screen = fitted(world)
    scores, classes = screen.topk(hidden, bank, bias, 5)
    want = exact(world).gather(1, classes)
    assert torch.allclose(scores.double(), want, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(scores.double(), want.roll(1, 0), rtol=1e-5, atol=1e-4)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    ids = screen.select(hidden).ids
    assert (ids[:, 1:] > ids[:, :-1]).all()
    assert (classes.unsqueeze(2) == ids.unsqueeze(1)).any(2).all()


def test_logits_are_exact_where_selected_and_close_elsewhere(world):
    bank, bias, hidden, _ = world
    screen = fitted(world)
    logits, want = screen.logits(hidden, bank, bias).double(), exact(world)
    ids = screen.select(hidden).ids
    assert torch.allclose(logits.gather(1, ids), want.gather(1, ids), rtol=1e-5, atol=1e-4)
    left = (logits - want).scatter(1, ids, 0.0)
    assert 0.0 < left.abs().mean() < 0.5 * want.std(1).mean()


def test_the_mass_of_the_tail_is_right_on_average(world):
    """Where every class is scored roughly, log-sum-exp agrees; without the half variance it is too low."""
    bank, bias, hidden, _ = world
    screen = fitted(world, 12, 1)
    centred = exact(world) - exact(world).max(1, keepdim=True).values
    error = screen.logits(hidden, bank, bias).double().logsumexp(1) - exact(world).logsumexp(1)
    projection = screen.projection.clone()
    plain = fitted(world, 12, 1, inputs=True)
    rows = bank - bank.mean(0)
    plain.shift.copy_(rows @ world[3].mean(0) + bias)
    without = plain.logits(hidden, bank, bias).double().logsumexp(1) - exact(world).logsumexp(1)
    assert torch.equal(projection, plain.projection) and centred.max() == 0.0
    assert abs(error.mean()) < 0.4 * abs(without.mean())


@pytest.mark.parametrize("rank", [4, 24, 60])
def test_compiled_and_reference_agree(world, rank):
    bank, bias, hidden, _ = world
    screen = fitted(world, rank, 50)
    reference = _reference(screen.parts(), hidden, bank, bias, None, 3, 50)
    logits = screen.logits(hidden, bank, bias)
    same = (screen.select(hidden).ids == reference.kept).all(1)
    assert same.float().mean() > 0.95  # a rounding may fall the other way
    assert torch.allclose(logits[same], reference.logits[same], rtol=1e-4, atol=2e-3)
    scores, classes = screen.topk(hidden, bank, bias, 3)
    assert torch.equal(classes[same], reference.classes[same])
    assert torch.allclose(scores[same], reference.scores[same], rtol=1e-5, atol=1e-4)


def test_rows_that_are_not_kept_are_not_read(world):
    bank, bias, hidden, _ = world
    screen = fitted(world)
    ids = screen.select(hidden[:1]).ids[0]
    poisoned = torch.full_like(bank, math.nan)
    poisoned[ids] = bank[ids]
    for take in (
        lambda rows: screen.logits(hidden[:1], rows, bias),
        lambda rows: screen.topk(hidden[:1], rows, bias, 4)[0],
    ):
        assert torch.equal(take(poisoned), take(bank))
    poisoned[ids[3]] = math.nan
    assert screen.logits(hidden[:1], poisoned, bias).isnan().sum() == 1


def test_the_ledger_counts_the_scan_and_the_rows(world):
    bank, bias, hidden, _ = world
    screen = fitted(world, 24, 70)
    with sp.count() as ledger:
        screen.topk(hidden[:7], bank, bias, 1)
    exact_ = ledger.entries["sparingly::screen_exact", "float32"]
    assert (exact_.macs, exact_.bytes_read) == (7 * 70 * D, 7 * 70 * (D * 4 + 4))
    assert ledger.entries["screen_scan", "int8"].macs == 7 * 24 * 3_008  # whole blocks
    assert ledger.entries["screen_projection", "float32"].macs == 7 * 25 * D


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_rows_of_other_dtypes(world, kind):
    bank, bias, hidden, _ = world
    screen, scale = fitted(world), None
    if kind == "int8":
        scale = bank.abs().amax(1) / 127
        rows = (bank / scale[:, None]).round().to(torch.int8)
        values = rows.double() * scale[:, None]
    else:
        rows = bank.bfloat16()
        values = rows.double()
    scores, classes = screen.topk(hidden, rows, bias, 2, scale)
    want = (hidden.double() @ values.T + bias).gather(1, classes)
    assert torch.allclose(scores.double(), want, rtol=1e-5, atol=1e-4)


def test_a_token_that_is_not_finite_harms_no_other(world):
    bank, bias, hidden, _ = world
    screen = fitted(world)
    bad = hidden[:4].clone()
    bad[1, 3], bad[2, 0] = math.nan, math.inf
    for logits, ids in (
        (screen.logits(bad, bank, bias), screen.select(bad).ids),
        _reference(screen.parts(), bad, bank, bias, None, 1, 64)[:2],
    ):
        assert logits[1:3].isnan().all() and (ids[1:3] == -1).all()
        assert torch.allclose(logits[[0, 3]], screen.logits(hidden[[0, 3]], bank, bias), atol=1e-3)
    assert (screen.topk(bad, bank, bias, 1)[1][:, 0] >= 0).tolist() == [True, False, False, True]


def test_equal_scores_keep_exactly_as_many(world):
    screen = Screen(4, 10)
    screen.fit(torch.ones(500, 8))
    assert screen.select(torch.randn(3, 8)).ids.tolist() == [list(range(10))] * 3
    screen.fit(torch.ones(500, 8), torch.arange(500) % 2 * 1.0)
    assert screen.select(torch.randn(1, 8)).ids.tolist() == [list(range(1, 20, 2))]


def test_it_travels_by_state_dict_deepcopy_and_safetensors(world, tmp_path):
    bank, bias, hidden, _ = world
    screen = fitted(world)
    want = screen.topk(hidden, bank, bias, 3)
    other = selector_class("Screen").from_config(screen.config())
    assert isinstance(other, Screen) and not other.fitted
    other.load_state_dict(load(save(screen.state_dict())))
    for twin in (other, copy.deepcopy(screen), screen.to(torch.bfloat16)):
        assert twin.shift.dtype == torch.float32 and twin.setting == 64
        for got, wanted in zip(twin.topk(hidden, bank, bias, 3), want, strict=True):
            assert torch.equal(got, wanted)
    broken = {**screen.state_dict(), "codes": screen.codes[:-1]}
    other.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="fit together"):
        other.topk(hidden, bank, bias, 1)


def test_settings_trade_work_for_agreement(world):
    screen = fitted(world, 4, 16)
    settings = screen.settings()
    assert settings == sorted(settings) and settings[-1] < N
    found = []
    for screen.setting in settings:
        found.append(agreement(screen, world))
    assert found[0] < found[-1] and found[-1] > 0.99
    assert Screen().settings() == []


def test_a_fit_that_fails_leaves_the_old_one(world):
    bank, bias, hidden, _ = world
    screen = fitted(world)
    before = screen.topk(hidden, bank, bias, 1)[1]
    worse = bank.clone()
    worse[17, 2] = math.inf
    with pytest.raises(ValueError, match="unit 17"):
        screen.fit(worse, bias)
    with pytest.raises(ValueError, match="hidden must be finite"):
        screen.fit(bank, bias, torch.full((3, D), math.nan))
    assert torch.equal(screen.topk(hidden, bank, bias, 1)[1], before)


def test_bad_arguments():
    with pytest.raises(ValueError, match="multiple of 4"):
        Screen(rank=6)
    with pytest.raises(ValueError, match="keep must be a whole number from 1"):
        Screen(keep=0)
    with pytest.raises(RuntimeError, match="not fitted"):
        Screen().topk(torch.randn(1, 4), torch.randn(9, 4), None, 1)
    screen = Screen(4, 2)
    screen.fit(torch.randn(9, 4))
    with pytest.raises(ValueError, match="9 rows"):
        screen.topk(torch.randn(1, 4), torch.randn(8, 4), None, 1)
    with pytest.raises(ValueError, match="hidden"):
        screen.topk(torch.randn(1, 5), torch.randn(9, 4), None, 1)


@pytest.mark.parametrize("shape", [(1, 4), (2, 3), (70, 3), (130, 200)])
def test_few_rows_few_inputs_and_more_rank_than_columns(shape):
    bank = torch.randn(*shape)
    for hidden in (None, torch.randn(1, shape[1]), torch.randn(5, shape[1])):
        screen = Screen(8, shape[0])
        screen.fit(bank, None, hidden)
        states = torch.randn(6, shape[1])
        assert torch.allclose(screen.logits(states, bank, None), states @ bank.T, atol=1e-4)
        assert screen.topk(states[:0], bank, None, 1)[1].shape == (0, 1)


@kernel
def _sums(codes, block, query, fast, slow):
    _screen.block_sums(codes, block, query, fast)
    _screen.block_sums_portable(codes, block, query, slow)


def test_block_sums_are_exact_in_both_instruction_sets():
    random = np.random.default_rng(0)
    for groups in (1, 5, 40):
        codes = random.integers(0, 256, (3, groups, 64, 4)).astype(np.uint8)
        query = random.integers(-127, 128, groups * 4).astype(np.int8)
        codes[2], query[:4] = 255, -127
        fast, slow = np.full((2, 64), -1, np.int32)
        for block in range(3):
            _sums(codes, block, query, fast, slow)
            want = codes[block].transpose(1, 0, 2).reshape(64, -1).astype(np.int64) @ query
            assert np.array_equal(fast, want) and np.array_equal(slow, want)


def test_threads_give_the_same(world):
    bank, bias, hidden, _ = world
    screen = fitted(world)
    many = hidden.repeat(40, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = screen.topk(many, bank, bias, 2), screen.logits(many, bank, bias)
        torch.set_num_threads(3)
        three = screen.topk(many, bank, bias, 2), screen.logits(many, bank, bias)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[1], three[1]) and torch.equal(one[0][1], three[0][1])
