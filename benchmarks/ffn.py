"""Layers of many units of which few run, against the same network with every unit active.

    python benchmarks/ffn.py [--units 16384 65536] [--pairs 15]

The network: 784 inputs, width 128, two residual blocks of that many units, 10 outputs, on random inputs. Per selector
one line is appended to results/ffn.jsonl: dense cost over selective, processor time as medians of paired ratios with
their 95 % intervals, one thread, for

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sparingly as sp
from sparingly.energy.machine import commit, machine_info, versions
from sparingly.ops import fallbacks
from sparingly.workloads._trained import dense_ffn, inference_cost, mlp, training_cost

IN, WIDTH, OUT = 784, 128, 10
SELECTORS: dict[str, tuple[int, Callable[[], sp.Selector]]] = {
    "ProductKey(4, 16)": (1, lambda: sp.ProductKey(heads=4, k=16)),
    "ProductKey(2, 16, key_dim=16)": (1, lambda: sp.ProductKey(heads=2, k=16, key_dim=16)),
    "Experts(2), block 32": (32, lambda: sp.Experts(k=2)),
    "Tree(4)": (1, lambda: sp.Tree(trees=4)),
}


def measure(units: int, name: str, pairs: int) -> dict[str, Any]:
    block, selector = SELECTORS[name]
    dense = mlp(lambda: dense_ffn(WIDTH, units), IN, WIDTH, OUT)
    model = mlp(lambda: sp.SelectiveFFN(WIDTH, units, selector=selector(), block=block), IN, WIDTH, OUT)
    inputs, targets = torch.randn(4096, IN), torch.randint(OUT, (4096,))
    row = {"training": training_cost(dense, model, inputs, targets, pairs)}
    return row | inference_cost(dense.eval(), model.eval(), inputs, pairs)


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
            parts = (
                f"{job} {row[job]['saving']['cpu_s']['value']:.0f}x" for job in ("training", "batch_1", "best_batch")
            )
            print(f"{units:6} units  {name:30} {'  '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
