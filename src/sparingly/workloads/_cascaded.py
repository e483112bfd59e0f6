"""A cascade, or a network with exits, beside the large network in it: quality, contract, and what an answer costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparingly.calibrate import calibrate
from sparingly.contract import Contract
from sparingly.energy import count
from sparingly.nn.cascade import NEVER, Cascade, Staged
from sparingly.workloads._parts import Parts, Say
from sparingly.workloads._shares import difference, share
from sparingly.workloads._threads import one_thread
from sparingly.workloads._trained import Side, fastest, saving

MAX_DROP, CONFIDENCE, RESPLITS = 0.005, 0.95, 20
"""What the contracts promise, and on how many other splits of the same examples it is tried whether they keep it."""

EXAMPLES = 3
"""So many inputs are shown that left at a stage."""

Engine = Callable[[Any], object]


@dataclass(frozen=True)
class Answers:
    """What stages in rising order of cost answer, the large network last: names, probabilities float32 [n, classes]
    each, and the right classes, int64 [n]."""

    names: Sequence[str]
    stages: Sequence[Tensor]
    labels: Tensor

    def right(self, stage: int) -> Tensor:
        """bool [n]."""
        return self.stages[stage].argmax(1) == self.labels

    def calibrated(self, ids: Tensor, measure: str = "maximum", say: Say | None = None) -> tuple[Cascade, Contract]:
        """A cascade of these answers, which takes ids of examples, int64 [n], and the contract that it got on ``ids``.

        Its thresholds and contract are those that the cascade of the models themselves would get.
        """

        def known(probabilities: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda ids: probabilities[ids]

        model = Cascade([known(stage) for stage in self.stages], measure=measure)
        data = (ids, self.labels[ids])
        return model, calibrate(model, data, "accuracy", MAX_DROP, CONFIDENCE, progress=say)


def gather(model: Staged, inputs: Any, labels: Tensor, say: Say, names: Sequence[str], batch: int = 256) -> Answers:
    """Ask every stage of ``model``, which are called ``names``, about all inputs (a tensor, an array or a list), in
    batches."""
    parts = []
    for start in range(0, len(labels), batch):
        say("asking every stage", start / len(labels))
        parts.append(model.stage_answers(inputs[start : start + batch]))
    return Answers(names, [torch.cat(stage) for stage in zip(*parts, strict=True)], labels)


def judge(
    answers: Answers, calibration: Tensor, test: Tensor, measure: str = "maximum"
) -> tuple[dict[str, Any], np.ndarray]:
    """Calibrate on some examples and test on others, ids int64 [n] each, that no stage was trained on.

    Returns thresholds, contract, accuracy, who leaves where and how other splits of the same examples come out; and
    which of the test examples the cascade gets right, bool [n].
    """
    model, contract = answers.calibrated(calibration, measure)
    own = model(test).argmax(1) == answers.labels[test]
    large = answers.right(-1)[test]
    stages = []
    for place, (name, threshold) in enumerate(zip(answers.names, [*model.thresholds.tolist(), NEVER], strict=True)):
        left = model.exits == place
        stages.append({
            "name": name,
            "threshold": None if threshold == NEVER else threshold,
            "alone": share(answers.right(place)[test].numpy()),
            "left": float(left.double().mean()),
            "right_of_those": float(own[left].double().mean()) if left.any() else None,
            "examples": test[left.nonzero()[:EXAMPLES, 0]].tolist(),
        })  # fmt: skip
    return {
        "n": len(test),
        "stages": stages,
        "selective": share(own.numpy()),
        "large": share(large.numpy()),
        "difference": difference(own.numpy(), large.numpy()),
        "contract": contract.as_dict(),
        "resplits": resplits(answers, torch.cat([calibration, test]), len(calibration), measure),
    }, own.numpy()


def resplits(answers: Answers, ids: Tensor, calibrating: int, measure: str = "maximum") -> dict[str, Any]:
    """Split the examples ``ids`` anew, RESPLITS times: ``calibrating`` of them calibrate, the others are fresh.

    ``drops``: how much less of the fresh ones the cascade gets right than the large network; ``kept``: of how many
    splits that is at most MAX_DROP. Fresh examples are finitely many, so a promise of 95 % that is used up to the last
    can look broken a little more often than in 5 % of the splits.
    """
    drops, left = [], []
    for seed in range(RESPLITS):
        order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed + 1))]
        fresh = order[calibrating:]
        model, _ = answers.calibrated(order[:calibrating], measure)
        own = model(fresh).argmax(1) == answers.labels[fresh]
        drops.append(float(answers.right(-1)[fresh].double().mean() - own.double().mean()))
        left.append(float((model.exits == len(answers.stages) - 1).double().mean()))
    return {
        "kept": sum(drop <= MAX_DROP for drop in drops),
        "of": RESPLITS,
        "calibrating": calibrating,
        "fresh": len(ids) - calibrating,
        "drops": drops,
        "to_large": left,
    }


def singles(own: np.ndarray, rights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Name of a single network -> its share of right answers, and the ``difference``, cascade minus that; bool [n]
    each, of the same examples."""
    return {name: share(right) | {"difference": difference(own, right)} for name, right in rights.items()}


