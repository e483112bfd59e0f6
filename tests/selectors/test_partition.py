"""Partition: load limits, the three paths to an answer, and what training the router gives."""

from __future__ import annotations

import copy

import pytest
import torch

from sparingly.energy.ledger import count
from sparingly.ops import topk_rows
from sparingly.selectors import Partition, Random
from sparingly.selectors import partition as module
from sparingly.selectors._assign import assign

CLASSES, D = 1500, 24


@pytest.fixture(scope="module")
def bank():
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(30, D, generator=generator)
    return centers[torch.arange(CLASSES) % 30] + 0.5 * torch.randn(CLASSES, D, generator=generator)


@pytest.fixture(scope="module")
def bias():
    return 0.1 * torch.randn(CLASSES, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def hidden(bank):
    generator = torch.Generator().manual_seed(3)
    picked = torch.randint(CLASSES, (40,), generator=generator)
    return bank[picked] + 0.3 * torch.randn(40, D, generator=generator)


@pytest.fixture(scope="module")
def fitted(bank):
    partition = Partition(32, probes=4, copies=3)
    partition.fit(bank)
    return partition


@pytest.fixture
def partition(fitted):
    return copy.deepcopy(fitted)


def check_loads(homes, groups, capacity):
    assert homes.min() >= 0 and homes.max() < groups
    assert torch.bincount(homes.reshape(-1).long(), minlength=groups).max() <= capacity
    assert (homes.sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("groups, copies", [(1, 1), (7, 2), (32, 3), (4, 4), (64, 1)])
def test_load_limit_and_distinct_copies(bank, groups, copies):
    partition = Partition(groups, copies=copies)
    partition.fit(bank)
    check_loads(partition.homes, groups, partition.capacity_for(CLASSES))


@pytest.mark.parametrize("groups, capacity, copies", [(5, 40, 2), (10, 10, 1), (3, 100, 3), (101, 1, 1), (4, 51, 2)])
def test_assignment_when_everyone_wants_the_same_and_room_is_tight(groups, capacity, copies):
    """All wish for the first two groups; exactly (or nearly) as much room as needed."""

    def scorer(numbers, open_groups):
        wanted = torch.arange(min(2, groups)).expand(len(numbers), -1).contiguous()
        return -(1.0 + wanted.float()) * (numbers[:, None] + 1).float(), wanted

    homes = assign(scorer, torch.full((100, copies), -1), groups, capacity)
    check_loads(homes, groups, capacity)


def test_those_that_want_a_group_most_get_it():
    wish = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.1]])

    def scorer(numbers, open_groups):
        return wish[numbers].contiguous(), torch.tensor([[0, 1]]).expand(len(numbers), 2).contiguous()

    homes = assign(scorer, torch.full((4, 1), -1), 2, 2)
    assert homes[:, 0].tolist() == [0, 0, 1, 1]


def test_assignment_leaves_others_where_they_are(fitted):
    before = fitted.homes.long()
    moving = before.clone()
    moving[::3] = -1

    def scorer(numbers, open_groups):
        return torch.zeros(len(numbers), 5), torch.arange(5).expand(len(numbers), 5).contiguous()

    after = assign(scorer, moving, 32, fitted.capacity_for(CLASSES))
    check_loads(after, 32, fitted.capacity_for(CLASSES))
    stayed = torch.arange(CLASSES) % 3 != 0
    assert torch.equal(after[stayed], before[stayed])


def test_assignment_without_room():
    with pytest.raises(ValueError, match=r"2 copies of 100 classes need room .* got 4 groups of 49"):
        assign(lambda numbers, groups: (_ for _ in ()).throw(AssertionError), torch.full((100, 2), -1), 4, 49)


def test_selected_are_the_members_of_the_probed_groups_once(partition, hidden):
    probed = partition.route(hidden)
    assert probed.shape == (len(hidden), 4)
    selection = partition.select(hidden)
    for token, ids in enumerate(selection.ids):
        expected = [c for c in range(CLASSES) if set(partition.homes[c].tolist()) & set(probed[token].tolist())]
        valid = ids[ids >= 0]
        assert sorted(valid.tolist()) == expected
        assert (ids[len(valid) :] == -1).all()


