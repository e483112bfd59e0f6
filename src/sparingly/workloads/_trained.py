"""A network that was trained selectively beside dense ones: the network's shape, and what both cost, paired."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.compare import Paired, paired
from sparingly.energy import Ledger, count
from sparingly.nn import compile_plan
from sparingly.optim import optimizer
from sparingly.workloads._onnx import session
from sparingly.workloads._threads import one_thread

TRAINING, ANSWERS = (128, 256, 512, 1024), (64, 256, 1024, 4096, 8192)
"""Batches that are tried."""

_PLAN = "one compiled call"
Work = Callable[[], object]
Engine = Callable[[Tensor], object]


class Residual(nn.Module):
    """x + ffn(norm(x)), with dropout before the sum."""

    def __init__(self, width: int, ffn: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.norm, self.ffn, self.dropout = nn.LayerNorm(width), ffn, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.ffn(self.norm(x)))


def mlp(
    ffn: Callable[[], nn.Module],
    inputs: int,
    width: int,
    outputs: int,
    dropout: float = 0.0,
    enter: nn.Module | None = None,
) -> nn.Sequential:
    """``inputs`` to ``width``, two residual blocks around what ``ffn`` makes, ``outputs``; ``enter``: in place of the
    first layer."""
    blocks = [Residual(width, ffn(), dropout) for _ in range(2)]
    first = nn.Linear(inputs, width) if enter is None else enter
    return nn.Sequential(first, *blocks, nn.LayerNorm(width), nn.Linear(width, outputs))


def dense_ffn(width: int, units: int) -> nn.Sequential:
    """The dense twin of a ``SelectiveFFN``: every unit active."""
    return nn.Sequential(nn.Linear(width, units), nn.GELU(), nn.Linear(units, width))


@dataclass(frozen=True)
class Side:
    """One way to do a job: its name, a call, how many examples that call serves, and how many of them together."""

    name: str
    work: Work
    examples: int
    batch: int = 1

    def seconds(self, rounds: int = 3) -> float:
        """Processor-seconds per example, the least of some rounds after one that warms up."""
        self.work()
        costs = []
        for _ in range(rounds):
            start = time.process_time()
            self.work()
            costs.append(time.process_time() - start)
        return min(costs) / self.examples


def fastest(sides: Sequence[Side], rounds: int = 3) -> Side:
    """The one that costs least per example, on one thread, at its best of some ``rounds``."""
    with one_thread():
        return min(sides, key=lambda side: side.seconds(rounds))


def onnx_engine(model: nn.Module, inputs: int) -> Engine:
    """``model`` [n, inputs] -> scores in ONNX Runtime on one thread. Raises ImportError without its packages."""
    made = session(model, (torch.randn(2, inputs),), {"x": {0: "batch"}, "y": {0: "batch"}})
    return lambda x: made.run(None, {"x": x.numpy()})


def answers(name: str, engine: Engine, inputs: Tensor, batch: int) -> Side:
    """Answers for ``batch`` of the inputs [n, d] at a time, other ones at each call: a single input would stay in the
    cache together with what it selects."""
    batch = min(batch, len(inputs))
    each = cycle(inputs[: len(inputs) // batch * batch].split(batch))
    # What runs without PyTorch does not wait for its modes.
    engine = torch.no_grad()(engine) if isinstance(engine, nn.Module) else engine

    def answer() -> None:
        engine(next(each))

    return Side(name if batch == 1 else f"{name}, batch {batch}", answer, batch)


def step(model: nn.Module, inputs: Tensor, targets: Tensor, batch: int) -> Side:
    """A step of training: forward, backward, optimiser. It changes the model."""
    optim = optimizer(model)
    model.train()
    batch = min(batch, len(inputs))
    whole = len(inputs) // batch * batch
    each = cycle(zip(inputs[:whole].split(batch), targets[:whole].split(batch), strict=True))

    def work() -> None:
        x, target = next(each)
        optim.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optim.step()

    return Side(f"batch {batch}", work, batch)


def saving(dense: Side, selective: Side, pairs: int) -> dict[str, Any]:
    """Dense ÷ selective processor time per example with its 95 % interval on one thread, and both sides' seconds."""
    # Long enough for each side to have its own weights in the caches again, as in a stream of its own.
    found: Paired = paired(dense.work, selective.work, pairs=pairs, warmup=2, threads=1, min_sample_s=0.02)
    factor = selective.examples / dense.examples
    return {
        "saving": {"cpu_s": {name: getattr(found, name) * factor for name in ("value", "lo", "hi")}},
        "dense_cpu_s": found.a_s / dense.examples,
        "selective_cpu_s": found.b_s / selective.examples,
        "engine": dense.name,
        "selective_engine": selective.name,
    }


def _ledgers(*works: Work) -> Iterator[Ledger]:
    for work in works:
        with count() as ledger:
            work()
        yield ledger


def counted(entry: dict[str, Any], dense: Side, selective: Side) -> dict[str, Any]:
    """``entry`` with MACs and bytes; both sides run in PyTorch, where they can be counted."""
    one, other = _ledgers(dense.work, selective.work)
    factor = selective.examples / dense.examples
    entry["saving"] |= {"macs": one.macs / other.macs * factor, "bytes": one.bytes / other.bytes * factor}
    return entry


def training_cost(
    dense: nn.Module, selective: nn.Module, inputs: Tensor, targets: Tensor, pairs: int
) -> dict[str, Any]:
    """Dense ÷ selective for one training example, each side at its fastest batch. Both models are changed by it."""
    sides = [fastest([step(model, inputs, targets, size) for size in TRAINING]) for model in (dense, selective)]
    return counted(saving(sides[0], sides[1], pairs), *sides)


def inference_cost(dense: nn.Module, selective: nn.Module, inputs: Tensor, pairs: int) -> dict[str, Any]:
    """Dense ÷ selective for one answer: one input at a time, and each side at its own best batch.

    Both models in evaluation mode, from inputs [n, d] to scores. The dense one runs in its fastest engine of PyTorch,
    ONNX Runtime and one compiled call, the selective one in PyTorch or as one compiled call.
    """
    size = inputs.shape[1]
    plans = [compile_plan(model) for model in (dense, selective)]
    theirs: dict[str, Engine] = {"pytorch": dense, "onnxruntime": onnx_engine(dense, size), _PLAN: plans[0]}
    ours: dict[str, Engine] = {"pytorch": selective, _PLAN: plans[1]}

    def best(engines: Mapping[str, Engine], sizes: Sequence[int]) -> Side:
        return fastest([answers(name, run, inputs, size) for name, run in engines.items() for size in sizes])

    result = {}
    for job, sizes in (("batch_1", (1,)), ("best_batch", ANSWERS)):
        one, other = best(theirs, sizes), best(ours, sizes)
        entry = saving(one, other, pairs)
        # No ledger sees into ONNX Runtime; while one counts, a plan's model runs.
        seen = [
            answers("", plan if side.name.startswith(_PLAN) else model, inputs, side.examples)
            for model, plan, side in zip((dense, selective), plans, (one, other), strict=True)
        ]
        result[job] = counted(entry, seen[0], seen[1])
    return result
