"""A small decoder that learns text byte by byte in a few processor-minutes: dense, and with selective layers.

Every network gets the same processor-seconds of training on one thread; then what counts is how much it learns for
what it spends on a byte. Two selective layers are tried, alone and together: :class:`sparingly.SelectiveFFN` in place
of the feed-forward layer, and a bank of n-gram rows (:class:`sparingly.workloads._lm_model.NgramBank`, made of
``sp.SelectiveBag``), of which a byte reads five.

=====================  ============================================================  ================================
key                    network                                                       stands for
=====================  ============================================================  ================================
``selective``          bank and ``SelectiveFFN``                                     both
``bank``               bank, no feed-forward layer                                   the bank alone
``bank_no_attention``  bank and output layer only                                    the cheapest to decode
``dense_bank``         the bank in the plain dense decoder                           what ``SelectiveFFN`` adds to it
``dense_...``          plain dense decoders of several sizes, without a bank         the dense side of every claim
``twin``               ``selective`` with every unit of its ``SelectiveFFN`` active  same capacity
=====================  ============================================================  ================================

``selective`` is judged against the plain dense decoders; ``against_dense_bank`` says what is left of the difference
where the dense decoder has the bank as well. Of incumbents there is one that trains nothing: n-gram counts of the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.energy import count
from sparingly.nn import SelectiveFFN
from sparingly.optim import optimizer
from sparingly.selectors import ProductKey
from sparingly.workloads import _trained
from sparingly.workloads._fit import Recipe, fit
from sparingly.workloads._lm_model import CONTEXT, Compiled, Decoder, Engine, Modules, Onnx, Shape
from sparingly.workloads._parts import Say, document, parts_of
from sparingly.workloads._shares import difference
from sparingly.workloads._threads import one_thread
from sparingly.workloads._trained import Side, dense_ffn, fastest
from sparingly.workloads.lm_data import Corpus, Counts

TITLE = "A decoder of bytes trained in processor-minutes, with selective layers and without"
METRIC, COUNTS = "bits per byte of held-out text", "n-gram counts"
UNITS, ORDERS = 4096, (2, 3, 4, 5, 6)
SCORED = CONTEXT // 2
"""The last bytes of a window count, so that each has as many or more before it."""


def _dense(units: int) -> Callable[[int], nn.Module]:
    return partial(dense_ffn, units=units)


def _selective(width: int) -> nn.Module:
    return SelectiveFFN(width, UNITS, selector=ProductKey(heads=1, k=8, key_dim=8))


@dataclass(frozen=True)
class Network:
    """A shape, and how it is trained: learning rate, and windows of a step."""

    shape: Shape
    lr: float
    batch: int


NETWORKS = {
    "selective": Network(Shape(64, 1, _selective, ORDERS), 1e-2, 8),
    "bank": Network(Shape(64, 1, None, ORDERS), 1e-2, 8),
    "bank_no_attention": Network(Shape(32, 0, None, ORDERS), 1e-2, 8),
    "dense_bank": Network(Shape(64, 1, _dense(256), ORDERS), 1e-2, 8),
    "twin": Network(Shape(64, 1, _dense(UNITS), ORDERS), 5e-3, 8),
    "dense_32": Network(Shape(32, 1, _dense(128)), 1e-2, 4),
    "dense_64": Network(Shape(64, 1, _dense(256)), 1e-2, 4),
    "dense_96": Network(Shape(96, 1, _dense(384)), 5e-3, 4),
    "dense_64_2": Network(Shape(64, 2, _dense(256)), 5e-3, 4),
}
"""What each was tuned to, in bits per byte on development text after 30 processor-seconds of one thread (a virtual EPYC
beside other work):