def brute(hidden, rows, bias, ids, k):
    scores = hidden.double() @ rows.double().T + bias.double()
    allowed = torch.zeros_like(scores, dtype=torch.bool)
    for token, row in enumerate(ids):
        allowed[token, row[row >= 0]] = True
    return scores.masked_fill(~allowed, -torch.inf).topk(k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_blocks_gather_and_brute_force_agree(partition, bank, bias, hidden, dtype, tokens, monkeypatch):
    scale = torch.rand(CLASSES) * 0.01 + 0.02 if dtype == torch.int8 else None
    rows = (bank * 30).round().to(torch.int8) if scale is not None else bank.to(dtype)
    wide = rows.double() * (1.0 if scale is None else scale.double()[:, None])
    hidden = hidden[:tokens]
    expected = brute(hidden, wide, bias, partition.select(hidden).ids, 7)
    answers = []
    for share in (0, 1000):
        monkeypatch.setattr(module, "BLOCK_SHARE", share)
        scores, classes = partition.topk(hidden, rows, bias, 7, scale)
        assert torch.equal(classes, expected.indices)
        torch.testing.assert_close(scores.double(), expected.values, rtol=1e-5, atol=1e-5)
        answers.append(scores)
    # Sums are taken in another order: the two paths were really two.
    gathered = topk_rows(hidden, rows, partition.select(hidden).ids, 7, scale, bias)
    assert torch.equal(gathered[0], answers[1])


def test_a_batch_too_large_for_one_go_is_split(partition, bank, bias, hidden, monkeypatch):
    whole = partition.topk(hidden, bank, bias, 7)
    monkeypatch.setattr(module, "BLOCK_KEPT", 7 * 4 * 9)
    with count() as ledger:
        parts = partition.topk(hidden, bank, bias, 7)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0], rtol=1e-5, atol=1e-5)
    assert sum(entry.calls for (op, _), entry in ledger.entries.items() if op == "sparingly::topk_blocks") == 5


def test_blocks_on_two_threads(partition, bank, bias, hidden, monkeypatch):
    from sparingly.ops import _threads

    alone = partition.topk(hidden, bank, bias, 7)
    monkeypatch.setattr(_threads, "MIN_CHUNK_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    together = partition.topk(hidden, bank, bias, 7)
    assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])


def test_fewer_classes_than_k(partition, bank, hidden):
    partition.setting = 1
    for tokens in (2, 40):
        scores, classes = partition.topk(hidden[:tokens], bank, None, 400)
        held = (classes >= 0).sum(dim=1)
        assert (held < 400).all() and (held == (partition.select(hidden[:tokens]).ids >= 0).sum(dim=1)).all()
        assert (scores[classes < 0] == -torch.inf).all()
        assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in classes)


@pytest.mark.parametrize("tokens", [2, 40])
def test_all_probes_are_exact(partition, bank, bias, hidden, tokens):
    partition.setting = 32
    expected = (hidden[:tokens].double() @ bank.double().T + bias.double()).topk(9)
    scores, classes = partition.topk(hidden[:tokens], bank, bias, 9)
    assert torch.equal(classes, expected.indices)
    torch.testing.assert_close(scores.double(), expected.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 40])
def test_nothing_outside_the_probed_groups_is_read(partition, bank, hidden, tokens):
    partition.setting = 1
    hidden = hidden[:1].expand(tokens, -1).contiguous()
    ids = partition.select(hidden).ids[0]
    poisoned = torch.full_like(bank, torch.nan)
    poisoned[ids[ids >= 0]] = bank[ids[ids >= 0]]
    clean = partition.topk(hidden, bank, None, 5)
    scores, classes = partition.topk(hidden, poisoned, None, 5)
    assert torch.equal(scores, clean[0]) and torch.equal(classes, clean[1])
    # The check can fail: NaN ranks above everything.
    poisoned[ids[0]] = torch.nan
    assert partition.topk(hidden, poisoned, None, 5)[0].isnan().any()


