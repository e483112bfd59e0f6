"""EfficientNet-lite0 without a change of any answer: does skipping the zeros after ReLU6 get it cheaper?

Its pointwise convolutions are made selective (:class:`sparingly.nn.SelectiveConv`). Those that read a ReLU6 find half
of their inputs or more to be zero; the others read no zeros and go on dense. So do those that a paired timing does not
show to be faster than the best dense form of the same layer: with few outputs, finding the zeros costs more than they
would. All pixels of an image together need nearly every row of weights: what is spared is multiplications.

The selective network runs in PyTorch. Its job ``batch_1`` is against the best engine for the dense one, ``same_engine``
against the dense one in PyTorch, which tells what skipping does from what an engine does.
"""

from __future__ import annotations

import copy
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.compare import paired
from sparingly.convert import convert_
from sparingly.energy import count
from sparingly.explain import explain
from sparingly.nn.selective import reset, selective_modules
from sparingly.selectors import Zeros
from sparingly.workloads import relu_data as data
from sparingly.workloads._onnx import session
from sparingly.workloads._parts import Say, document, parts_of
from sparingly.workloads._shares import share
from sparingly.workloads._threads import one_thread
from sparingly.workloads.minilm import verdict

TITLE = "EfficientNet-lite0, zeros after ReLU6 skipped"
METRIC = "decisions equal to the dense network's"
BATCHES = (1, 8)


@dataclass(frozen=True)
class Mode:
    """How much is done: held-out crops, crops that are timed, timing pairs for the network and for each layer."""

    name: str
    held_out: int
    timed: int
    pairs: int
    layer_pairs: int


MODES = {
    "quick": Mode("quick", 42, 2, 8, 5),
    "default": Mode("default", 420, 4, 20, 11),
    "full": Mode("full", 4200, 8, 60, 31),
}


class Engine(ABC):
    """``name``, and float32; uses one thread if PyTorch does."""

    name: str

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """images [n, 3, 224, 224], contiguous -> scores [n, 1000]."""

    def __repr__(self) -> str:
        return f"{self.name} (fp32)"


class Modules(Engine):
    """PyTorch, module by module."""

    def __init__(self, model: nn.Module, layout: torch.memory_format = torch.channels_last):
        self.model, self.layout = model, layout
        self.name = "pytorch, channels_last" if layout == torch.channels_last else "pytorch"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images.to(memory_format=self.layout))


class Onnx(Engine):
    """ONNX Runtime on one thread. Raises ImportError without ``onnx`` and ``onnxruntime``."""

    name = "onnxruntime"

    def __init__(self, model: nn.Module):
        given = (torch.zeros(1, 3, data.SIDE, data.SIDE),)
        self._session = session(model, given, {"images": {0: "n"}, "scores": {0: "n"}})

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {"images": images.numpy()})[0])


