"""Neighbour lists: what their parts find, against brute force."""

import numpy as np
import pytest
import torch

from sparingly.selectors import _exact
from sparingly.selectors import _graph_build as build
from sparingly.selectors._exact import exact_topk


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(60, 24, generator=generator)[torch.randint(60, (3000,), generator=generator)]
    return build.unit(middles + torch.randn(3000, 24, generator=generator))


@pytest.mark.parametrize("count", [1, 7, 40, 2999])
def test_in_one_cluster_nearest_finds_what_sorting_finds(rows, count):
    ids, similar = build.nearest(rows, torch.zeros(3000, 1, dtype=torch.int64), 1, count)
    exact = rows @ rows.T
    np.testing.assert_allclose(similar, exact.gather(1, torch.from_numpy(ids).long()), atol=1e-5)
    assert (ids >= 0).all() and not (ids == np.arange(3000)[:, None]).any()
    assert all(len(np.unique(one)) == count for one in ids[::100])
    best = exact.fill_diagonal_(-2).topk(count).values
    # The edge is bisected to 0.001.
    np.testing.assert_allclose(-np.sort(-similar, axis=1), best, atol=2e-3)


def test_equal_rows_are_each_others_neighbours():
    rows = build.unit(torch.ones(10, 8))
    ids, similar = build.nearest(rows, torch.zeros(10, 1, dtype=torch.int64), 1, 4)
    assert all(len(np.unique(one)) == 4 for one in ids) and not (ids == np.arange(10)[:, None]).any()
    np.testing.assert_allclose(similar, 1.0, atol=1e-5)


def test_small_clusters_leave_pads(rows):
    ids, similar = build.nearest(rows, torch.arange(3000)[:, None] // 10, 300, 40)
    assert ((ids >= 0).sum(1) == 9).all() and (np.isinf(similar) == (ids < 0)).all()


def test_rows_join_their_nearest_centroids_or_of_many_those_about_as_near(rows, monkeypatch):
    monkeypatch.setattr(build, "MANY", 400)
    generator = torch.Generator().manual_seed(0)
    for clusters, grouped in ((300, False), (600, True)):
        centroids = build.cluster(rows, clusters, generator)
        near, exact = (rows @ centroids.T).topk(3)
        joined = build.join(rows, centroids, 3, generator)
        assert all(len(one.unique()) == 3 for one in joined)
        if grouped:
            like = (rows @ centroids.T).gather(1, joined)
            assert (like[:, :-1] >= like[:, 1:]).all()
            assert (joined[:, 0] == exact[:, 0]).float().mean() > 0.9 and (near - like).mean() < 0.03
        else:
            assert torch.equal(joined, exact)


def test_falling_order_is_that_of_a_sort():
    rng = np.random.default_rng(0)
    ids, weights = rng.integers(-1, 50, (20, 168)).astype(np.int32), rng.normal(size=(20, 168)).astype(np.float32)
    weights[3] = 0.5
    ids[4] = -1
    order, counts = np.empty(168, np.int32), np.empty(257, np.int32)
    for row in range(20):
        size = build._falling(ids, weights, row, order, counts)
        there = np.flatnonzero(ids[row] >= 0)
        assert size == len(there) and np.array_equal(np.sort(order[:size]), there)
        assert (np.diff(weights[row, order[:size]]) <= 0).all()


@pytest.mark.parametrize("tokens", [1, 5, 23])
def test_exact_answers_do_not_depend_on_the_blocks(rows, tokens, monkeypatch):
    bias = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    whole = (rows[:tokens] @ rows.T + bias).topk(9)
    monkeypatch.setattr(_exact, "BLOCK_TOKENS", 5)
    monkeypatch.setattr(_exact, "BLOCK_ELEMENTS", 700)
    scores, classes = exact_topk(rows[:tokens], rows, bias, 9)
    torch.testing.assert_close(scores, whole.values)
    assert torch.equal(classes, whole.indices)