def test_a_block_is_read_once_whoever_asks(partition, bank, hidden):
    partition.setting = 1
    token = hidden[:1].expand(40, -1).contiguous()
    size = int(partition._table().lengths[partition.route(token)[0, 0]])
    with count() as ledger:
        partition.topk(token, bank, None, 1)
    work = {op: entry for (op, _), entry in ledger.entries.items()}
    assert work["sparingly::topk_blocks"].macs == 40 * size * D
    # The rows once, ids, hidden states and the kept best: not 40 times the rows.
    assert size * D * 4 <= work["sparingly::topk_blocks"].bytes_read < 2 * size * D * 4
    families = len(partition.families)
    assert work["sparingly::route"].macs == 40 * (families + min(module.BEAM, families) * 32 // families) * D
    assert ledger.coverage > 0.95


def task(classes=600, seed=0):
    """Classes in 12 topics whose inputs say the topic along other directions than the rows do."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.arange(classes) % 12
    rows = torch.randn(classes, D, generator=generator)
    signal = torch.randn(12, D, generator=generator)

    def draw(count, seed):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(classes, (count,), generator=generator)
        noise = torch.randn(count, D, generator=generator)
        return signal[topic[target]] + 0.5 * rows[target] + 0.4 * noise, target

    return rows, draw


def recall(selector, hidden, target):
    return float((selector.select(hidden).ids == target[:, None]).any(dim=1).float().mean())


def test_training_the_router_raises_recall_over_fixed_groups_and_over_chance():
    rows, draw = task()
    hidden, target = draw(500, 99)
    options = {"groups": 32, "probes": 2, "copies": 2}
    fixed, learned = Partition(**options), Partition(**options, repartition_every=100)
    for selector in (fixed, learned):
        selector.fit(rows)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
    torch.manual_seed(0)
    for step in range(400):
        inputs, right = draw(128, step)
        loss = learned.routing_loss(inputs, right[:, None])
        if loss is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    check_loads(learned.homes, 32, learned.capacity_for(600))
    chance = Random(2 * learned.capacity_for(600))
    chance.fit(rows)
    got, before, floor = (recall(selector, hidden, target) for selector in (learned, fixed, chance))
    assert got > before + 0.15
    assert got > floor + 0.4
    # A refit keeps what the router learned.
    learned.fit(rows)
    assert recall(learned, hidden, target) > before + 0.15
    learned.reset()
    learned.fit(rows)
    assert torch.equal(learned.homes, fixed.homes)


def test_routing_loss_is_minus_log_of_the_probability_of_the_homes(partition, hidden, monkeypatch):
    monkeypatch.setattr(module, "ROUTE_EVERY", 1)
    target = torch.tensor([[3, 7], [5, -1]])
    loss = partition.routing_loss(hidden[:2].double().float(), target)
    unit = torch.nn.functional.normalize(hidden[:2].double(), dim=1)
    share = (unit @ partition.vectors.double().T + partition.group_bias.double()).softmax(dim=1)
    terms = [-share[t, partition.homes[c].long()].sum().log() for t, c in ((0, 3), (0, 7), (1, 5))]
    family = (unit @ partition.families.double().T + partition.family_bias.double()).log_softmax(dim=1)
    cross = -(share.reshape(2, family.shape[1], -1).sum(dim=2) * family).sum(dim=1).mean()
    expected = sum(terms) / 3 + cross
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in partition.parameters())


def test_repartition_waits_until_enough_was_seen(partition, hidden):
    partition.repartition_every = 2
    before = partition.homes.clone()
    torch.manual_seed(0)
    with torch.no_grad():
        partition.vectors.copy_(partition.vectors[torch.randperm(32)])
    for _ in range(2):
        partition.routing_loss(hidden[:1], torch.tensor([[11]]))
    assert torch.equal(partition.homes, before)
    for _ in range(2):
        partition.routing_loss(hidden[:1], torch.tensor([[11]]))
    moved = (partition.homes != before).any(dim=1).nonzero()[:, 0].tolist()
    assert moved == [11]
    check_loads(partition.homes, 32, partition.capacity_for(CLASSES))


def test_negatives_share_a_group_with_a_target(partition, hidden):
    target = torch.tensor([[4, 9], [20, -1]])
    found = partition.negatives(hidden[:2], target, 50)
    assert found.shape == (50,) and found.dtype == torch.int64
    near = set(partition.homes[[4, 9, 20]].flatten().tolist())
    assert all(set(partition.homes[number].tolist()) & near for number in found)
    assert Partition().negatives(hidden[:2], target, 50) is None


def test_state_and_config_make_the_same_selector(partition, bank, bias, hidden):
    partition.setting = 8
    other = Partition.from_config(partition.config())
    assert not other.fitted
    other.load_state_dict(partition.state_dict())
    assert other.fitted and other.setting == 8
    for mine, its in zip(partition.topk(hidden, bank, bias, 3), other.topk(hidden, bank, bias, 3), strict=True):
        assert torch.equal(mine, its)


def test_parameters_stay_the_same_objects_through_a_fit(bank):
    partition = Partition(8)
    before = [id(parameter) for parameter in partition.parameters()]
    partition.fit(bank)
    assert [id(parameter) for parameter in partition.parameters()] == before
    assert partition.settings() == [1, 2, 4]


@pytest.mark.parametrize("bad", [{"groups": 0}, {"probes": 0}, {"copies": 0}, {"repartition_every": -1}], ids=str)
def test_bad_options(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least"):
        Partition(**bad)


def test_bad_input(partition, bank, hidden):
    before = partition.homes.clone()
    broken = bank.clone()
    broken[17, 0] = torch.nan
    with pytest.raises(ValueError, match="unit 17"):
        partition.fit(broken)
    with pytest.raises(ValueError, match=r"copies must be at most groups \(2\), got 4"):
        Partition(2).fit(bank)
    assert torch.equal(partition.homes, before)
    with pytest.raises(RuntimeError, match="not fitted"):
        Partition().select(hidden)
    with pytest.raises(ValueError, match="hidden must be"):
        partition.select(hidden[:, 1:])
    with pytest.raises(ValueError, match=r"1500 rows.* got 1499"):
        partition.topk(hidden, bank[1:], None, 1)
    partition.setting = 0
    with pytest.raises(ValueError, match="setting must be at least 1, got 0"):
        partition.select(hidden)


def test_no_tokens(partition, bank):
    scores, classes = partition.topk(torch.empty(0, D), bank, None, 3)
    assert scores.shape == classes.shape == (0, 3)
    assert partition.select(torch.empty(0, D)).ids.shape[0] == 0
    assert partition.routing_loss(torch.empty(0, D), torch.empty(0, 1, dtype=torch.int64)) is None
