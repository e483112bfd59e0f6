"""Which of 148 languages is a short text in? A transformer over bytes, and sums of n-grams that answer before it.

The incumbent is a linear model of hashed n-grams. The large network reads the same n-grams beside a transformer over
all bytes; the scout is a narrow sum of n-grams, as one compiled call. Texts are messages of MediaWiki's interface, some
of them in languages that hardly differ in writing, so that no model gets all of them right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.nn.cascade import Cascade
from sparingly.workloads import _cascaded as cascaded
from sparingly.workloads._cascaded import Engine, Setting
from sparingly.workloads._fit import Recipe, fit
from sparingly.workloads._langid_models import ByteTransformer, InOnnx, Ngrams, OneCall, from_list
from sparingly.workloads._parts import Say, document, parts_of
from sparingly.workloads.langid_data import Corpus, Texts

TITLE = "Language identification, n-grams before a transformer over bytes"
METRIC = "accuracy"
BATCH, POOL = 512, 50
"""Examples of a step, and steps whose examples are sorted by length together, so that little is padded."""

Shape = tuple[int, tuple[int, ...], int, float]
"""Width, orders, bits and dropout of n-grams."""

SCOUT: Shape = (32, (1, 2, 3, 4, 5), 18, 0.3)
WIDE: Shape = (128, (1, 2, 3, 4, 5, 6), 19, 0.5)
SINGLE: dict[str, Shape] = {"n-grams, 64 wide": (64, (1, 2, 3, 4, 5), 19, 0.5)}
WIDE_NAME, LINEAR_NAME = "n-grams of the large network", "n-grams, linear"
LINEAR: Shape = (0, (1, 2, 3, 4, 5), 19, 0.0)


@dataclass(frozen=True)
class Mode:
    """How much is done: messages for training (None: all), and for calibration and test each; passes of n-grams and of
    the transformer; its width and layers; bytes that it reads; pairs of timings, texts that are timed."""

    name: str
    trained: int | None
    held_out: int | None
    passes: int
    large_passes: int
    width: int
    layers: int
    longest: int
    pairs: int
    timed: int


MODES = {
    "quick": Mode("quick", 40_000, 8_000, 1, 1, 64, 1, 64, 5, 512),
    "default": Mode("default", None, 40_000, 2, 1, 128, 2, 128, 15, 2048),
    "full": Mode("full", None, None, 4, 4, 192, 4, 128, 40, 4096),
}


class Batches:
    """A step's examples: all of them once in each pass, of similar lengths, in an order that is always the same."""

    def __init__(self, texts: Texts):
        self.texts, self.per_pass, self._pass = texts, len(texts) // BATCH, (-1, np.empty((0, BATCH), np.int64))

    def __call__(self, step: int) -> Texts:
        number, place = divmod(step, self.per_pass)
        if self._pass[0] != number:
            rng = np.random.default_rng(number)
            order = rng.permutation(len(self.texts))[: self.per_pass * BATCH]
            lengths = self.texts.lengths.numpy()
            pools = np.split(order, range(BATCH * POOL, len(order), BATCH * POOL))
            rows = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, BATCH) for pool in pools])
            self._pass = (number, rng.permutation(rows))
        return self.texts[torch.from_numpy(self._pass[1][place])]