def thresholds_of(found: Mapping[str, Any]) -> list[float]:
    """The thresholds of :func:`judge`."""
    return [NEVER if stage["threshold"] is None else stage["threshold"] for stage in found["stages"][:-1]]


def set_thresholds(model: Staged, found: Mapping[str, Any]) -> None:
    """Give the models themselves the thresholds of :func:`judge`."""
    model.thresholds.copy_(torch.tensor(thresholds_of(found), dtype=torch.float64))


def side(name: str, engine: Engine, inputs: Any, batch: int, chunk: int) -> Side:
    """Answers for ``chunk`` inputs (of a tensor or list) in batches of ``batch``, other inputs at each call.

    A sample has to hold many inputs, because most cost next to nothing and some a hundred times as much; both sides
    get the same ones in the same order.
    """
    batch = min(batch, len(inputs))
    size = min(len(inputs), max(chunk, batch)) // batch * batch
    starts = range(0, len(inputs) - size + 1, size)
    each = cycle([[inputs[at : at + batch] for at in range(start, start + size, batch)] for start in starts])
    engine = torch.no_grad()(engine) if isinstance(engine, torch.nn.Module) else engine

    def answer() -> None:
        for part in next(each):
            engine(part)

    return Side(name if batch == 1 else f"{name}, batch {batch}", answer, size, batch)


@dataclass(frozen=True)
class Setting:
    """How costs are measured: inputs (a tensor or list), batches that are tried, inputs in a sample at batch 1 and at
    other batches, and pairs of samples."""

    inputs: Any
    batches: Sequence[int] = (16, 64, 256)
    chunks: tuple[int, int] = (256, 1024)
    pairs: int = 15

    def best(self, engines: Mapping[str, Engine], job: str) -> Side:
        """The cheapest way to do a job, "batch_1" or "best_batch", on one thread."""
        sizes, chunk = ((1,), self.chunks[0]) if job == "batch_1" else (self.batches, self.chunks[1])
        ways = [side(name, run, self.inputs, size, chunk) for name, run in engines.items() for size in sizes]
        return ways[0] if len(ways) == 1 else fastest(ways, rounds=1)


JOBS = ("batch_1", "best_batch")


def inference(
    large: Mapping[str, Engine],
    own: Mapping[str, Engine],
    setting: Setting,
    counted: tuple[Engine, Engine] | None = None,
) -> dict[str, Any]:
    """Large ÷ cascade for one answer, one input at a time and each side at its own best batch; engines by name.

    ``counted``: both sides in PyTorch, where MACs and bytes can be counted; over the inputs of one sample.
    """
    found = {}
    for job in JOBS:
        sides = setting.best(large, job), setting.best(own, job)
        found[job] = saving(*sides, setting.pairs)
        if counted is not None:
            chunk = setting.chunks[job != "batch_1"]
            ledgers = []
            for run, one in zip(counted, sides, strict=True):
                same = side("", run, setting.inputs, one.batch, chunk)
                with torch.no_grad(), count() as ledger:
                    same.work()
                ledgers.append((ledger.macs / same.examples, ledger.bytes / same.examples))
            found[job]["saving"] |= {
                name: ledgers[0][place] / ledgers[1][place] for place, name in enumerate(("macs", "bytes"))
            }
    return found


