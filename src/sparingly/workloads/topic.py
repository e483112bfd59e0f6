"""Which section of Debian does a package belong to? all-MiniLM-L6-v2 reads what the words alone leave open.

Three models in one price path: a linear model of words and pairs of words answers first; of the rest the encoder's
first two layers answer some, its first four some more, all six what is left. They are a committee: the encoder was
trained to add to what the words say, so that every stage is better than the one before, and the reference of the
contract, words and all six layers together, is the best answer that there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.nn.cascade import Cascade, Stage
from sparingly.nn.exits import ExitNetwork, add_exits_
from sparingly.workloads import _cascaded as cascaded
from sparingly.workloads import _topic_models as models
from sparingly.workloads._cascaded import Engine, Setting
from sparingly.workloads._fit import Recipe, fit
from sparingly.workloads._parts import Say, document, parts_of
from sparingly.workloads._topic_models import InOnnx, Linear
from sparingly.workloads.topic_data import Package, Topics

TITLE = "Topics of packages, words before all-MiniLM-L6-v2 with exits"
METRIC, MEASURE = "accuracy", "margin"
"""On held-out packages of a first training, twelve splits: large ÷ cascade 3.5 on average, by "maximum" 3.3."""

AT = ("encoder.encoder.layer.1", "encoder.encoder.layer.3")
NAMES = ("words and pairs", "words, 2 layers", "words, 4 layers", "words, 6 layers")
BATCH, FOLDS = 32, 3
RATE, HEADS = 2e-4, 15.0
"""Of the encoder, and how many times as fast its heads learn. 5e-4 gave 77.4 % where this gave 78.0, without words."""

SIZE = 100_000
SINGLE = {"words": (20_000, False), "words and pairs, 300,000": (300_000, True)}
"""Other linear models: how many words, and whether pairs of neighbours count."""


@dataclass(frozen=True)
class Mode:
    """How much is done: packages that train, held-out ones and how many of them calibrate (None: all, three
    quarters); steps of the encoder's training; pairs of timings, and packages in a sample of them, one at a time and
    in batches."""

    name: str
    trained: int | None
    held_out: int | None
    steps: int
    pairs: int
    chunks: tuple[int, int]


MODES = {
    "quick": Mode("quick", 4_000, 1_200, 30, 5, (12, 64)),
    "default": Mode("default", None, None, 900, 9, (96, 256)),
    "full": Mode("full", None, None, 4_000, 25, (192, 768)),
}


class Topic:
    """One run of the workload in one mode; every step is a part that is kept once it is done."""

    def __init__(self, mode: Mode, say: Say, *, fresh: bool = False):
        self.mode, self.say = mode, say
        self.parts = parts_of("topic", mode, fresh=fresh)

    @cached_property
    def topics(self) -> Topics:
        self.say("reading packages", None)
        return Topics.load()

    @cached_property
    def train(self) -> list[Package]:
        return self.topics.train(self.mode.trained)

    @cached_property
    def held_out(self) -> list[Package]:
        return self.topics.held_out(self.mode.held_out)

    @property
    def calibrating(self) -> int:
        """Of the held-out packages, the first ones: the rest tests."""
        return 3 * len(self.held_out) // 4

    @property
    def tested(self) -> list[Package]:
        return self.held_out[self.calibrating :]

    def labels(self, packages: Sequence[Package]) -> np.ndarray:
        """int64 [n]."""
        numbers = {section: number for number, section in enumerate(self.topics.sections)}
        return np.array([numbers[package.section] for package in packages])

    def linear(self, packages: Sequence[Package], size: int, pairs: bool) -> Linear:
        return Linear(packages, self.labels(packages), len(self.topics.sections), size, pairs)

    @cached_property
    def scout(self) -> Linear:
        self.say("fitting words", None)
        return self.linear(self.train, SIZE, True)

    def said(self) -> Tensor:
        """Log-probabilities [n, classes] of the packages that train, each by words fitted to other sources."""
        folds = np.array([sum(package.source.encode()) % FOLDS for package in self.train])
        found = np.empty((len(self.train), len(self.topics.sections)), np.float32)
        for fold in range(FOLDS):
            self.say("fitting words to other sources", fold / FOLDS)
            inside, outside = (np.nonzero(mine)[0] for mine in (folds == fold, folds != fold))
            model = self.linear([self.train[i] for i in outside], SIZE, True)
            found[inside] = model([self.train[i] for i in inside])
        return torch.from_numpy(found).log()

    @cached_property
    def model(self) -> ExitNetwork:
        """The encoder with exits, trained on top of what the words say."""
        torch.manual_seed(0)
        net = models.load_reader(len(self.topics.sections))
        model = add_exits_(net, at=AT, measure=MEASURE)
        for head in model.heads:
            head.make(torch.zeros(1, net.out.in_features), net.out.out_features)
        file = self.parts.folder / "encoder.pt"
        kept = self.parts.folder / "said.pt"
        if not kept.exists():
            torch.save(self.said(), kept)
        said, labels = torch.load(kept, weights_only=True), self.labels(self.train)
        passes = -(-self.mode.steps * BATCH // len(labels))
        order = np.concatenate([np.random.default_rng(number).permutation(len(labels)) for number in range(passes)])

        def loss(_model: nn.Module, step: int) -> Tensor:
            chosen = order[step * BATCH : (step + 1) * BATCH]
            targets = torch.from_numpy(labels[chosen])
            return models.losses(model, [self.train[i] for i in chosen], said[chosen], targets)

        heads = [*model.heads.parameters(), *net.norm.parameters(), *net.out.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [one for one in net.encoder.parameters() if one.requires_grad]},
            {"params": heads, "scale": HEADS},
        ]
        recipe = Recipe(self.mode.steps, RATE, 0.01, warmup=self.mode.steps // 10)
        self.training_cpu_s = fit(
            model, loss, recipe, tick=lambda part: self.say("training the encoder", part), file=file, groups=groups
        ).cpu_s
        return model

    def committee(self, last: Stage, found: Mapping[str, Any] | None = None, scout: Stage | None = None) -> Cascade:
        """The words, and what adds to them; with the thresholds of ``found``."""
        made = Cascade([self.scout if scout is None else scout, last], measure=MEASURE, committee=True)
        if found is not None:
            cascaded.set_thresholds(made, found)
        return made

    def quality(self) -> dict[str, Any]:
        """Of the cascade, its stages and other single models; with examples as text."""
        packages, model = self.held_out, self.model
        few = packages[:BATCH]
        model.check_exits(few, model.stage_answers(few)[-1])
        labels = torch.from_numpy(self.labels(packages))
        answers = cascaded.gather(self.committee(InOnnx(model)), packages, labels, self.say, NAMES)
        self.say("calibrating", None)
        ids = torch.arange(len(packages)).split([self.calibrating, len(packages) - self.calibrating])
        found, own = cascaded.judge(answers, *ids, measure=MEASURE)
        for stage in found["stages"]:
            stage["examples"] = [packages[i].short for i in stage["examples"]]
        singles = {name: answers.right(place)[ids[1]].numpy() for place, name in enumerate(NAMES)}
        for name, single in self.singles.items():
            singles[name] = single(self.tested).argmax(1) == labels[self.calibrating :].numpy()
        return found | {"singles": cascaded.singles(own, singles), "training_cpu_s": self.training_cpu_s}

    @cached_property
    def singles(self) -> dict[str, Linear]:
        """Other linear models."""
        self.say("fitting other words", None)
        return {name: self.linear(self.train, *shape) for name, shape in SINGLE.items()}

    def setting(self) -> Setting:
        return Setting(self.tested, (16, 64), self.mode.chunks, self.mode.pairs)

    def costs(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Large ÷ cascade, from text to class."""
        self.say("what an answer costs", None)
        model, scout = self.model, self.scout
        large: dict[str, Engine] = {
            "onnxruntime": self.committee(InOnnx(model, [len(AT)])),
            "pytorch": self.committee(model),
        }
        own = self.committee(InOnnx(model), found)
        counted = [self.committee(model, thresholds, scout.counted) for thresholds in (None, found)]
        return cascaded.inference(large, {"onnxruntime": own}, self.setting(), (counted[0], counted[1]))

    def sweep(self, found: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What single models cost beside the cascade: words, and words with so many layers."""
        model = self.model
        own: dict[str, Engine] = {"onnxruntime": self.committee(InOnnx(model), found)}
        ways: dict[str, dict[str, Engine]] = {name: {"numpy": single} for name, single in self.singles.items()}
        ways[NAMES[0]] = {"numpy": self.scout}
        for place, name in enumerate(NAMES[1:]):
            ways[name] = {"onnxruntime": self.committee(InOnnx(model, [place]))}
        return cascaded.sweep(ways, own, found, self.setting(), self.say)

    def run(self) -> dict[str, Any]:
        """Every part, and the whole as the JSON's entry of this workload."""
        return cascaded.run(self, TITLE, METRIC, ["words", "words and pairs"]) | {
            "num_classes": len(self.topics.sections),
            "data": {"sha256": self.topics.sha256, "published": self.topics.published},
        }


def bench(mode: Mode, say: Say, *, fresh: bool = False) -> dict[str, Any]:
    """The whole JSON document of a run."""
    return document("topic", Topic(mode, say, fresh=fresh).run(), mode.name)