==================================================================  ==================================================
dense, width 64, one layer: rate 5e-3, 1e-2, 2e-2                   2.807, 2.764, 3.504
the same: windows of a step 2 (two layers), 8 (half the units)      2.983, 2.926
dense, width 96, one layer: rate 5e-3, 1e-2                         2.802, 3.590
dense, two layers: width 64 at 5e-3, 8e-3; width 48; width 96       2.870, 2.915; 2.892; 3.073
dense, width 128, three layers, for 20 processor-seconds            4.003
bank, no feed-forward: rate 5e-3, 1e-2; 4 windows a step; width 32  2.072, 2.067; 2.125; 2.078
the same without attention, width 64, 32                            2.068, 2.051
the same with orders 2 to 6 and 8, four times the rows              2.082
bank and dense feed-forward of 256, 128 units                       2.114, 2.176 (4 windows a step)
bank and ``ProductKey(1, 8, 8)``, 4,096 units; (2, 16, 16), 16,384  2.157, 2.218
bank and ``Tree(2)``, 4,094 units; ``Tree(8)``                      2.157, 2.233
bank and ``Experts``, blocks of 32: one of 64, two of 128           2.178, 2.199
==================================================================  ==================================================

So short a training is a matter of bytes that a processor-second pays for: with a bank every feed-forward layer costs
more than it gives, and a selective one of few units costs as much to train as a dense one of 256 (8 ms more for a step
of 1,024 bytes than no such layer, which takes 19).
"""

BANKS = ("selective", "bank", "bank_no_attention", "dense_bank")
DENSE = ("dense_32", "dense_64", "dense_96", "dense_64_2")


@dataclass(frozen=True)
class Mode:
    """How much is done: processor-seconds of training for each network, and for those that are trained at length (0:
    none), test windows, pairs of timings, bytes that are counted (None: all), sizes of batches from which each side
    takes its best, networks with a bank, dense ones (the last is trained at length)."""

    name: str
    budget_s: float
    long_s: float
    windows: int
    pairs: int
    counted: int | None
    batches: tuple[int, ...]
    banks: tuple[str, ...]
    dense: tuple[str, ...]


SHORT = ("selective", "bank_no_attention", "dense_bank")
MODES = {
    "quick": Mode("quick", 2.5, 0.0, 120, 5, 1_000_000, (8,), SHORT, DENSE[:2]),
    "default": Mode("default", 40.0, 0.0, 800, 15, None, (8, 32), BANKS, DENSE),
    "full": Mode("full", 60.0, 300.0, 2000, 40, None, (8, 32, 128), BANKS, DENSE),
}


class _Scores(nn.Module):
    """Scores as losses take them: text uint8 [n, T] -> [n, SYMBOLS, T]."""

    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        return self.model(text).transpose(1, 2)


class Lm:
    """One run of the workload in one mode; every step is a part that is kept once it is done."""

    def __init__(self, mode: Mode, say: Say, *, fresh: bool = False):
        self.mode, self.say = mode, say
        self.parts = parts_of("lm", mode, fresh=fresh)
        self._models: dict[str, tuple[Decoder, float, int]] = {}
        self._sides: dict[str, Side] = {}
        self.names = (*mode.banks, "twin", *mode.dense)

    @cached_property
    def corpus(self) -> Corpus:
        self.say("reading the text", None)
        return Corpus()

    @cached_property
    def test(self) -> Tensor:
        """uint8 [windows, CONTEXT + 1] of held-out text."""
        return self.corpus.windows("test", self.mode.windows, CONTEXT + 1)

    def step_costs(self) -> dict[str, float]:
        """Processor-seconds of a training step of each network: medians, all of them in turns."""
        works, costs = {}, {}
        for name in self.names:
            torch.manual_seed(0)
            model = Decoder(NETWORKS[name].shape)
            works[name], costs[name] = _training(model, NETWORKS[name], self.corpus), []
        rounds = 4 if self.mode.budget_s < 10 else 24
        for turn in range(rounds):
            self.say("what a training step costs", turn / rounds)
            for name, work in works.items():
                start = time.process_time()
                for _ in range(3):
                    work()
                costs[name].append((time.process_time() - start) / 3)
        # The first half touches new memory.
        return {name: median(found[rounds // 2 :]) for name, found in costs.items()}

    def trained(self, name: str, budget_s: float | None = None) -> tuple[Decoder, float, int]:
        """The network after the budget, in evaluation mode, its processor-seconds, and bytes that it learned from."""
        label = name if budget_s is None else f"{name}_long"
        if label not in self._models:
            self._models[label] = self._train(name, label, budget_s)
        return self._models[label]

    def _train(self, name: str, label: str, budget_s: float | None) -> tuple[Decoder, float, int]:
        network, corpus = NETWORKS[name], self.corpus
        budget = budget_s or self.mode.budget_s
        steps = max(1, round(budget / self.parts.run("step_costs", self.step_costs)[name]))
        torch.manual_seed(0)
        model, generator = Decoder(network.shape), torch.Generator()

        def loss(model: nn.Module, step: int) -> Tensor:
            return _loss(model, corpus.sample(network.batch, CONTEXT + 1, generator.manual_seed(step)))

        recipe = Recipe(steps, network.lr, weight_decay=0.05, warmup=max(1, steps // 10))
        file = self.parts.folder / f"{label}.pt"
        done = fit(model, loss, recipe, tick=lambda part: self.say(f"training: {label}", part), file=file)
        return model, done.cpu_s, steps * network.batch * CONTEXT

    def quality(self, name: str, budget_s: float | None = None) -> dict[str, Any]:
        """Bits per byte of each window of development and test text, and what training took."""
        model, cpu_s, size = self.trained(name, budget_s)
        found: dict[str, Any] = {"training_cpu_s": cpu_s, "training_bytes": size}
        dev = self.corpus.windows("dev", max(1, self.mode.windows // 4), CONTEXT + 1)
        for part, windows in (("dev", dev), ("test", self.test)):
            bits = []
            for place, some in enumerate(windows.split(64)):
                self.say(f"held-out text: {name}", place * 64 / len(windows))
                with torch.no_grad():
                    bits.append(model.bits(some)[:, -SCORED:].mean(1))
            found[part] = torch.cat(bits).tolist()
        return found

    def counts(self) -> dict[str, Any]:
        """The incumbent: n-gram counts of the training text."""
        self.say("counting n-grams", None)
        text = self.corpus.parts["train"].numpy()[: self.mode.counted]
        start = time.process_time()
        counts = Counts(text)
        spent = time.process_time() - start
        bits = counts.bits(self.test.numpy())[:, -SCORED:].mean(1)
        return {"training_cpu_s": spent, "training_bytes": len(text), "test": bits.tolist()}

    def decoding(self) -> dict[str, dict[str, Any]]:
        """What a decoded byte costs with each network in its fastest engine, alone on one thread, and MACs and bytes
        by the ledger."""
        found = {}
        for name in self.names:
            self.say(f"what a decoded byte costs: {name}", None)
            side, model = self.fastest(name), self.trained(name)[0]
            with count() as ledger:
                self.decode(Modules(model)).work()
            row = {"cpu_s": side.seconds(), "engine": side.name, "macs": ledger.macs / CONTEXT}
            found[name] = row | {"bytes": ledger.bytes / CONTEXT}
        return found

    def decode(self, engine: Engine) -> Side:
        """Decoding a whole held-out window, other ones at each call."""
        windows = cycle(self.test[:, :CONTEXT].tolist())

        def work() -> None:
            engine.begin()
            for byte in next(windows):
                engine.step(byte)

        return Side(engine.name, work, CONTEXT)

    def fastest(self, name: str) -> Side:
        """Decoding with a network in the fastest engine that takes it."""
        if name not in self._sides:
            model = self.trained(name)[0]
            engines = [Modules(model), Compiled(model), *([Onnx(model)] if name in self.mode.dense else [])]
            # The engines are far apart.
            self._sides[name] = min(map(self.decode, engines), key=lambda side: side.seconds(rounds=1))
        return self._sides[name]

    def compared(self, dense: str, selective: str) -> dict[str, Any]:
        """Dense ÷ selective for a decoded byte, each in its fastest engine, with MACs and bytes."""
        self.say("decoding, in pairs", None)
        entry = _trained.saving(self.fastest(dense), self.fastest(selective), self.mode.pairs)
        plain = [self.decode(Modules(self.trained(name)[0])) for name in (dense, selective)]
        return _trained.counted(entry, *plain)

    def best_batch(self) -> dict[str, Any]:
        """The twin ÷ selective per byte of whole windows, each side at its best batch, in PyTorch."""
        self.say("many windows at once, in pairs", None)
        windows = self.test[:, :CONTEXT]
        return self._per_byte(lambda name, n: _trained.answers("pytorch", self.trained(name)[0], windows, n))

    def training(self) -> dict[str, Any]:
        """The twin ÷ selective per byte of a training step, each side at its best batch."""
        self.say("training steps, in pairs", None)
        windows = self.corpus.windows("train", 256, CONTEXT + 1)
        inputs, targets = windows[:, :-1], windows[:, 1:].long()
        models = {name: _Scores(Decoder(NETWORKS[name].shape)) for name in ("twin", "selective")}
        return self._per_byte(lambda name, n: _trained.step(models[name], inputs, targets, n))

    def _per_byte(self, side: Callable[[str, int], Side]) -> dict[str, Any]:
        """``side(name, n)``: a job of n windows. The twin ÷ selective, each at its best n."""
        best = [fastest([side(name, n) for n in self.mode.batches]) for name in ("twin", "selective")]
        dense, selective = (replace(one, examples=one.examples * CONTEXT) for one in best)
        return _trained.counted(_trained.saving(dense, selective, self.mode.pairs), dense, selective)

    @one_thread()
    def run(self) -> dict[str, Any]:
        """Every part, and the whole as the JSON's entry of this workload."""
        part, dense, more = self.parts.run, self.mode.dense, self.mode.banks[1:]
        found = {name: part(name, partial(self.quality, name)) for name in self.names}
        counts, costs = part("counts", self.counts), part("decoding", self.decoding)
        for name, row in found.items():
            row |= costs[name]
        # Development text says which network is taken, test text only what it is worth.
        best = min(dense, key=_dev(found))
        cheap = [name for name in dense if found[name]["cpu_s"] <= 1.05 * found["selective"]["cpu_s"]]
        equal = min(cheap or [dense[0]], key=_dev(found))
        own = np.array(found["selective"]["test"])
        methods = {"dense": found[best], "dense_same_capacity": found["twin"], "dense_equal_cost": found[equal]}
        every = methods | {name: found[name] for name in more} | {COUNTS: counts}
        gaps = {name: difference(own, np.array(row["test"])) for name, row in every.items()}
        sweep = [self._of_sweep(name, found) for name in dense]
        as_good = [row for row in sweep if _dev(found)(row["name"]) <= _dev(found)("selective")]
        entry: dict[str, Any] = {
            "title": TITLE,
            "text": {"sha256": self.corpus.sha256, "frozen": self.corpus.frozen},
            "quality": {
                "metric": METRIC,
                "unit": "bits per byte",
                "lower_is_better": True,
                "n": self.mode.windows,
                "selective": _public(found["selective"]),
                **{key: _public(row) for key, row in methods.items()},
                "incumbents": {COUNTS: _public(counts)},
                "differences": gaps,
            },
            "others": {name: _public(found[name]) for name in more},
            "equal_training": {"dense": best, **_lower(found, "selective", best)},
            "against_dense_bank": _lower(found, "selective", "dense_bank"),
            "training": part("training", self.training),
            "inference": {
                "batch_1": part("batch_1", lambda: self.compared("twin", "selective")),
                "best_batch": part("best_batch", self.best_batch),
            },
            "equal_quality": _cheapest(as_good) | {"sweep": sweep},
            "equal_cost": next(row for row in sweep if row["name"] == equal) | {"dense": equal},
            "as_good": self._as_good(found, best),
        }
        if self.mode.long_s:
            entry["at_length"] = self._at_length()
        return entry

    def _of_sweep(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        """A dense network: quality, and what a decoded byte costs ÷ with the selective one."""
        gap = difference(np.array(found["selective"]["test"]), np.array(found[name]["test"]))
        cost = self.parts.run(f"{name}_cost", lambda: self.compared(name, "selective"))
        return {"name": name, **_public(found[name]), "difference": gap, "batch_1": cost["saving"]["cpu_s"]}

    def _as_good(self, found: dict[str, Any], best: str) -> dict[str, Any] | None:
        """The best dense network ÷ the cheapest one with a bank that is as good, for a decoded byte; None: there is
        none.

        Where no dense network reaches ``selective``, this is what the same quality costs: the other side is made small.
        """
        as_good = [name for name in self.mode.banks if _dev(found)(name) <= _dev(found)(best)]
        if not as_good:
            return None
        chosen = min(as_good, key=lambda name: found[name]["cpu_s"])
        cost = self.parts.run("as_good", lambda: self.compared(best, chosen))
        return {"dense": best, "selective": chosen, **_lower(found, chosen, best), **cost}

    def _at_length(self) -> dict[str, Any]:
        """The largest dense network and two with a bank after the longest training of this mode."""
        names = (self.mode.dense[-1], "selective", "dense_bank")
        found = {name: self.parts.run(f"{name}_long", partial(self.quality, name, self.mode.long_s)) for name in names}
        own = np.array(found["selective"]["test"])
        gaps = {name: difference(own, np.array(row["test"])) for name, row in found.items() if name != "selective"}
        return {"networks": {name: _public(row) for name, row in found.items()}, "differences": gaps}


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of every byte of windows uint8 [n, T + 1] but the first."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten().long())


def _training(model: Decoder, network: Network, corpus: Corpus) -> Callable[[], None]:
    """A step of training, batch included."""
    optim, generator = optimizer(model, lr=network.lr), torch.Generator().manual_seed(0)

    def work() -> None:
        optim.zero_grad()
        _loss(model, corpus.sample(network.batch, CONTEXT + 1, generator)).backward()
        optim.step()

    return work


def _dev(found: dict[str, Any]) -> Callable[[str], float]:
    """Bits per byte of development text, by name."""
    return lambda name: float(np.mean(found[name]["dev"]))


def _lower(found: dict[str, Any], name: str, other: str) -> dict[str, Any]:
    """The paired difference of bits per byte, ``name`` minus ``other``, and how much lower it is as a share."""
    own, its = np.array(found[name]["test"]), np.array(found[other]["test"])
    return {"difference": difference(own, its), "lower_by": float(1 - own.mean() / its.mean())}


def _cheapest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The name of the cheapest dense network of a sweep, and its cost ÷ the selective one's; None without rows."""
    row = min(rows, key=lambda row: row["cpu_s"], default=None)
    return {"dense": None} if row is None else {"dense": row["name"], "batch_1": row["batch_1"]}


def _public(row: dict[str, Any]) -> dict[str, Any]:
    """A network's figures: bits per byte with the normal 95 % interval over windows in place of each window's."""
    bits = np.array(row["test"])
    rest = {name: value for name, value in row.items() if name not in ("dev", "test")}
    return {**difference(bits, np.zeros(len(bits))), "cpu_s": None, **rest}


def bench(mode: Mode, say: Say, *, fresh: bool = False) -> dict[str, Any]:
    """The whole JSON document of a run."""
    return document("lm", Lm(mode, say, fresh=fresh).run(), mode.name)
