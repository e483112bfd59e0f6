"""Runs chunks of a serial compiled kernel on as many threads as PyTorch uses.

Numba's parallel loops are not used: their default pool aborts the process when two Python threads enter it together.
The chunks run without the GIL, so plain threads are enough; they wait on one queue, which hands work over in half the
time that ``concurrent.futures`` takes (12 instead of 22 us on a virtual EPYC 9004).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

# Below this many bytes of rows for each thread, handing work over costs more than it gives: a hand-over and the wait
# took 20-40 us on the machine this was tuned on, in which one core reads about 300 KB.
MIN_CHUNK_BYTES = 512 * 1024


class _Job:
    """One chunk on its way through a worker; ``done`` is locked until it has ended."""

    def __init__(self, function: Callable[..., object], args: tuple[object, ...], keep: object):
        self._call: tuple[Callable[..., object], tuple[object, ...], object] | None = (function, args, keep)
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def run(self) -> None:
        assert self._call is not None
        function, args, _ = self._call
        try:
            function(*args)
        except BaseException as error:  # the caller's to raise, whatever it is
            self.error = error
        finally:
            self._call = None
            self.done.release()


class _Workers:
    """Threads that serve one queue; as many as any call has wanted so far."""

    def __init__(self):
        self.jobs: SimpleQueue[_Job] = SimpleQueue()
        self._count = 0
        self._lock = threading.Lock()

    def want(self, count: int) -> None:
        if self._count >= count:
            return
        with self._lock:
            while self._count < count:
                threading.Thread(target=self._serve, name=f"sparingly_{self._count}", daemon=True).start()
                self._count += 1

    def _serve(self) -> None:
        while True:
            # In one expression: a waiting worker must hold on to nothing of its last job.
            self.jobs.get().run()


_workers = _Workers()


def _after_fork() -> None:
    """A forked child has the queue but none of the threads: start anew."""
    global _workers
    _workers = _Workers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def chunks_for(size: int, work_bytes: int) -> int:
    """How many chunks ``size`` items are worth that read ``work_bytes`` together: 1 when the work is small."""
    return max(1, min(torch.get_num_threads(), size, work_bytes // MIN_CHUNK_BYTES))


def most_alone(item_bytes: int) -> int:
    """Up to how many items of so many bytes each :func:`run_chunks` keeps on the calling thread."""
    if torch.get_num_threads() == 1:
        return sys.maxsize
    return (2 * MIN_CHUNK_BYTES - 1) // max(1, item_bytes)


def run_chunks(function: Callable[..., object], size: int, work_bytes: int, *args: object, keep: object = None) -> None:
    """Call ``function(start, stop, *args)`` for consecutive ranges that together cover ``0..size``.

    ``work_bytes``: what all of them read together; it decides how many chunks there are. The last chunk runs on the
    calling thread. ``keep``: stays alive until every chunk has ended, even if the caller is interrupted before; for
    tensors whose addresses are in ``args``. Returns when all are done; the first error of a chunk is raised then.
    """
    chunks = chunks_for(size, work_bytes)
    if chunks == 1:
        function(0, size, *args)
        return
    bounds = [size * chunk // chunks for chunk in range(chunks + 1)]
    workers = _workers
    workers.want(chunks - 1)
    handed = [_Job(function, (bounds[i], bounds[i + 1], *args), keep) for i in range(chunks - 1)]
    for job in handed:
        workers.jobs.put(job)
    try:
        function(bounds[-2], bounds[-1], *args)
    finally:
        # Chunks write into the caller's arrays: none may still run when this returns, whatever they raised. Only a
        # signal can end this wait early; then args and keep live on in the jobs.
        for job in handed:
            job.done.acquire()
    for job in handed:
        if job.error is not None:
            raise job.error
