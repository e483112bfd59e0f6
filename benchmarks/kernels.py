"""Bandwidth of the CPU kernels on scattered rows, as a share of what dense readers get in the same run.

    python benchmarks/kernels.py [--threads 1 2] [--dtypes float32 bfloat16 int8] [--pages small huge]

Every measurement draws its rows afresh. A pair is one call of everything below, in random order:

* each operator as users call it, and its compiled kernel alone ("gather_dot kernel"), for one token;
* "same rows": a plain loop of dot products over as many rows of the bank, drawn alike, in ascending order;
* "contiguous": dot products of as many rows that lie side by side, at a random place of the bank: a Numba loop and
  torch's matrix-vector product, whichever is faster in the median.

Shares are those baselines' times over the kernel's, the median over pairs, by wall clock and by processor time of all
threads. All use the same number of threads. Each cell (bank, rows, dtype, threads, pages) appends one line to
results/kernels.jsonl; cells that the file has of this commit are not measured again. Ends with how many cells reach
0.70 of each baseline. Takes about five minutes and 3 GB.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparingly.energy.machine import commit, machine_info, versions
from sparingly.ops import fallbacks, gather_accumulate, gather_dot, topk_rows
from sparingly.ops._arrays import as_numpy
from sparingly.ops._numba import dot
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._pages import request_huge_pages
from sparingly.ops._threads import chunks_for, run_chunks
from sparingly.ops._views import LIKE, addresses
from sparingly.ops.gather_accumulate import cpu as accumulate_cpu
from sparingly.ops.gather_dot import cpu as dot_cpu
from sparingly.ops.topk_rows import cpu as topk_cpu

ROW_BYTES = (512, 1024, 2048, 4096, 16384)
NUM_ROWS = (1 << 16, 1 << 18, 1 << 20)
SHARES = (0.001, 0.01, 0.1)
MUST = 0.70
BEST = 10
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
KERNELS = ("gather_dot", "gather_accumulate", "topk_rows")
KERNELS = KERNELS + tuple(f"{name} kernel" for name in KERNELS)
BASELINES = ("same rows", "contiguous")
CELL = ("row_bytes", "num_rows", "rows_read", "dtype", "threads", "pages")
Call = Callable[[Tensor], object]


@compiled
def _read_contiguous(start, stop, hidden, rows, first, scores):
    for position in range(start, stop):
        scores[position] = dot(rows, first + position, hidden, 0)


@compiled
def _read_same(start, stop, hidden, rows, ids, scores):
    for position in range(start, stop):
        scores[position] = dot(rows, ids[position], hidden, 0)


def make_bank(num_rows: int, row_bytes: int, huge: bool) -> Tensor | None:
    """int8 [num_rows, row_bytes] whose bytes make finite numbers of about 1 in every dtype, tiled from 1,024 rows.

    None, and the reason printed, if huge pages are wanted and the system has none left.
    """
    bank = torch.empty(num_rows, row_bytes, dtype=torch.int8)
    tile = torch.randint(0x38, 0x40, (1024, row_bytes), dtype=torch.int8)
    for start in range(0, num_rows, 1024):
        bank[start : start + 1024] = tile
    if huge and (reason := request_huge_pages(bank)):
        print(f"not measured, no huge pages for {num_rows} rows of {row_bytes} bytes: {reason}", flush=True)
        return None
    return bank


def baseline_calls(bank: Tensor, count: int) -> dict[str, Call]:
    d, size = bank.shape[1], count * bank.shape[1] * bank.element_size()
    hidden, last = torch.randn(1, d), bank.shape[0] - count
    rows, wide, scores = as_numpy(bank), hidden.numpy(), np.empty(count, np.float32)
    every: dict[str, Call] = {
        "same rows": lambda ids: run_chunks(_read_same, count, size, wide, rows, ids.numpy()[0], scores),
        "contiguous numba": lambda ids: run_chunks(
            _read_contiguous, count, size, wide, rows, int(ids[0, 0]) % last, scores
        ),
    }
    if bank.is_floating_point():
        vector = hidden[0].to(bank.dtype)

        def matmul(ids: Tensor) -> Tensor:
            first = int(ids[0, 0]) % last
            return torch.mv(bank[first : first + count], vector)

        every["contiguous torch"] = matmul
    return every


def kernel_calls(bank: Tensor, count: int) -> dict[str, Call]:
    """The operators, and their compiled kernels without what Python does around them; each takes ids [1, count]."""
    (num_rows, d), like = bank.shape, LIKE[bank.dtype]
    size, sizes = count * d * bank.element_size(), (1, count, num_rows, d)
    hidden, weights, sums = torch.randn(1, d), torch.randn(1, count), torch.empty(1, d)
    scores, best, classes = torch.empty(1, count), torch.empty(1, BEST), torch.empty(1, BEST, dtype=torch.int64)
    chunks = chunks_for(count, size)
    partial, heaps = torch.empty(chunks, d), (torch.empty(chunks, BEST), torch.empty(chunks, BEST, dtype=torch.int64))

    def dots(ids: Tensor) -> None:
        places = addresses(hidden, bank, ids, None, None, scores)
        run_chunks(dot_cpu.part, count, size, like, sizes, places)

    def accumulate(ids: Tensor) -> None:
        places = addresses(weights, bank, ids, None, sums)
        run_chunks(accumulate_cpu.part, chunks, size, chunks, partial.data_ptr(), like, sizes, places)
        accumulate_cpu.merge(chunks, partial.data_ptr(), sizes, sums.data_ptr())

    def topk(ids: Tensor) -> None:
        places = addresses(hidden, bank, ids, None, None, best, classes)
        scores_at, places_at = addresses(*heaps)
        run_chunks(topk_cpu.part, chunks, size, chunks, scores_at, places_at, like, (*sizes, BEST), places)
        topk_cpu.merge(chunks, scores_at, places_at, (*sizes, BEST), places)

    return {
        "gather_dot": lambda ids: gather_dot(hidden, bank, ids),
        "gather_accumulate": lambda ids: gather_accumulate(weights, bank, ids),
        "topk_rows": lambda ids: topk_rows(hidden, bank, ids, BEST),
        "gather_dot kernel": dots,
        "gather_accumulate kernel": accumulate,
        "topk_rows kernel": topk,
    }


def measure(bank: Tensor, count: int, pairs: int) -> dict[str, dict[str, np.ndarray]]:
    """Nanoseconds [pairs] of every call, by wall clock and by processor time of all threads."""
    every = {**baseline_calls(bank, count), **kernel_calls(bank, count)}
    times = {name: {"wall": np.empty(pairs), "cpu": np.empty(pairs)} for name in every}
    for pair in range(-1, pairs):
        for name in random.sample(list(every), len(every)):
            ids = torch.randint(bank.shape[0], (1, count))
            if name == "same rows":
                ids = ids.sort().values
            wall, cpu = time.perf_counter_ns(), time.process_time_ns()
            every[name](ids)
            cpu, wall = time.process_time_ns() - cpu, time.perf_counter_ns() - wall
            if pair >= 0:  # the first one compiles
                times[name]["wall"][pair], times[name]["cpu"][pair] = wall, max(cpu, 1)
    if fallbacks():
        raise SystemExit(f"a reference ran instead of a kernel: {fallbacks()}")
    return times


def shares(times: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict[str, float]]]:
    """For every baseline and kernel: the baseline's time over the kernel's, as ``reached`` wants it."""
    readers = [name for name in times if name.startswith("contiguous")]
    fastest = min(readers, key=lambda name: float(np.median(times[name]["wall"])))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for baseline, reader in (("same rows", "same rows"), ("contiguous", fastest)):
        found[baseline] = {}
        for name in KERNELS:
            ratios = {clock: times[reader][clock] / times[name][clock] for clock in ("wall", "cpu")}
            low, middle, high = np.percentile(ratios["wall"], [20, 50, 80]).round(3).tolist()
            cpu = round(float(np.median(ratios["cpu"])), 3)
            found[baseline][name] = {"wall": middle, "wall_p20": low, "wall_p80": high, "cpu": cpu}
    return found


def cells(options: argparse.Namespace) -> Iterator[tuple[tuple[int, int, str], list[dict[str, Any]]]]:
    """Banks (row_bytes, num_rows, pages), and the cells to be measured on each."""
    for row_bytes in options.row_bytes:
        for num_rows in NUM_ROWS:
            for pages in options.pages:
                if row_bytes * num_rows <= options.max_bytes:
                    yield (
                        (row_bytes, num_rows, pages),
                        [
                            dict(
                                zip(
                                    CELL, (row_bytes, num_rows, int(num_rows * share), dtype, count, pages), strict=True
                                )
                            )
                            for share in SHARES
                            for dtype in options.dtypes
                            for count in options.threads
                        ],
                    )


def show(rows: list[dict[str, Any]]) -> None:
    """Per baseline, thread count and pages: in how many cells each kernel reaches what it must, and the median."""
    groups = sorted({(row["threads"], row["pages"]) for row in rows}, key=lambda group: (group[1], group[0]))
    for baseline in BASELINES:
        for threads, pages in groups:
            mine = [row["share"][baseline] for row in rows if (row["threads"], row["pages"]) == (threads, pages)]
            print(f"{baseline}, {threads} threads, {pages} pages: of {len(mine)} cells reach {MUST:.2f} (median share)")
            for name in KERNELS:
                walls = [share[name]["wall"] for share in mine]
                print(f"    {name:24} {sum(wall >= MUST for wall in walls):4} ({np.median(walls):.2f})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--pages", choices=("small", "huge"), nargs="+", default=["small", "huge"])
    parser.add_argument("--row-bytes", type=int, nargs="+", default=list(ROW_BYTES))
    parser.add_argument("--max-bytes", type=float, default=4e9, help="of a bank")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.jsonl")
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine_info(), "versions": versions(), "commit": commit()}
    about["machine"].pop("threads")
    before = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    clean = about["commit"] is not None and not about["commit"].endswith("-dirty")
    known = {tuple(row[key] for key in CELL): row for row in before if clean and row.get("commit") == about["commit"]}
    plan, rows, started = list(cells(options)), [], time.perf_counter()
    total = sum(len(wanted) for _, wanted in plan)
    for (row_bytes, num_rows, pages), wanted in plan:
        bank = None
        for cell in wanted:
            row = known.get(tuple(cell.values()))
            if row is None:
                if bank is None:
                    bank = make_bank(num_rows, row_bytes, pages == "huge")
                if bank is None:
                    break
                torch.set_num_threads(cell["threads"])
                count = cell["rows_read"]
                times = measure(bank.view(DTYPES[cell["dtype"]]), count, options.pairs)
                speed = {name: round(count * row_bytes / float(np.median(t["wall"])), 2) for name, t in times.items()}
                row = {"benchmark": "kernels", **cell, "batch": 1, "order": "random", "pairs": options.pairs}
                row |= {"must": MUST, "gb_per_s": speed, "share": shares(times), **about}
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            rows.append(row)
            line = "  ".join(f"{name} {row['share']['same rows'][name]['wall']:.2f}" for name in KERNELS[:3])
            line += f"  contiguous {row['gb_per_s']['contiguous numba']:.1f} GB/s"
            minutes = (time.perf_counter() - started) / 60
            print(f"{len(rows):3}/{total} {minutes:4.1f} min  {' '.join(map(str, cell.values()))}  {line}", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
