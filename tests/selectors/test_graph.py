"""The graph walk: finds the best, reads little, says what it read."""

import math

import pytest
import torch

import sparingly as sp
from sparingly.selectors import Graph

N, D = 4_000, 40


@pytest.fixture(scope="module")
def world():
    """Clustered rows and queries near them: (bank, bias, hidden)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, D, generator=generator)
    bank = centres[torch.arange(N) % 200] + 0.5 * torch.randn(N, D, generator=generator)
    bias = 0.1 * torch.randn(N, generator=generator)
    hidden = bank[torch.randint(N, (300,), generator=generator)] + 0.3 * torch.randn(300, D, generator=generator)
    return bank, bias, hidden


@pytest.fixture(scope="module")
def graph(world):
    bank, bias, _ = world
    graph = Graph(degree=24, entries=32, slack=math.inf)
    graph.fit(bank, bias)
    return graph


def best(world):
    bank, bias, hidden = world
    return (hidden @ bank.T + bias).argmax(1, keepdim=True)


def test_a_wide_beam_finds_the_best_and_random_at_the_same_budget_does_not(graph, world):
    bank, bias, hidden = world
    graph.setting = 128
    found = graph.topk(hidden, bank, bias, 1)[1]
    random = sp.Random(budget=128)
    random.fit(bank, bias)
    assert (found == best(world)).float().mean() >= 0.98
    assert (random.topk(hidden, bank, bias, 1)[1] == best(world)).float().mean() < 0.2


def test_scores_are_the_exact_ones(graph, world):
    bank, bias, hidden = world
    graph.setting = 64
    scores, classes = graph.topk(hidden, bank, bias, 5)
    exact = ((hidden.double() @ bank.double().T) + bias).gather(1, classes)
    assert torch.allclose(scores.double(), exact, rtol=1e-5, atol=1e-5)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert not torch.allclose(scores.double(), exact.roll(1, 0), rtol=1e-5, atol=1e-5)


def test_rows_outside_the_beam_are_not_read(graph, world):
    bank, bias, hidden = world
    graph.setting = 32
    one = hidden[:1]
    chosen = graph.select(one).ids
    before = graph.topk(one, bank, bias, 5)
    poisoned = torch.full_like(bank, float("nan"))
    poisoned[chosen[0]] = bank[chosen[0]]
    after = graph.topk(one, poisoned, bias, 5)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_the_ledger_counts_what_the_walk_did(graph, world):
    bank, bias, hidden = world
    macs = []
    for setting in (16, 128):
        graph.setting = setting
        with sp.count() as ledger:
            graph.topk(hidden, bank, bias, 1)
        exact = ledger.entries["graph_exact", "float32"]
        kept = min(setting, 32)
        assert exact.macs == len(hidden) * kept * D
        assert exact.bytes_read == len(hidden) * kept * (D * 4 + 4)
        assert ledger.entries["graph_projection", "float32"].macs == len(hidden) * graph.projection.numel()
        walk = ledger.entries["graph_walk", "int8"]
        entries = graph.entry_ids.numel()
        assert walk.macs % graph.projection.shape[0] == 0
        assert walk.macs >= len(hidden) * (entries + setting) * graph.projection.shape[0] // 2
        macs.append(ledger.macs)
    assert macs[0] < macs[1] < len(hidden) * N * D


def test_slack_ends_walks_early(world):
    bank, bias, hidden = world
    counts = []
    for slack in (0.05, math.inf):
        graph = Graph(degree=24, entries=32, slack=slack)
        graph.fit(bank, bias)
        with sp.count() as ledger:
            graph.topk(hidden, bank, bias, 1)
        counts.append(ledger.entries["graph_walk", "int8"].macs)
    assert counts[0] < counts[1]


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_other_rows(graph, world, kind):
    bank, bias, hidden = world
    graph.setting = 128
    scale = None
    rows = bank.bfloat16()
    wide = rows.double()
    if kind == "int8":
        scale = bank.abs().amax(1) / 127
        rows = (bank / scale[:, None]).round().to(torch.int8)
        wide = rows.double() * scale[:, None].double()
    scores, classes = graph.topk(hidden, rows, bias, 3, scale)
    exact = (hidden.double() @ wide.T + bias).gather(1, classes)
    assert torch.allclose(scores.double(), exact, rtol=1e-5, atol=1e-4)


def test_a_fit_that_fails_leaves_the_old_one(graph, world):
    bank, bias, hidden = world
    graph.setting = 64
    before = graph.topk(hidden, bank, bias, 3)
    broken = bank.clone()
    broken[17, 3] = float("inf")
    with pytest.raises(ValueError, match="unit 17"):
        graph.fit(broken, bias)
    after = graph.topk(hidden, bank, bias, 3)
    assert torch.equal(before[1], after[1])


def test_state_dict_round_trip(graph, world):
    bank, bias, hidden = world
    other = Graph.from_config(graph.config())
    other.load_state_dict(graph.state_dict())
    assert other.fitted and other.num_units == N
    graph.setting = other.setting = 48
    assert torch.equal(graph.topk(hidden, bank, bias, 3)[1], other.topk(hidden, bank, bias, 3)[1])


def test_loading_over_a_fit_that_was_used_replaces_all_of_it(graph, world):
    bank, bias, hidden = world
    used = Graph.from_config(graph.config())
    used.fit(bank.flip(0), bias.flip(0))
    graph.setting = used.setting = 4
    used.topk(hidden, bank.flip(0), bias.flip(0), 1)
    used.load_state_dict(graph.state_dict())
    assert torch.equal(graph.topk(hidden, bank, bias, 1)[1], used.topk(hidden, bank, bias, 1)[1])


def test_two_fits_are_the_same(graph, world):
    bank, bias, _ = world
    again = Graph(degree=24, entries=32, slack=math.inf)
    again.fit(bank, bias)
    assert torch.equal(again.neighbours, graph.neighbours)
    assert torch.equal(again.records, graph.records)


def test_every_unit_is_in_a_list(graph):
    lists = graph.neighbours
    assert lists.shape == (N, 24)
    assert len(lists[lists >= 0].unique()) == N
    assert (lists != torch.arange(N)[:, None]).all()


def test_negatives_are_neighbours_of_the_targets(graph, world):
    hidden = world[2]
    target = torch.tensor([[3], [99], [-1]])
    ids = graph.negatives(hidden[:3], target, 50)
    allowed = set(graph.neighbours[torch.tensor([3, 99])].flatten().tolist())
    assert 0 < len(ids) <= 50
    assert set(ids.tolist()) <= allowed


@pytest.mark.parametrize("units", [1, 2, 3, 60, 700])
def test_small_banks(units):
    bank = torch.randn(units, 16, generator=torch.Generator().manual_seed(units))
    graph = Graph()
    graph.fit(bank)
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    scores, classes = graph.topk(hidden, bank, None, 1)
    assert ((classes >= 0) & (classes < units)).all()
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 7}, "degree"),
        ({"code_bytes": 100}, "code_bytes"),
        ({"entries": 0}, "entries"),
        ({"slack": 0}, "slack"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Graph(**options)


def test_unfitted_raises():
    with pytest.raises(RuntimeError, match="not fitted"):
        Graph().topk(torch.zeros(1, 4), torch.zeros(3, 4), None, 1)


def test_no_tokens_give_no_answers(graph, world):
    bank, bias, hidden = world
    scores, classes = graph.topk(hidden[:0], bank, bias, 3)
    assert scores.shape == classes.shape == (0, 3)
