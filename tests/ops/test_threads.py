from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sparingly.ops import gather_accumulate, gather_dot, topk_rows
from sparingly.ops._threads import MIN_CHUNK_BYTES, chunks_for, most_alone, run_chunks

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


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
def test_an_interrupted_wait_frees_nothing_that_a_chunk_still_uses(threads):
    class Memory:
        pass

    class Interrupt(Exception):
        pass

    def interrupt(*_):
        raise Interrupt

    def visit(start, stop):
        if start == 0:
            go_on.wait(20)

    go_on, memory = threading.Event(), Memory()
    alive = weakref.ref(memory)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Interrupt) as caught:
            run_chunks(visit, 4, BIG, keep=memory)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    del memory, caught
    gc.collect()
    assert alive() is not None
    go_on.set()
    deadline = time.monotonic() + 20
    while alive() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert alive() is None


def test_a_worker_reports_what_is_no_exception_too(threads):
    def visit(start, stop):
        if start == 0:
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        run_chunks(visit, 4, BIG)
    counts = np.zeros(4)
    run_chunks(lambda start, stop: counts.__setitem__(start, 1), 4, BIG)
    assert counts.all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(threads):
    run_chunks(lambda start, stop: None, 4, BIG)
    child = os.fork()
    if child == 0:
        counts = np.zeros(4)
        run_chunks(lambda start, stop: counts.__setitem__(start, 1), 4, BIG)
        os._exit(0 if counts.all() else 1)
    deadline = time.monotonic() + 20
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)


@pytest.mark.parametrize("row_bytes", [0, 1, 512, MIN_CHUNK_BYTES, 3 * MIN_CHUNK_BYTES])
def test_most_alone_is_where_a_second_chunk_begins(threads, row_bytes):
    most = most_alone(row_bytes)
    assert chunks_for(10**9, most * row_bytes) == 1
    if row_bytes:
        assert chunks_for(10**9, (most + 1) * row_bytes) > 1


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
