"""Cost of an answer against the number of classes, at equal agreement, on weights like trained ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparingly.nn import SelectiveHead
from sparingly.selectors import Graph
from sparingly.workloads._engines import best_engine, dense_engines

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)


def synthetic(head: SelectiveHead, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight [size, d] and bias [size] with the spectrum and the neighbourhoods of a trained head.

    Up to its own number of classes a random part of the trained rows; beyond, a trained row plus the difference of
    two neighbours of one another elsewhere, so that distances to neighbours are those that training makes.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, bias = head.weight.detach(), head.bias
    assert isinstance(head.selector, Graph) and bias is not None
    n = weight.shape[0]
    kept = torch.randperm(n, generator=generator)[: min(n, size)]
    extra = max(0, size - n)
    rows, shifts = torch.empty(size, weight.shape[1]), torch.empty(size)
    rows[: len(kept)], shifts[: len(kept)] = weight[kept], bias.detach()[kept]
    for start in range(0, extra, 1 << 17):
        many = min(1 << 17, extra - start)
        base, one = (torch.randint(n, (many,), generator=generator) for _ in range(2))
        other = head.selector.neighbours[one, torch.randint(4, (many,), generator=generator)].long()
        part = slice(n + start, n + start + many)
        rows[part] = weight[base] + weight[one] - weight[other.clamp_min(0)]
        shifts[part] = bias.detach()[base]
    return rows, shifts


def scaling(
    head: SelectiveHead, states: Tensor, say: Callable[[str, float | None], None], sizes: tuple[int, ...] = SIZES
) -> list[dict[str, Any]]:
    """One row a size: processor-seconds of an answer, dense and selective, at batch 1; index building apart.

    The beam is tuned on half of the states to an agreement of 0.99 (lower bound), the agreement stated on the rest.
    """
    rows = []
    tuning, testing = states[: len(states) // 2], states[len(states) // 2 :]
    for size in sizes:
        say(f"{size:,} classes", None)
        weight, bias = synthetic(head, size)
        large = SelectiveHead(weight.shape[1], size, selector=Graph(), device="meta")
        large.adopt(weight, bias)
        start = time.process_time()
        large.refresh()
        index_s = time.process_time() - start
        report = large.tune(tuning, agreement=0.99, confidence=0.95)
        with torch.no_grad():
            exact = torch.cat([large(part).argmax(1) for part in testing[:1000].split(100)])
        found = large.topk(testing[:1000], 1)[1][:, 0]
        dense = best_engine(dense_engines(large, "fp32")[1:], testing, (1,), batch=1, rounds=3)
        costs = []
        for _ in range(5):
            start = time.process_time()
            for state in testing[:400].split(1):
                large.topk(state, 5)
            costs.append((time.process_time() - start) / 400)
        rows.append(
            {
                "num_classes": size,
                "dense_cpu_s": dense.cpu_s,
                "selective_cpu_s": sorted(costs)[2],
                "index_cpu_s": index_s,
                "agreement": float((found == exact).float().mean()),
                "setting": report.chosen,
                "engine": repr(dense.engine),
            }
        )
        del large, weight, bias, dense
    return rows
