"""Layers of many units of which few run, against the same network with every unit active.

    python benchmarks/ffn.py [--units 16384 65536] [--pairs 15]

The network: 784 inputs, width 128, two residual blocks of that many units, 10 outputs, on random inputs. Per selector
one line is appended to results/ffn.jsonl: dense processor time over selective, as medians of paired ratios with their
95 % intervals, one thread, for

* a training step (forward, backward, optimiser) per example, each side at its fastest batch of 128, 512, 1024;
* an answer at batch 1: the selective network as one compiled call, the dense one in its fastest engine of PyTorch and
  ONNX Runtime;
* an answer per example, each side at its fastest batch of 64, 256, 1024 and in its fastest engine,

with the multiplications and bytes of both sides by the ledger. It measures cost only: what such a network learns is
another question. Takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparingly as sp
from sparingly.compare import Paired, paired
from sparingly.energy.machine import commit, machine_info, versions
from sparingly.ops import fallbacks

IN, WIDTH, OUT = 784, 128, 10
SELECTORS: dict[str, tuple[int, Callable[[], sp.Selector]]] = {
    "ProductKey(4, 16)": (1, lambda: sp.ProductKey(heads=4, k=16)),
    "ProductKey(2, 16, key_dim=16)": (1, lambda: sp.ProductKey(heads=2, k=16, key_dim=16)),
    "Experts(2), block 32": (32, lambda: sp.Experts(k=2)),
    "Tree(4)": (1, lambda: sp.Tree(trees=4)),
}
TRAINING, ANSWERS = (128, 512, 1024), (64, 256, 1024)
Work = Callable[[], object]


class Block(nn.Module):
    """One residual layer around ``ffn``."""

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(WIDTH), ffn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


def network(ffn: Callable[[], nn.Module]) -> nn.Module:
    blocks = [Block(ffn()) for _ in range(2)]
    return nn.Sequential(nn.Linear(IN, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, OUT))


def dense_network(units: int) -> nn.Module:
    return network(lambda: nn.Sequential(nn.Linear(WIDTH, units), nn.GELU(), nn.Linear(units, WIDTH)))


def trainer(model: nn.Module, batch: int) -> Work:
    optimizer = sp.optimizer(model)
    inputs, target = torch.randn(batch, IN), torch.randint(OUT, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        optimizer.step()

    return step


def onnx_answer(model: nn.Module) -> Callable[[Tensor], object]:
    import onnxruntime

    axes: Any = {"x": {0: "batch"}, "y": {0: "batch"}}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "dense.onnx"
        names: Any = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes, "dynamo": False}
        torch.onnx.export(model, (torch.randn(2, IN),), str(file), **names)
        content = file.read_bytes()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


def answers(engine: Callable[[Tensor], object], batch: int) -> Work:
    """Another input each time: a single one would stay in the cache together with what it selects."""
    inputs = cycle(torch.randn(4096, IN).split(batch))

    def answer() -> None:
        with torch.no_grad():
            engine(next(inputs))

    return answer


def seconds(work: Work, least: int = 3) -> float:
    """Processor-seconds of one call, the best of a few."""
    work()
    best = float("inf")
    for _ in range(least):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def fastest(works: dict[str, tuple[Work, int]]) -> tuple[str, Work, int]:
    """Of works and the examples that a call serves, the one that costs least per example."""
    name = min(works, key=lambda one: seconds(works[one][0]) / works[one][1])
    return name, *works[name]


def saving(dense: tuple[str, Work, int], selective: tuple[str, Work, int], pairs: int) -> dict[str, Any]:
    """Dense ÷ selective processor time per example, with what ran."""
    found: Paired = paired(dense[1], selective[1], pairs=pairs, warmup=2, threads=1)
    factor = selective[2] / dense[2]
    names = ("value", "lo", "hi")
    ratio = {name: round(getattr(found, name) * factor, 2) for name in names}
    each = {"dense_us": found.a_s / dense[2] * 1e6, "selective_us": found.b_s / selective[2] * 1e6}
    return {**ratio, **{name: round(us, 2) for name, us in each.items()}, "dense": dense[0], "selective": selective[0]}


def work_of(work: Work) -> tuple[int, int]:
    with sp.count() as ledger:
        work()
    return ledger.macs, ledger.bytes


def measure(units: int, name: str, pairs: int) -> dict[str, Any]:
    block, selector = SELECTORS[name]
    dense = dense_network(units)
    model = network(lambda: sp.SelectiveFFN(WIDTH, units, selector=selector(), block=block))
    steps = {side: {f"batch {size}": (trainer(net, size), size) for size in TRAINING}
             for side, net in (("dense", dense), ("selective", model))}  # fmt: skip
    row: dict[str, Any] = {"training": saving(fastest(steps["dense"]), fastest(steps["selective"]), pairs)}
    dense.eval()
    model.eval()
    engines = {"pytorch": dense, "onnxruntime": onnx_answer(dense)}
    plan = sp.compile_plan(model)
    single = {engine: (answers(run, 1), 1) for engine, run in engines.items()}
    row["batch_1"] = saving(fastest(single), ("one compiled call", answers(plan, 1), 1), pairs)
    many = {
        f"{engine}, batch {size}": (answers(run, size), size) for engine, run in engines.items() for size in ANSWERS
    }
    ours = {f"batch {size}": (answers(model, size), size) for size in ANSWERS}
    ours["one compiled call"] = (answers(plan, 64), 64)
    row["best_batch"] = saving(fastest(many), fastest(ours), pairs)
    counts = [work_of(answers(net, 1)) for net in (dense, model)]
    row["batch_1"] |= {"macs": round(counts[0][0] / counts[1][0], 1), "bytes": round(counts[0][1] / counts[1][1], 1)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ffn.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {"machine": machine_info(), "versions": versions(), "commit": commit()}
    for units in options.units:
        for name in SELECTORS:
            torch.manual_seed(0)
            row = measure(units, name, options.pairs)
            if fallbacks():
                raise SystemExit(f"a reference ran instead of a kernel: {fallbacks()}")
            whole = {"benchmark": "ffn", "units": units, "width": WIDTH, "selector": name, "threads": 1} | row
            with options.out.open("a") as file:
                file.write(json.dumps(whole | {"pairs": options.pairs} | about) + "\n")
            parts = (f"{job} {row[job]['value']:.0f}x" for job in ("training", "batch_1", "best_batch"))
            print(f"{units:6} units  {name:30} {'  '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
