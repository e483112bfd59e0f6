"""all-MiniLM-L6-v2 made selective without training: does finding packages by one line get cheaper?

An encoder reads a whole sentence at once: 12 tokens of a query, a hundred of a description. What one token leaves out
another needs, so few rows of weights go unread; what can be spared is multiplications. The dense network runs in the
best engine that was found, ONNX Runtime, the selective one in the same with a compiled call that skips
(``_encoders.py``).

The contract is about queries: an index of descriptions, embedded once by the dense network, stays as it is, and at
which rank a query finds its own description depends on that query alone. So queries are independent draws, which the
guard assumes; ranks among candidates that the setting moves as well would not be. On the held-out part queries and
index are both embedded by the selective network, which is the harder test and the figure that is shown.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.calibrate import calibrate
from sparingly.compare import paired
from sparingly.convert import convert_
from sparingly.energy import count
from sparingly.explain import explain
from sparingly.metrics import Metric
from sparingly.nn.selective import needed_layers, reset
from sparingly.selectors import Threshold
from sparingly.store import load, save
from sparingly.workloads import minilm_data as data
from sparingly.workloads._encoders import Engine, Modules, Onnx, Slim
from sparingly.workloads._parts import Say, cache_folder, document, parts_of
from sparingly.workloads._shares import difference, share
from sparingly.workloads._threads import one_thread

TITLE = "all-MiniLM-L6-v2, converted without training"
METRIC, MAX_DROP, CONFIDENCE = "MRR at 10", 0.01, 0.95
BATCHES = (1, 4, 16, 32)


@dataclass(frozen=True)
class Mode:
    """How much is done: packages to calibrate on and held-out ones (each also the candidates), timing pairs, and how
    many queries and descriptions are timed."""

    name: str
    calibration: int
    held_out: int
    pairs: int
    queries: int
    descriptions: int


MODES = {
    "quick": Mode("quick", 420, 120, 6, 16, 4),
    "default": Mode("default", 2000, 1000, 20, 32, 6),
    "full": Mode("full", 6000, 6000, 40, 48, 12),
}


class MiniLM:
    """One run of the workload in one mode; every step is a part that is kept once it is done."""

    def __init__(self, mode: Mode, say: Say, *, fresh: bool = False):
        self.mode, self.say = mode, say
        self.parts = parts_of("minilm", mode, fresh=fresh)
        self.folder = cache_folder() / f"minilm-{mode.name}-model"

    @cached_property
    def descriptions(self) -> data.Descriptions:
        return data.Descriptions.load()

    @cached_property
    def tokenizer(self) -> Any:
        return data.load_tokenizer()

    @cached_property
    def dense(self) -> Any:
        """The dense twin."""
        return data.load_model()

    @cached_property
    def dense_engine(self) -> Onnx:
        return Onnx(self.dense)

    @cached_property
    def selective(self) -> Any:
        """The converted and calibrated network."""
        return load(self.folder).eval()

    @cached_property
    def engine(self) -> Onnx:
        """What answers under the contract: the dense engine where nothing passed."""
        selects = any(not layer.off for layer in needed_layers(self.selective).values())
        return Onnx(self.selective) if selects else self.dense_engine

    def tokens(self, part: str, which: str, n: int) -> list[Tensor]:
        """The short or the long descriptions of a part's first packages, int64 [1, tokens] each."""
        texts = [getattr(package, which) for package in self.descriptions.part(part, n)]
        ids = self.tokenizer(texts, truncation=True, max_length=data.MAX_TOKENS)["input_ids"]
        return [torch.tensor([row]) for row in ids]

    def embed(self, engine: Engine, sentences: Sequence[Tensor], what: str) -> Tensor:
        """One after the other -> float32 [sentences, 384]."""
        vectors = []
        for place, ids in enumerate(sentences):
            if place % 50 == 0:
                self.say(what, place / len(sentences))
            vectors.append(engine.embed(ids).clone())
        return torch.cat(vectors)

    def convert(self) -> dict[str, Any]:
        """Convert, calibrate queries against an index by the dense network, save."""
        n = self.mode.calibration
        long = self.tokens("calibration", "long", n)
        start = time.process_time()
        index = self.embed(self.dense_engine, long, "calibration: descriptions by the dense network")
        model = copy.deepcopy(self.dense)
        convert_(model, Threshold(), where="mlp")
        contract = calibrate(
            model, by_length(self.tokens("calibration", "short", n), 32), reciprocal_rank(Onnx(model), index),
            MAX_DROP, CONFIDENCE, progress=lambda what, part: self.say(f"making it selective: {what}", part),
        )  # fmt: skip
        spent = time.process_time() - start
        save(model, self.folder)
        return {"contract": contract.as_dict(), "cpu_s": spent}

    def quality(self) -> dict[str, Any]:
        """MRR at 10 and recall at 1 among held-out descriptions, index and queries by one network or a dense index."""
        n = self.mode.held_out
        embedded = {}
        for side, engine in (("dense", self.dense_engine), ("selective", self.engine)):
            for which in ("short", "long"):
                what = f"held-out {which} descriptions, {side} network"
                embedded[side, which] = self.embed(engine, self.tokens("held_out", which, n), what)
        dense_index, own_index = embedded["dense", "long"], embedded["selective", "long"]
        dense = data.ranks(embedded["dense", "short"], dense_index)
        own = data.ranks(embedded["selective", "short"], own_index)
        fixed = data.ranks(embedded["selective", "short"], dense_index)
        same = (embedded["selective", "short"] @ own_index.t()).argmax(1)
        first = (embedded["dense", "short"] @ dense_index.t()).argmax(1)
        return {
            "metric": METRIC,
            "n": n,
            **_reciprocals(dense, own),
            "index by the dense network": _reciprocals(dense, fixed),
            "recall at 1": _recalls(dense, own),
            "agreement": share((same == first).numpy()),
            "text_sha256": self.descriptions.sha256,
        }

    @cached_property
    def timed(self) -> list[Tensor]:
        """Held-out queries of the commonest lengths, as many of each, so that they can be batched without padding."""
        sentences = self.tokens("held_out", "short", self.mode.held_out)
        lengths = Counter(ids.shape[1] for ids in sentences)
        size = max(BATCHES)
        usual = [length for length, found in lengths.most_common(3) if found >= size] or [lengths.most_common(1)[0][0]]
        groups = [[ids for ids in sentences if ids.shape[1] == length][:size] for length in usual]
        return [ids for group in groups for ids in group]

    def batch_1(self) -> dict[str, Any]:
        """One query at a time, of every length."""
        return self._job([[ids] for ids in self.tokens("held_out", "short", self.mode.queries)], None, "one query")

    def description(self) -> dict[str, Any]:
        """One long description at a time."""
        chosen = self.tokens("held_out", "long", self.mode.descriptions)
        return self._job([[ids] for ids in chosen], None, "one description")

    def best_batch(self) -> dict[str, Any]:
        """Queries of one length together, each side at its own best batch."""
        sizes = []
        for engine in (self.dense_engine, self.engine):
            costs = {size: _cheapest(engine, _together(self.timed, size)) for size in BATCHES}
            sizes.append(min(costs, key=costs.__getitem__))
        dense, own = (_together(self.timed, size) for size in sizes)
        entry = self._job(dense, own, "batches of queries")
        return entry | {"dense_batch": sizes[0], "selective_batch": sizes[1]}

    def _job(self, dense: list[list[Tensor]], own: list[list[Tensor]] | None, what: str) -> dict[str, Any]:
        """Dense ÷ selective for one sentence of these batches on the three rulers, one thread."""
        self.say(f"what {what} costs", None)
        own = dense if own is None else own
        engines = self._dense_engines()
        with one_thread():
            tried = {name: _cheapest(engine, dense) for name, engine in engines.items()}
            best = engines[min(tried, key=tried.__getitem__)]
            times = paired(
                _work(best, dense), _work(self.engine, own), pairs=self.mode.pairs, threads=1, min_sample_s=0.05
            )
            ledgers = [_ledger(Slim(model), batches) for model, batches in ((self.dense, dense), (self.selective, own))]
        sentences = sum(len(ids) for batch in dense for ids in batch)
        saving = {
            "cpu_s": {"value": times.value, "lo": times.lo, "hi": times.hi},
            "macs": ledgers[0].macs / ledgers[1].macs,
            "bytes": ledgers[0].bytes / ledgers[1].bytes,
        }
        return {
            "saving": saving,
            "runs": verdict(saving),
            "dense_cpu_s": times.a_s / sentences,
            "selective_cpu_s": times.b_s / sentences,
            "engine": f"{best!r}, 1 thread",
            "dense_tried": tried,
            "tokens": float(np.mean([ids.shape[1] for batch in dense for ids in batch])),
        }

    def _dense_engines(self) -> dict[str, Engine]:
        return {made.name: made for made in (self.dense_engine, Slim(self.dense), Modules(self.dense))}

    def layers(self) -> list[dict[str, Any]]:
        """What each selective layer did for the timed queries."""
        reset(self.selective)
        for ids in self.timed:
            self.engine.embed(ids)
        return explain(self.selective).as_dict()["layers"]

    def run(self) -> dict[str, Any]:
        """Every part, and the whole as the JSON's entry of this workload."""
        part = self.parts.run
        made = part("convert", self.convert)
        quality = part("quality", self.quality)
        agreement = quality.pop("agreement")
        jobs = {"batch_1": self.batch_1, "best_batch": self.best_batch, "description": self.description}
        return {
            "title": TITLE,
            "quality": quality,
            "agreement": agreement,
            "contract": made["contract"],
            "calibration_cpu_s": made["cpu_s"],
            "inference": {name: part(name, work) for name, work in jobs.items()},
            "layers": part("layers", self.layers),
        }


