"""Links from inputs: what competes becomes neighbours, and walks get shorter for it."""

import math

import numpy as np
import pytest
import torch

import sparingly as sp
from sparingly.selectors import Graph
from sparingly.selectors._graph_links import FOUND, link

N, D = 4_000, 40


def found(*best: list[int]) -> np.ndarray:
    """Lists of best classes, padded."""
    return np.array([classes + [-1] * (FOUND - len(classes)) for classes in best], np.int64)


def chain(n: int, degree: int) -> np.ndarray:
    """Each class is followed by the next ones."""
    return ((np.arange(n)[:, None] + 1 + np.arange(degree)) % n).astype(np.int32)


def test_the_best_class_comes_first_in_the_lists_of_those_behind_it():
    lists = chain(50, 4)
    linked = link(lists, found([30, 7, 9], [31, 7]))
    # 7 stood at rank 1 behind both; 30 and 31 share evenly, and fill half of the list.
    assert set(linked[7, :2]) == {30, 31} and linked[7, 2:].tolist() == [8, 9]
    assert linked[9].tolist() == [30, 10, 11, 12]
    untouched = np.setdiff1d(np.arange(50), [7, 9])
    assert (linked[untouched] == lists[untouched]).all()
    assert (lists == chain(50, 4)).all()


def test_shares_decide_which_links_stay():
    linked = link(chain(50, 4), found([30, 1, 2, 7], [31, 7], [31, 2, 7], [32, 7], [32, 7]))
    # 32: 1 + 1; 31: 1 + 1/2; 30: 1/3.
    assert linked[7].tolist() == [32, 31, 8, 9]


def test_a_link_that_is_there_already_is_not_doubled():
    linked = link(chain(50, 4), found([9, 7]))
    assert linked[7].tolist() == [9, 8, 10, 11]


@pytest.fixture(scope="module")
def world():
    """Rows in clusters, and inputs that lie elsewhere than the rows: (bank, inputs to link by, inputs to test)."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(200, D, generator=generator)[torch.arange(N) % 200] + torch.randn(N, D, generator=generator)
    mix = torch.randn(D, D, generator=generator) / D**0.5
    hidden = bank[torch.randint(N, (9_000,), generator=generator)] @ (torch.eye(D) + mix)
    return bank, hidden[:8_000], hidden[8_000:]


def agreement(graph: Graph, bank: torch.Tensor, hidden: torch.Tensor) -> tuple[float, int]:
    best = (hidden @ bank.T).argmax(1, keepdim=True)
    with sp.count() as ledger:
        classes = graph.topk(hidden, bank, None, 1)[1]
    return float((classes == best).float().mean()), ledger.bytes


def test_walks_find_more_for_fewer_bytes(world):
    bank, linking, testing = world
    results = []
    for hidden, beam in ((None, 32), (linking, 24)):
        graph = Graph(degree=16, entries=16, beam=beam, slack=math.inf)
        graph.fit(bank, hidden=hidden)
        results.append(agreement(graph, bank, testing))
    (plain, plain_bytes), (linked, linked_bytes) = results
    assert 1 - linked < 0.8 * (1 - plain)
    assert linked_bytes < plain_bytes


def test_the_same_inputs_give_the_same_lists_for_any_number_of_threads(world):
    bank, linking, _ = world
    before = torch.get_num_threads()
    lists = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            graph = Graph(degree=16, entries=16)
            graph.fit(bank, hidden=linking[:2_000])
            lists.append(graph.neighbours.clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(lists[0], lists[1])
    assert (lists[0] < N).all() and not (lists[0] == torch.arange(N)[:, None]).any()


def test_bad_inputs_leave_the_old_fit(world):
    bank, linking, _ = world
    graph = Graph(degree=16, entries=16)
    head = sp.SelectiveHead(D, N, bias=False, selector=graph)
    head.adopt(bank, None)
    head.refresh()
    before = graph.neighbours.clone()
    for hidden, error in ((linking[:, 1:], ValueError), (torch.full((3, D), float("nan")), ValueError)):
        with pytest.raises(error):
            head.refresh(hidden)
        assert torch.equal(graph.neighbours, before)
    head.refresh(linking[:0])
    assert torch.equal(graph.neighbours, before)


def test_walks_in_turns_end_as_walks_alone(world):
    bank, linking, testing = world
    graph = Graph(degree=16, entries=16, beam=24)
    graph.fit(bank, hidden=linking)
    together = graph.topk(testing[:200], bank, None, 5)
    alone = [graph.topk(one, bank, None, 5) for one in testing[:200].split(1)]
    assert torch.equal(together[1], torch.cat([classes for _, classes in alone]))
    assert torch.allclose(together[0], torch.cat([scores for scores, _ in alone]))
