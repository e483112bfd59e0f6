from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sparingly.ops import gather_accumulate, gather_dot, topk_rows
from sparingly.ops._threads import MIN_CHUNK_BYTES, chunks_for, run_chunks

BIG = 100 * MIN_CHUNK_BYTES


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 1001])
@pytest.mark.parametrize("work_bytes", [0, BIG])
def test_every_item_runs_once(threads, size, work_bytes):
    counts = np.zeros(size, dtype=np.int64)

    def visit(start, stop):
        counts[start:stop] += 1

    run_chunks(visit, size, work_bytes)
    assert (counts == 1).all()


def test_small_work_stays_on_the_calling_thread(threads):
    seen = []
    run_chunks(lambda start, stop: seen.append(threading.current_thread()), 100, MIN_CHUNK_BYTES - 1)
    assert seen == [threading.current_thread()]
    assert chunks_for(100, MIN_CHUNK_BYTES) == 1
    assert chunks_for(100, BIG) == 4
    assert chunks_for(3, BIG) == 3


@pytest.mark.parametrize("failing", [0, 3])
def test_an_error_arrives_after_all_chunks_have_ended(threads, failing):
    ended = []

    def visit(start, stop):
        if start == failing:
            raise KeyError(start)
        ended.append(start)

    with pytest.raises(KeyError, match=str(failing)):
        run_chunks(visit, 4, BIG)
    assert sorted(ended) == [start for start in range(4) if start != failing]


def test_four_threads_call_kernels_at_once(make, two_threads):
    cases = [make(seed=seed, tokens=16, num_rows=4000, k=200) for seed in range(4)]

    def work(case):
        return (
            gather_dot(case.hidden, case.rows, case.ids),
            gather_accumulate(case.weights, case.rows, case.ids),
            *topk_rows(case.hidden, case.rows, case.ids, 7),
        )

    alone = [work(case) for case in cases]
    barrier = threading.Barrier(4)

    def together(case):
        barrier.wait()
        return [work(case) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for results, expected in zip(pool.map(together, cases), alone, strict=True):
            for result in results:
                assert all(torch.equal(got, want) for got, want in zip(result, expected, strict=True))
