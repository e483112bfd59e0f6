"""Runs chunks of a serial compiled kernel on as many threads as PyTorch uses.

Numba's parallel loops are not used: their default pool aborts the process when two Python threads enter it together.
The chunks run without the GIL, so a plain thread pool is enough.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Below this many bytes of rows for each thread, handing work over costs more than it gives: a hand-over and the wait
# took 20-40 us on the machine this was tuned on, in which one core reads about 300 KB.
MIN_CHUNK_BYTES = 512 * 1024

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def _after_fork() -> None:
    """A forked child has the pool's object but none of its threads: start anew."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _pool(workers: int) -> ThreadPoolExecutor:
    with _lock:
        if workers not in _pools:
            _pools[workers] = ThreadPoolExecutor(workers, thread_name_prefix="sparingly")
        return _pools[workers]


def chunks_for(size: int, work_bytes: int) -> int:
    """How many chunks ``size`` items are worth that read ``work_bytes`` together: 1 when the work is small."""
    return max(1, min(torch.get_num_threads(), size, work_bytes // MIN_CHUNK_BYTES))


def run_chunks(function: Callable[..., object], size: int, work_bytes: int, *args: object) -> None:
    """Call ``function(start, stop, *args)`` for consecutive ranges that together cover ``0..size``.

    ``work_bytes``: what all of them read together; it decides how many chunks there are. The last chunk runs on the
    calling thread. Returns when all are done; the first error of a chunk is raised then.
    """
    chunks = chunks_for(size, work_bytes)
    if chunks == 1:
        function(0, size, *args)
        return
    bounds = [size * chunk // chunks for chunk in range(chunks + 1)]
    pool = _pool(chunks - 1)
    futures = [pool.submit(function, bounds[i], bounds[i + 1], *args) for i in range(chunks - 1)]
    try:
        function(bounds[-2], bounds[-1], *args)
    finally:
        # Chunks write into the caller's arrays: none may still run when this returns, whatever happened.
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
