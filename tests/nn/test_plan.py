"""The compiled plan answers as the modules do."""

import pytest
import torch
from torch import nn

import sparingly as sp
from sparingly.nn import Plan


@pytest.fixture(scope="module")
def modules():
    torch.manual_seed(0)
    bag, norm = sp.SelectiveBag(500, 24), nn.LayerNorm(24)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    head = sp.SelectiveHead(24, 2_000, selector=sp.Graph(degree=16, entries=32, beam=48))
    head.refresh()
    ids = torch.randint(-1, 500, (40, 7))
    ids[3] = -1
    return bag, norm, head, ids


@pytest.mark.parametrize("int8", [False, True])
def test_same_answers(modules, int8):
    bag, norm, head, ids = modules
    head = head.int8() if int8 else head
    plan = Plan(bag, norm, head, k=4)
    scores, classes = head.topk(norm(bag(ids)), 4)
    got = plan(ids)
    assert torch.allclose(got[0], scores, rtol=1e-4, atol=1e-5)
    assert (got[1] == classes).float().mean() > 0.97
    single = torch.cat([plan(row)[1] for row in ids.split(1)])
    assert torch.equal(single, got[1])
    assert not torch.equal(got[1], classes.roll(1, 0))


def test_changes_in_place_show(modules):
    bag, norm, head, ids = modules
    plan = Plan(bag, norm, head)
    before = plan(ids)[0].clone()
    with torch.no_grad():
        norm.bias.mul_(2.0)
    after = plan(ids)[0]
    expected = head.topk(norm(bag(ids)), 1)[0]
    with torch.no_grad():
        norm.bias.div_(2.0)
    assert not torch.equal(before, after)
    assert torch.allclose(after, expected, rtol=1e-4, atol=1e-5)


def test_the_ledger_sees_the_work(modules):
    bag, norm, head, ids = modules
    plan = Plan(bag, norm, head)
    with sp.count() as planned:
        plan(ids)
    with sp.count() as direct:
        head.topk(norm(bag(ids)), 1)
    assert planned.macs == direct.macs > 0
    assert planned.macs < len(ids) * head.weight.numel()


def test_an_id_out_of_range_raises(modules):
    bag, norm, head, ids = modules
    bad = ids.clone()
    bad[0, 0] = 500
    with pytest.raises(IndexError, match="500"):
        Plan(bag, norm, head)(bad)


def test_a_bad_network_is_refused(modules):
    bag, norm, head, _ = modules
    with pytest.raises(TypeError, match="Graph"):
        Plan(bag, norm, sp.SelectiveHead(24, 100))
    with pytest.raises(ValueError, match="refresh"):
        Plan(bag, norm, sp.SelectiveHead(24, 100, selector=sp.Graph()))
    with pytest.raises(ValueError, match=r"k must be in 1\.\.48"):
        Plan(bag, norm, head, k=49)
    with pytest.raises(ValueError, match="LayerNorm over 24"):
        Plan(bag, nn.LayerNorm(12), head)


def test_not_finite_states_raise_as_in_topk(modules):
    bag, norm, head, ids = modules
    kept = bag.weight.detach().clone()
    with torch.no_grad():
        bag.weight[ids[0, ids[0] >= 0]] = float("nan")
    try:
        with pytest.raises(ValueError, match="hidden"):
            Plan(bag, norm, head)(ids[:1])
    finally:
        with torch.no_grad():
            bag.weight.copy_(kept)