def by_length(sentences: Sequence[Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    """Sentences int64 [1, tokens] -> batches of one length: (ids [n, tokens], their places int64 [n]), in the order in
    which they fill up, so that every part of the list holds all lengths."""
    waiting: dict[int, list[int]] = {}
    groups = []
    for place, ids in enumerate(sentences):
        group = waiting.setdefault(ids.shape[1], [])
        group.append(place)
        if len(group) == size:
            groups.append(waiting.pop(ids.shape[1]))
    groups += waiting.values()
    return [(torch.cat([sentences[place] for place in group]), torch.tensor(group)) for group in groups]


def reciprocal_rank(engine: Engine, index: Tensor) -> Metric:
    """1 ÷ the rank of a query's own description among a fixed ``index`` [descriptions, width], 0 beyond the tenth.

    A batch is (ids int64 [n, tokens], place of the right description [n]). ``engine`` runs the model that is observed:
    selection that is switched off or set otherwise shows in it at once.
    """

    def observe(_model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, places = batch
        scores = engine.embed(ids) @ index.t()
        if scores.isnan().any():
            raise ValueError("an embedding holds NaN")
        # As in minilm_data.ranks, equal scores count against the right one.
        rank = (scores >= scores.gather(1, places.unsqueeze(1))).sum(1)
        return 1 - data.reciprocal_at_10(rank).double()

    return Metric(METRIC, observe, (0.0, 1.0), higher_is_better=True, quality_of=lambda loss: 1.0 - loss)


def verdict(saving: dict[str, Any]) -> str:
    """Which network should serve: the selective one only where every ruler shows a saving."""
    shown = saving["cpu_s"]["lo"] > 1 and min(saving["macs"], saving["bytes"]) > 1
    return "selective" if shown else "dense"


def _recalls(dense: Tensor, own: Tensor) -> dict[str, Any]:
    """Ranks of both [n] -> shares of first ranks, and what is lost, paired."""
    a, b = ((ranks == 1).numpy() for ranks in (dense, own))
    return {"dense": share(a), "selective": share(b), "drop": difference(a, b)}


def _reciprocals(dense: Tensor, own: Tensor) -> dict[str, Any]:
    """Ranks of both [n] -> MRR at 10 of both, and what is lost, paired."""
    a, b = (data.reciprocal_at_10(ranks).double().numpy() for ranks in (dense, own))
    return {"dense": {"value": float(a.mean())}, "selective": {"value": float(b.mean())}, "drop": difference(a, b)}


def _together(sentences: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    return [[ids] for ids, _ in by_length(sentences, size)]


def _work(engine: Engine, batches: list[list[Tensor]]) -> Callable[[], None]:
    def embed() -> None:
        for batch in batches:
            for ids in batch:
                engine.embed(ids)

    return embed


def _cheapest(engine: Engine, batches: list[list[Tensor]], rounds: int = 3) -> float:
    """The least processor-seconds per sentence of some rounds, after one that warms up."""
    work, costs = _work(engine, batches), []
    for _ in range(rounds + 1):
        start = time.process_time()
        work()
        costs.append(time.process_time() - start)
    return min(costs[1:]) / sum(len(ids) for batch in batches for ids in batch)


def _ledger(engine: Engine, batches: list[list[Tensor]]) -> Any:
    engine.embed(batches[0][0])  # What is made once is not part of every answer.
    with count() as ledger:
        _work(engine, batches)()
    return ledger


def bench(mode: Mode, say: Say, *, fresh: bool = False) -> dict[str, Any]:
    """The whole JSON document of a run."""
    return document("minilm", MiniLM(mode, say, fresh=fresh).run(), mode.name)