class Langid:
    """One run of the workload in one mode; every step is a part that is kept once it is done."""

    def __init__(self, mode: Mode, say: Say, *, fresh: bool = False):
        self.mode, self.say = mode, say
        self.parts = parts_of("langid", mode, fresh=fresh)
        self.spent: dict[str, float] = {}
        self._models: dict[str, nn.Module] = {}

    @cached_property
    def corpus(self) -> Corpus:
        self.say("reading messages", None)
        return Corpus()

    def part(self, name: str) -> Texts:
        """A part of the messages, or the first ones of it in a random order that is always the same."""
        whole = self.corpus.parts[name]
        size = self.mode.trained if name == "train" else self.mode.held_out
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
        return whole[order[:size]]

    @cached_property
    def train(self) -> Texts:
        return self.part("train")

    @property
    def names(self) -> tuple[str, str]:
        """Of the stages."""
        return f"n-grams, {SCOUT[0]} wide", "byte transformer"

    @property
    def classes(self) -> int:
        return len(self.corpus.languages)

    def _fitted(self, name: str, model: nn.Module, passes: int, lr: float) -> Any:
        batches = Batches(self.train)

        def loss(model: nn.Module, step: int) -> Tensor:
            texts = batches(step)
            return F.cross_entropy(model(texts), texts.labels)

        file = self.parts.folder / f"{name.replace(' ', '-').replace(',', '')}.pt"
        tick = lambda part: self.say(f"training: {name}", part)  # noqa: E731
        done = fit(model, loss, Recipe(passes * batches.per_pass, lr, 0.01), tick=tick, file=file)
        self._models[name], self.spent[name] = model, done.cpu_s
        return model

    def ngrams(self, name: str, shape: Shape) -> Ngrams:
        """Trained n-grams of that shape."""
        if name not in self._models:
            torch.manual_seed(0)
            width, orders, bits, dropout = shape
            model = Ngrams(self.classes, width, orders, bits, dropout)
            self._fitted(name, model, self.mode.passes if width else 2, 2e-3)
        model: Any = self._models[name]
        return model

    @property
    def scout(self) -> Ngrams:
        return self.ngrams("scout", SCOUT)

    @property
    def large(self) -> ByteTransformer:
        """The large network, trained; its n-grams were trained before it and stay as they are."""
        if "large" not in self._models:
            wide = self.ngrams(WIDE_NAME, WIDE)
            torch.manual_seed(0)
            mode = self.mode
            self._fitted("large", ByteTransformer(wide, self.classes, mode.width, mode.layers, mode.longest),
                         mode.large_passes, 2e-3)  # fmt: skip
        model: Any = self._models["large"]
        return model

    @cached_property
    def engines(self) -> dict[str, Engine]:
        """Ways to run the large network: list[bytes] -> probabilities."""
        model = self.large

        def pytorch(texts: list[bytes]) -> Tensor:
            with torch.no_grad():
                return model(from_list(texts)).softmax(1)

        return {"pytorch": pytorch, "onnxruntime": InOnnx(model)}

    def cascade(self, found: Mapping[str, Any] | None = None) -> Cascade:
        """Scout and large network; with the thresholds of ``found``."""
        made = Cascade([OneCall(self.scout), self.engines["onnxruntime"]])
        if found is not None:
            cascaded.set_thresholds(made, found)
        return made

    def held_out(self) -> tuple[Texts, Tensor, Tensor]:
        """(examples, ids of those that calibrate, ids of those that test)."""
        parts = [self.part(name) for name in ("calibration", "test")]
        whole = Texts(*(torch.cat([getattr(one, name) for one in parts]) for name in ("text", "lengths", "labels")))
        first = len(parts[0])
        return whole, torch.arange(first), torch.arange(first, len(whole))

    def quality(self) -> dict[str, Any]:
        """Of the cascade, its stages and every single network; with examples as text."""
        whole, calibration, test = self.held_out()
        texts = whole.bytes_of(torch.arange(len(whole)))
        answers = cascaded.gather(self.cascade(), texts, whole.labels, self.say, self.names)
        found, own = cascaded.judge(answers, calibration, test)
        for stage in found["stages"]:
            stage["examples"] = [texts[i].decode(errors="replace") for i in stage["examples"]]
        singles = {
            self.names[1]: answers.right(1)[test].numpy(),
            self.names[0]: answers.right(0)[test].numpy(),
        }
        for name, model in self.singles().items():
            singles[name] = self._right(model, whole[test])
        return found | {"singles": cascaded.singles(own, singles), "training_cpu_s": dict(self.spent)}

    def singles(self) -> dict[str, Ngrams]:
        """Other networks that answer alone: n-grams of other widths, and linear ones, the incumbent."""
        shapes = SINGLE | {WIDE_NAME: WIDE, LINEAR_NAME: LINEAR}
        return {name: self.ngrams(name, shape) for name, shape in shapes.items()}

    @torch.no_grad()
    def _right(self, model: Ngrams, texts: Texts) -> np.ndarray:
        ids = torch.arange(len(texts)).split(1024)
        return torch.cat([model(texts[part]).argmax(1) == texts.labels[part] for part in ids]).numpy()

    def setting(self) -> Setting:
        """Test texts whose answers are timed."""
        test = self.part("test")
        return Setting(test.bytes_of(torch.arange(min(len(test), self.mode.timed))), (16, 64, 256), (256, 1024),
                       self.mode.pairs)  # fmt: skip

    def costs(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Large ÷ cascade."""
        self.say("what an answer costs", None)
        scout, large = self.scout, self.large
        counted = Cascade([lambda texts: scout(from_list(texts)).softmax(1), self.engines["pytorch"]])
        cascaded.set_thresholds(counted, found)
        return cascaded.inference(
            self.engines, {"cascade": self.cascade(found)}, self.setting(), (lambda t: large(from_list(t)), counted)
        )

    def sweep(self, found: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What single networks cost beside the cascade."""
        ways: dict[str, dict[str, Engine]] = {
            self.names[1]: self.engines,
            self.names[0]: {"one compiled call": OneCall(self.scout)},
        }
        for name, model in self.singles().items():
            run: Engine = OneCall(model) if model.width else lambda texts, m=model: m(from_list(texts)).softmax(1)
            ways[name] = {"one compiled call" if model.width else "pytorch": run}
        return cascaded.sweep(ways, {"cascade": self.cascade(found)}, found, self.setting(), self.say)

    def run(self) -> dict[str, Any]:
        """Every part, and the whole as the JSON's entry of this workload."""
        return cascaded.run(self, TITLE, METRIC, [LINEAR_NAME]) | {
            "num_classes": self.classes,
            "data": {"sha256": self.corpus.sha256, "frozen": self.corpus.frozen},
        }


def bench(mode: Mode, say: Say, *, fresh: bool = False) -> dict[str, Any]:
    """The whole JSON document of a run."""
    return document("langid", Langid(mode, say, fresh=fresh).run(), mode.name)