class Relu:
    """One run of the workload in one mode; every step is a part that is kept once it is done."""

    def __init__(self, mode: Mode, say: Say, *, fresh: bool = False):
        self.mode, self.say = mode, say
        self.parts = parts_of("relu", mode, fresh=fresh)

    @cached_property
    def dense(self) -> nn.Module:
        """The dense twin."""
        return data.load_model()

    @cached_property
    def engines(self) -> dict[str, Engine]:
        """Every engine for the dense network."""
        turned = copy.deepcopy(self.dense).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        made = (Modules(self.dense, torch.contiguous_format), Modules(turned), Onnx(self.dense))
        return {engine.name: engine for engine in made}

    @cached_property
    def selective(self) -> Modules:
        """The converted network; every layer skips."""
        model: Any = copy.deepcopy(self.dense)
        model.to(memory_format=torch.channels_last)
        convert_(model, Zeros(), where="conv")
        return Modules(model)

    @cached_property
    def timed(self) -> Tensor:
        return data.crops(self.mode.timed, seed=1)

    def layers(self) -> list[dict[str, Any]]:
        """For each layer its share of inputs that ran; for those with zeros also dense ÷ selective time, and which of
        both should run."""
        model = self.selective.model
        inputs = self._inputs()
        rows = explain(model).as_dict()["layers"]
        for place, row in enumerate(rows):
            self.say("what each layer costs", place / len(rows))
            row["runs"] = "dense"
            if row["share_run"] < 1:
                layer, dense = model.get_submodule(row["name"]), self.dense.get_submodule(row["name"])
                row["saving"] = self._layer(dense, layer, inputs[row["name"]])
                row["runs"] = "selective" if row["saving"]["lo"] > 1 else "dense"
        return rows

    def _inputs(self) -> dict[str, list[Tensor]]:
        """What each selective layer reads for the timed crops; what ran before them is forgotten."""
        layers = selective_modules(self.selective.model)
        reset(self.selective.model)
        inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        hooks = [
            layer.register_forward_pre_hook(functools.partial(_keep, inputs[name])) for name, layer in layers.items()
        ]
        for image in self.timed.split(1):
            self.selective(image)
        for hook in hooks:
            hook.remove()
        return inputs

    @torch.inference_mode()
    def _layer(self, dense: Any, layer: Any, inputs: list[Tensor]) -> dict[str, float]:
        """Time of the faster of PyTorch's convolution and its product ÷ time of the selective layer, one thread."""
        weight = dense.weight.flatten(1)

        def product(x: Tensor) -> Tensor:
            return nn.functional.linear(x.movedim(1, -1), weight, dense.bias)

        best = min((_over(dense, inputs), _over(product, inputs)), key=_least)
        times = paired(best, _over(layer, inputs), pairs=self.mode.layer_pairs, threads=1, min_sample_s=0.02)
        return {"value": times.value, "lo": times.lo, "hi": times.hi}

    def quality(self) -> dict[str, Any]:
        """Decisions of both networks on held-out crops; in the selective one every layer skips."""
        n, size = self.mode.held_out, max(BATCHES)
        images, equal, largest = data.crops(n, seed=2), [], 0.0
        for place, batch in enumerate(images.split(size)):
            self.say("held-out crops by both networks", place * size / n)
            dense, own = self.engines["pytorch"](batch), self.selective(batch)
            equal.append((dense.argmax(1) == own.argmax(1)).numpy())
            largest = max(largest, float((dense - own).abs().max() / dense.abs().max()))
        same = share(np.concatenate(equal))
        return {"metric": METRIC, "n": n, "equal": same, "largest_difference": largest}

    def batch_1(self, runs: Sequence[str]) -> dict[str, Any]:
        """One image at a time, the best engine for the dense network."""
        return self._job(runs, list(self.engines.values()), (1, 1))

    def same_engine(self, runs: Sequence[str]) -> dict[str, Any]:
        """One image at a time, the dense network in PyTorch too."""
        return self._job(runs, [engine for engine in self.engines.values() if isinstance(engine, Modules)], (1, 1))

    def best_batch(self, runs: Sequence[str]) -> dict[str, Any]:
        """Each side at its own best batch, the best engine for the dense network."""
        self._run_only(runs)
        images = self.timed.repeat(max(BATCHES), 1, 1, 1)[: max(BATCHES)]
        engines = list(self.engines.values())
        sizes = []
        for side in (engines, [self.selective]):
            costs = {size: min(_least(_over(one, images.split(size)), 2) for one in side) for size in BATCHES}
            sizes.append(min(costs, key=costs.__getitem__))
        entry = self._job(runs, engines, (sizes[0], sizes[1]), images)
        return entry | {"dense_batch": sizes[0], "selective_batch": sizes[1]}

    def _run_only(self, runs: Sequence[str]) -> None:
        for name, layer in selective_modules(self.selective.model).items():
            layer.off = name not in runs

    def _job(
        self, runs: Sequence[str], engines: list[Engine], sizes: tuple[int, int], images: Tensor | None = None
    ) -> dict[str, Any]:
        """Dense ÷ selective for one image on the three rulers, one thread; ``runs``: layers that skip."""
        self.say("what an answer costs", None)
        self._run_only(runs)
        images = self.timed if images is None else images
        dense, own = (images.split(size) for size in sizes)
        tried = {engine.name: _least(_over(engine, dense)) / len(images) for engine in engines}
        best = next(engine for engine in engines if engine.name == min(tried, key=tried.__getitem__))
        work = _over(best, dense), _over(self.selective, own)
        times = paired(*work, pairs=self.mode.pairs, threads=1, min_sample_s=0.05)
        ledgers = []
        # No ledger sees into ONNX Runtime: the dense network's work is counted in PyTorch.
        for engine, batches in ((self.engines["pytorch, channels_last"], dense), (self.selective, own)):
            with count() as ledger:
                _over(engine, batches)()
            ledgers.append(ledger)
        saving = {
            "cpu_s": {"value": times.value, "lo": times.lo, "hi": times.hi},
            "macs": ledgers[0].macs / ledgers[1].macs,
            "bytes": ledgers[0].bytes / ledgers[1].bytes,
        }
        skipped = {name: (getattr(ledgers[0], name) - getattr(ledgers[1], name)) / len(images) for name in _COUNTS}
        return {
            "saving": saving,
            "runs": verdict(saving),
            "skipped": skipped,
            "layers": len(runs),
            "dense_cpu_s": times.a_s / len(images),
            "selective_cpu_s": times.b_s / len(images),
            "engine": f"{best!r}, 1 thread",
            "dense_tried": tried,
        }

    @one_thread()
    def run(self) -> dict[str, Any]:
        """Every part, and the whole as the JSON's entry of this workload."""
        part = self.parts.run
        quality = part("quality", self.quality)
        layers = part("layers", self.layers)
        zeros = [row["name"] for row in layers if "saving" in row]
        pays = [row["name"] for row in layers if row["runs"] == "selective"]
        jobs = {"batch_1": self.batch_1, "best_batch": self.best_batch, "same_engine": self.same_engine}
        inference = {name: part(name, lambda work=work: work(pays)) for name, work in jobs.items()}
        inference["every_layer"] = part("every_layer", lambda: self.same_engine(zeros))
        return {
            "title": TITLE,
            "quality": {name: quality[name] for name in ("metric", "n")},
            "agreement": quality["equal"],
            "contract": {"lossless": True, "n": quality["n"], "largest_difference": quality["largest_difference"]},
            "inference": inference,
            "layers": layers,
        }


_COUNTS = ("macs", "bytes")


def _over(run: Callable[[Tensor], Any], inputs: Sequence[Tensor]) -> Callable[[], None]:
    def work() -> None:
        for x in inputs:
            run(x)

    return work


def _keep(kept: list[Tensor], _layer: nn.Module, given: tuple[Tensor, ...]) -> None:
    kept.append(given[0])


def _least(work: Callable[[], None], rounds: int = 3) -> float:
    """The least processor-seconds of some rounds, after one that warms up."""
    costs = []
    for _ in range(rounds + 1):
        start = time.process_time()
        work()
        costs.append(time.process_time() - start)
    return min(costs[1:])


def bench(mode: Mode, say: Say, *, fresh: bool = False) -> dict[str, Any]:
    """The whole JSON document of a run."""
    return document("relu", Relu(mode, say, fresh=fresh).run(), mode.name)
