"""Bandwidth of the CPU kernels on scattered rows, as a share of what a dense read gets in the same run.

    python benchmarks/kernels.py [--threads 2] [--quick]

Every measurement draws its rows afresh. A pair is one call of the kernel and one of each dense reader, in random
order; a dense reader takes the dot products of the same number of rows, contiguous, from a random place of the same
bank: a Numba loop and torch's matrix-vector product, whichever is faster in the median. "same rows in order" is that
Numba loop over the very rows of the kernel, ascending. Shares are printed of the dense read and, in brackets, of the
same rows in order. Each cell appends one JSON line to results/kernels.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparingly.energy.machine import commit, machine_info, versions
from sparingly.ops import fallbacks, gather_accumulate, gather_dot, topk_rows
from sparingly.ops._arrays import NO_FLOATS, as_numpy
from sparingly.ops._numba import dot
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._pages import request_huge_pages
from sparingly.ops._threads import run_chunks
from sparingly.ops.gather_dot import cpu as gather_dot_cpu

ROW_BYTES = (512, 1024, 2048, 4096, 16384)
NUM_ROWS = (1 << 16, 1 << 18, 1 << 20)
SHARES = (0.001, 0.01, 0.1)
MUST = 0.70
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@compiled
def _read_in_order(start, stop, hidden, rows, first, scores):
    for position in range(start, stop):
        scores[position] = dot(rows, first + position, hidden, 0)


@compiled
def _read_same(start, stop, hidden, rows, ids, scores):
    for position in range(start, stop):
        scores[position] = dot(rows, ids[position], hidden, 0)


def make_bank(num_rows: int, d: int, dtype: torch.dtype, huge: bool) -> Tensor:
    """[num_rows, d] of repeated random rows: what is in them does not matter, that all pages exist does."""
    bank = torch.empty(num_rows, d, dtype=dtype)
    tile = torch.randint(-100, 100, (1024, d)).to(dtype)
    for start in range(0, num_rows, 1024):
        bank[start : start + 1024] = tile
    if huge and (reason := request_huge_pages(bank)):
        raise SystemExit(f"huge pages: {reason}")
    return bank


def calls(bank: Tensor, count: int) -> dict[str, Callable[[Tensor], object]]:
    """What is timed, by name; each takes ids [1, count]."""
    d = bank.shape[1]
    hidden, weights = torch.randn(1, d), torch.randn(1, count)
    vector = hidden[0].to(bank.dtype) if bank.is_floating_point() else None
    rows, wide = as_numpy(bank), hidden.numpy()
    scores = np.empty((1, count), np.float32)
    size = count * d * bank.element_size()
    last = bank.shape[0] - count

    def in_order(ids: Tensor) -> object:
        return run_chunks(_read_in_order, count, size, wide, rows, int(ids[0, 0]) % last, scores[0])

    def matmul(ids: Tensor) -> object:
        first = int(ids[0, 0]) % last
        return torch.mv(bank[first : first + count], vector)  # pyright: ignore[reportArgumentType]

    def kernel(ids: Tensor) -> object:
        return run_chunks(gather_dot_cpu._scores, count, size, wide, rows, ids.numpy(), NO_FLOATS, NO_FLOATS, scores)

    every: dict[str, Callable[[Tensor], object]] = {
        "dense numba": in_order,
        "same rows in order": lambda ids: run_chunks(_read_same, count, size, wide, rows, ids[0].numpy(), scores[0]),
        "gather_dot kernel": kernel,
        "gather_dot": lambda ids: gather_dot(hidden, bank, ids),
        "gather_accumulate": lambda ids: gather_accumulate(weights, bank, ids),
        "topk_rows": lambda ids: topk_rows(hidden, bank, ids, 10),
    }
    if vector is not None:
        every["dense torch"] = matmul
    return every


def measure(bank: Tensor, count: int, pairs: int, order: str) -> dict[str, dict[str, list[int]]]:
    """Nanoseconds of every call in every pair, by wall clock and by processor time of all threads."""
    every = calls(bank, count)
    times: dict[str, dict[str, list[int]]] = {name: {"wall": [], "cpu": []} for name in every}
    for pair in range(pairs + 1):
        for name in random.sample(list(every), len(every)):
            ids = torch.randint(bank.shape[0], (1, count))
            ids = ids.sort().values if order == "sorted" else ids
            if name == "same rows in order":
                ids = ids.sort().values
            wall, cpu = time.perf_counter_ns(), time.process_time_ns()
            every[name](ids)
            cpu, wall = time.process_time_ns() - cpu, time.perf_counter_ns() - wall
            if pair:  # the first one compiles
                times[name]["wall"].append(wall)
                times[name]["cpu"].append(cpu)
    if fallbacks():
        raise SystemExit(f"a reference ran instead of a kernel: {fallbacks()}")
    return times


def _spread(values: Any) -> dict[str, float]:
    low, median, high = np.percentile(values, [20, 50, 80])
    return {"median": round(float(median), 4), "p20": round(float(low), 4), "p80": round(float(high), 4)}


def shares(times: dict[str, dict[str, list[int]]], clock: str) -> dict[str, dict[str, dict[str, float]]]:
    """For every kernel: its speed as a share of the faster dense reader's, and of the same rows read in order."""
    dense = [name for name in times if name.startswith("dense")]
    best = min(dense, key=lambda name: float(np.median(times[name][clock])))
    found = {}
    for name, own in times.items():
        if not name.startswith(("dense", "same")):
            mine = np.maximum(np.array(own[clock]), 1)
            found[name] = {
                "of_dense": _spread(np.array(times[best][clock]) / mine),
                "of_same_rows_in_order": _spread(np.array(times["same rows in order"][clock]) / mine),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--order", choices=("random", "sorted"), default="random", help="order in which ids are named")
    parser.add_argument("--huge-pages", action="store_true")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--max-bytes", type=float, default=4e9, help="of a bank")
    parser.add_argument("--quick", action="store_true", help="a few small cells")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[options.dtype]
    about = {"machine": machine_info(), "versions": versions(), "commit": commit()}
    cells = [(row, rows) for row in ROW_BYTES for rows in NUM_ROWS if row * rows <= options.max_bytes]
    for row_bytes, num_rows in cells[:2] if options.quick else cells:
        bank = make_bank(num_rows, row_bytes // dtype.itemsize, dtype, options.huge_pages)
        for share in SHARES:
            count = int(num_rows * share)
            times = measure(bank, count, options.pairs, options.order)
            wall = shares(times, "wall")
            dense_ns = min(float(np.median(times[name]["wall"])) for name in times if name.startswith("dense"))
            row = {
                "benchmark": "kernels",
                "dtype": options.dtype,
                "row_bytes": row_bytes,
                "num_rows": num_rows,
                "rows_read": count,
                "threads": options.threads,
                "batch": 1,
                "order": options.order,
                "huge_pages": options.huge_pages,
                "pairs": options.pairs,
                "dense_gb_per_s": round(count * row_bytes / dense_ns, 2),
                "share_wall": wall,
                "share_cpu": shares(times, "cpu"),
                "must": MUST,
                "reached": {name: found["of_dense"]["median"] >= MUST for name, found in wall.items()},
                **about,
            }
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            figures = "  ".join(
                f"{name} {found['of_dense']['median']:.2f} ({found['of_same_rows_in_order']['median']:.2f})"
                for name, found in wall.items()
            )
            cell = f"{row_bytes:6} B x {num_rows:8} x {share:5.1%}  {row['dense_gb_per_s']:6.1f} GB/s"
            print(cell, figures, sep="  ", flush=True)


if __name__ == "__main__":
    main()