def beside(engines: Mapping[str, Engine], own: Mapping[str, Engine], setting: Setting) -> dict[str, Any]:
    """What an answer of a single network costs, and ÷ the cascade's, by job."""
    found = {job: saving(setting.best(engines, job), setting.best(own, job), setting.pairs) for job in JOBS}
    ratios = {job: entry["saving"]["cpu_s"] for job, entry in found.items()}
    return {"cpu_s": found["batch_1"]["dense_cpu_s"], "engine": found["batch_1"]["engine"], **ratios}


def sweep(
    ways: Mapping[str, Mapping[str, Engine]],
    own: Mapping[str, Engine],
    found: Mapping[str, Any],
    setting: Setting,
    say: Say,
) -> list[dict[str, Any]]:
    """A row for each single network: name -> engines; its quality, of ``found["singles"]``, and :func:`beside`."""
    rows = []
    for place, (name, engines) in enumerate(ways.items()):
        say("what single networks cost", place / len(ways))
        rows.append({"name": name, **found["singles"][name], **beside(engines, own, setting)})
    return rows


def equal_quality(value: float, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cheapest single network that reaches ``value``, by its cost at batch 1, and the whole sweep.

    Rows hold a ``name``, a share of right answers, ``difference``, and what :func:`beside` gives.
    """
    best = min((row for row in rows if row["value"] >= value), key=lambda row: row["cpu_s"], default=None)
    reached = {} if best is None else {job: best[job] for job in JOBS}
    return {"dense": None if best is None else best["name"], **reached, "sweep": rows}


class Steps(Protocol):
    """What a workload measures: ``quality`` as :func:`judge` gives it, with ``singles`` (name -> its share of right
    answers and ``difference``) and ``training_cpu_s``; ``costs`` as :func:`inference`; ``sweep``: a row for each single
    network, with what :func:`beside` gives."""

    parts: Parts

    def quality(self) -> dict[str, Any]: ...

    def costs(self, found: Mapping[str, Any]) -> dict[str, Any]: ...

    def sweep(self, found: Mapping[str, Any]) -> list[dict[str, Any]]: ...


def run(steps: Steps, title: str, metric: str, incumbents: Sequence[str]) -> dict[str, Any]:
    """Every part of a workload on one thread, and the whole as its entry in the JSON.

    ``incumbents``: rows of the sweep that one would use instead.
    """
    with one_thread():
        found = steps.parts.run("quality", steps.quality)
        costs = steps.parts.run("costs", lambda: steps.costs(found))
        rows = steps.parts.run("sweep", lambda: steps.sweep(found))
    others = {row["name"]: row for row in rows if row["name"] in incumbents}
    one = costs["batch_1"]
    return {
        "title": title,
        "quality": {
            "metric": metric,
            "n": found["n"],
            "selective": found["selective"] | {"cpu_s": one["selective_cpu_s"]},
            "large": found["large"] | {"cpu_s": one["dense_cpu_s"]},
            "incumbents": {
                name: {key: row[key] for key in ("value", "lo", "hi", "cpu_s")} for name, row in others.items()
            },
            "differences": {"large": found["difference"], **{name: row["difference"] for name, row in others.items()}},
        },
        "inference": costs,
        "equal_quality": equal_quality(found["selective"]["value"], rows),
        "contract": found["contract"],
        "stages": found["stages"],
        "resplits": found["resplits"],
        "training_cpu_s": found["training_cpu_s"],
    }
