"""Fashion-MNIST by a network whose hidden layers hold far more units than any picture uses, trained selectively.

784 pixels, width 128, two residual blocks of 16,384 units of which 64 run, ten classes. Beside it stand dense networks
of every size: of the same capacity (two blocks of as many units, all active), of equal running cost (as many
multiplications), and a sweep for equal quality; a bank of which a picture reads the 169 rows that its patches name,
with either kind of block; a small convolutional network, likewise; and what others reported for these pictures. All of
them see the same pictures in the same order for the same number of epochs.

What was tried, in per cent of 10,000 pictures held out of training (50,000 left; the intervals are 0.6 wide on either
side; 8 epochs of pictures as they are / 30 of moved ones unless said; a dense block of 84 units makes as many
multiplications as the selective one, of 43 as half of it):

==============================================================  =======  =======
network                                                         8        30
==============================================================  =======  =======
dense, 43 units                                                 88.85    88.67
dense, 84 (30: 96) units                                        88.88    89.36
dense, 1,024 units                                                       90.52
dense, 4,096 units (rate 1e-3; 20 epochs)                       89.65    89.71
64 of 16,384 units, 8 groups of 8, one head                     89.19    89.74
the same at 20 epochs: rate 1e-3, 2e-3, 4e-3                             88.66, 89.22, 89.08
the same at 20 epochs: of 2,048 units; weights by sigmoid                89.34, 88.76
the same: 128 units; noise in the choice; dropout; mixed pairs           89.87, 88.43, 89.35, 89.51
the same, taught by a convolutional network (20 epochs)                  87.57
32 of 16,384 units, 4 groups of 8                               88.67
32 single units, two heads                                               89.25
dense, 84 units, with the bank (16 epochs)                      89.86    89.61
64 of 16,384 units, with the bank (16 epochs)                   89.49    89.64
these two with half of the patches left out in training         89.62, 89.85
the bank without the first layer                                86.33
==============================================================  =======  =======

These pictures hardly need capacity. The bank is what gains most, at the expense of the savings: its rows lie far apart.
How networks stand noise is in ``_robust.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.compare import null_test
from sparingly.energy import count
from sparingly.nn import SelectiveFFN, compile_plan
from sparingly.selectors import ProductKey
from sparingly.workloads import _robust
from sparingly.workloads import fashion_data as data
from sparingly.workloads._fit import Recipe, fit
from sparingly.workloads._parts import Say, document, parts_of
from sparingly.workloads._patch_bank import CompiledLooking, Looking
from sparingly.workloads._shares import difference, share
from sparingly.workloads._threads import one_thread
from sparingly.workloads._trained import (
    Residual,
    answers,
    dense_ffn,
    fastest,
    inference_cost,
    mlp,
    training_cost,
)

TITLE = "Fashion-MNIST, hidden layers of which few units run"
METRIC = "accuracy"
WIDTH, BLOCK = 128, 8
MEAN, SPREAD = 72.94, 90.02
"""Of the pixels for training, 0..255."""
WIDE = 4096
"""Dense blocks of so many units are trained at half the others' rate."""
LEVEL = 40
"""Above it a pixel is bright."""
ANSWERED = 4096
"""Test pictures that costs are measured on."""


@dataclass(frozen=True)
class Mode:
    """How much is done: units of a block, pictures and epochs of training, epochs with wrong labels, sizes of dense
    networks beside the one of equal cost, test pictures for noise, timing pairs, whether pictures for training
    are moved and turned."""

    name: str
    units: int
    pictures: int
    epochs: int
    noisy_epochs: int
    sweep: tuple[int, ...]
    noisy: int
    pairs: int
    moved: bool
    batch: int = 256
    label_noise: tuple[float, ...] = field(default=(0.0, 0.2, 0.4))


MODES = {
    "quick": Mode("quick", 4096, 4_000, 4, 1, (), 500, 5, False, batch=128, label_noise=(0.4,)),
    "default": Mode("default", 16384, 60_000, 6, 1, (320, 1024), 10_000, 15, False),
    "full": Mode("full", 16384, 60_000, 30, 10, (32, 320, 1024, 4096), 10_000, 31, True),
}


def selective_ffn(units: int) -> SelectiveFFN:
    """A block of the selective network: 64 units run for each picture, in 8 groups of 8."""
    return SelectiveFFN(WIDTH, units, selector=ProductKey(heads=1, k=8, key_dim=16), block=BLOCK)


def scaled(images: Tensor) -> Tensor:
    """Pixels 0..255 -> float32 of mean 0 and spread 1."""
    return (images.float() - MEAN) / SPREAD


class Stream:
    """Pictures for training: ``stream(step)`` gives images float32 [batch, 784] and labels [batch], always the same for
    a step. Each epoch takes every picture once; ``moved``: by up to one pixel, and turned left to right half of the
    time."""

    def __init__(self, pictures: data.Pictures, batch: int, labels: Tensor | None = None, *, moved: bool = True):
        self._images = F.pad(pictures.images.view(-1, 28, 28), (1, 1, 1, 1))
        self._labels = pictures.labels if labels is None else labels
        self._batch, self._moved, self.per_epoch = batch, moved, len(pictures.labels) // batch
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(len(self._labels), generator=torch.Generator().manual_seed(epoch))
            self._epoch = epoch
        chosen = self._order[place * self._batch : (place + 1) * self._batch]
        if not self._moved:
            return scaled(self._images[chosen, 1:-1, 1:-1].reshape(len(chosen), -1)), self._labels[chosen]
        random = torch.Generator().manual_seed(1_000_003 + step)
        moves = torch.randint(0, 3, (len(chosen), 2), generator=random)
        turned = torch.rand(len(chosen), 1, generator=random) < 0.5
        rows, columns = moves[:, :1] + torch.arange(28), moves[:, 1:] + torch.arange(28)
        columns = torch.where(turned, columns.flip(1), columns)
        images = self._images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        return scaled(images.reshape(len(chosen), -1)), self._labels[chosen]


class Convolutions(nn.Module):
    """Two convolutions, then ``ffn`` as the classifier's hidden block: [n, 784] -> [n, 10]."""

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * 7 * 7, WIDTH),
        )  # fmt: skip
        self.head = nn.Sequential(Residual(WIDTH, ffn), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x.view(-1, 1, 28, 28)))


class Fashion:
    """One run of the workload in one mode; every step is a part that is kept once it is done."""

    def __init__(self, mode: Mode, say: Say, *, fresh: bool = False):
        self.mode, self.say = mode, say
        self.parts = parts_of("fashion", mode, fresh=fresh)
        self.models: dict[str, nn.Module] = {}
        self.spent: dict[str, float] = {}

    @cached_property
    def pictures(self) -> data.Pictures:
        whole = data.load(train=True)
        return data.Pictures(whole.images[: self.mode.pictures], whole.labels[: self.mode.pictures])

    @cached_property
    def test(self) -> data.Pictures:
        return data.load(train=False)

    @cached_property
    def inputs(self) -> Tensor:
        return scaled(self.test.images)

    @cached_property
    def makers(self) -> dict[str, Callable[[], nn.Module]]:
        """Every network by its name; "dense N" has two blocks of N units."""
        sizes = sorted({self.equal_units, *self.mode.sweep, self.mode.units})
        makers: dict[str, Callable[[], nn.Module]] = {
            "selective": lambda: network(lambda: selective_ffn(self.mode.units)),
            "selective, with a bank": lambda: looking(lambda: selective_ffn(self.mode.units)),
            f"{self.equal_cost}, with a bank": lambda: looking(lambda: dense_ffn(WIDTH, self.equal_units)),
        }
        for size in sizes:
            makers[f"dense {size}"] = lambda size=size: network(lambda: dense_ffn(WIDTH, size))
        makers["convolutions, selective"] = lambda: Convolutions(selective_ffn(self.mode.units))
        makers["convolutions, dense"] = lambda: Convolutions(dense_ffn(WIDTH, self.equal_units))
        return makers

    @cached_property
    def equal_units(self) -> int:
        """Units of the dense network that makes as many multiplications as the selective one, rounded up."""
        ours, none = (_macs(network(make)) for make in (lambda: selective_ffn(self.mode.units), nn.Identity))
        return math.ceil((ours - none) / 2 / (2 * WIDTH))

    @property
    def others(self) -> list[str]:
        """Networks that are no multilayer perceptrons."""
        return [name for name in self.makers if "bank" in name or "convolutions" in name]

    @property
    def same_capacity(self) -> str:
        return f"dense {self.mode.units}"

    @property
    def equal_cost(self) -> str:
        return f"dense {self.equal_units}"

    def trained(self, name: str, *, epochs: int | None = None, wrong: float = 0.0) -> nn.Module:
        """The network of that name, trained or as an earlier run left it; ``wrong``: share of labels that lie."""
        epochs = epochs or self.mode.epochs
        key = _key(name, epochs, wrong)
        if key in self.models:
            return self.models[key]
        torch.manual_seed(0)
        model = self.makers[name]()
        labels = _robust.wrong_labels(self.pictures.labels, wrong)
        stream = Stream(self.pictures, self.mode.batch, labels, moved=self.mode.moved)

        def loss(model: nn.Module, step: int) -> Tensor:
            images, labels = stream(step)
            return F.cross_entropy(model(images), labels, label_smoothing=0.1)

        recipe = recipe_for(model, epochs * stream.per_epoch)
        what = f"training, {name}" + (f", {wrong:.0%} of the labels wrong" if wrong else "")
        file = self.parts.folder / f"{key}.pt"
        fitted = fit(model, loss, recipe, tick=lambda part: self.say(what, part), file=file)
        self.models[key], self.spent[key] = model, fitted.cpu_s
        return model

    def right(self, model: nn.Module, images: Tensor | None = None) -> np.ndarray:
        """Which test pictures the network gets right, or the first ones as they are disturbed; bools [n]."""
        images = self.inputs if images is None else images
        with torch.inference_mode():
            found = torch.cat([model(part).argmax(1) for part in images.split(500)])
        return (found == self.test.labels[: len(found)]).numpy()

    def quality(self) -> dict[str, Any]:
        """Accuracy of every network, and the selective one's paired differences."""
        rights = {name: self.right(self.trained(name)) for name in self.makers}
        mine = rights["selective"]
        return {
            name: {
                **share(found),
                "training_cpu_s": self.spent[_key(name, self.mode.epochs)],
                "difference": difference(mine, found),
            }
            for name, found in rights.items()
        }

    def training(self) -> dict[str, Any]:
        """What a training example costs; on copies, for timing changes them."""
        self.say("what a training example costs", None)
        models = [copy.deepcopy(self.trained(name)) for name in (self.same_capacity, "selective")]
        stream = Stream(self.pictures, min(ANSWERED, len(self.pictures.labels)))
        return training_cost(models[0], models[1], *stream(0), self.mode.pairs)

    def costs(self) -> dict[str, Any]:
        """Every dense network's cost of an answer beside the selective one's, one at a time and at its best batch."""
        rows = {}
        names = [name for name in self.makers if name.startswith("dense") and name not in self.others]
        for place, name in enumerate(names):
            self.say("what each dense network costs", place / len(names))
            rows[name] = {"macs": _macs(self.trained(name)), **self.cost(name)}
        return rows

    def cost(self, name: str) -> dict[str, Any]:
        """What an answer of that network costs, ÷ the selective one's."""
        return inference_cost(self.trained(name), self.trained("selective"), self.inputs[:ANSWERED], self.mode.pairs)

    def other(self, name: str) -> dict[str, Any]:
        """What an answer of a network with a bank costs at batch 1; of others that is not measured."""
        model = self.trained(name)
        if not isinstance(model, Looking):
            return {}
        engines = {"pytorch": model, "two compiled calls": CompiledLooking(model)}
        sides = [answers(engine, run, self.inputs[:ANSWERED], 1) for engine, run in engines.items()]
        return {"cpu_s": fastest(sides).seconds()}

    def null(self) -> dict[str, Any]:
        self.say("the rig against itself", None)
        plan = compile_plan(self.trained("selective"))
        result = null_test(lambda: plan(self.inputs[:64]), pairs=40, threads=1)
        return {"value": result.value, "lo": result.lo, "hi": result.hi}

    def noise(self) -> dict[str, Any]:
        """Accuracy under noise in the pictures, and after training with wrong labels."""
        names = ("selective", self.same_capacity, self.equal_cost)
        pictures = {}
        for place, (kind, strength) in enumerate(_robust.KINDS):
            self.say("noise in the pictures", place / len(_robust.KINDS))
            images = scaled(_robust.disturbed(self.test.images[: self.mode.noisy], kind, strength))
            rights = {name: self.right(self.trained(name), images) for name in names}
            pictures.setdefault(kind, []).append(_row(strength, rights))
        labels = []
        for wrong in self.mode.label_noise:
            rights = {
                name: self.right(self.trained(name, epochs=self.mode.noisy_epochs, wrong=wrong)) for name in names
            }
            labels.append(_row(wrong, rights))
        return {"pictures": pictures, "labels": labels, "label_epochs": self.mode.noisy_epochs}

    @one_thread()
    def run(self) -> dict[str, Any]:
        """Every part, and the whole as the JSON's entry of this workload."""
        part = self.parts.run
        found = part("quality", self.quality)
        costs = part("costs", self.costs)
        inference = {job: costs[self.same_capacity][job] for job in ("batch_1", "best_batch")}
        mine = found["selective"]
        quality: dict[str, Any] = {"metric": METRIC, "n": len(self.test.labels), "selective": _method(mine, None)}
        quality["selective"]["cpu_s"] = inference["batch_1"]["selective_cpu_s"]
        for key, name in (("dense_same_capacity", self.same_capacity), ("dense_equal_cost", self.equal_cost)):
            quality[key] = _method(found[name], costs[name])
        quality["differences"] = {
            key: found[name]["difference"]
            for key, name in (("dense_same_capacity", self.same_capacity), ("dense_equal_cost", self.equal_cost))
        }
        return {
            "title": TITLE,
            "units": self.mode.units,
            "epochs": self.mode.epochs,
            "quality": quality,
            "training": part("training", self.training) | {"selective_total_cpu_s": mine["training_cpu_s"]},
            "inference": inference,
            "equal_cost": {
                "dense": self.equal_cost,
                "difference": found[self.equal_cost]["difference"],
                **_ratios(costs[self.equal_cost]),
            },
            "equal_quality": self._equal_quality(found, costs),
            "others": {
                name: found[name] | part(f"cost of {name}", lambda n=name: self.other(n)) for name in self.others
            },
            "published": [row._asdict() for row in data.published()],
            "noise": part("noise", self.noise),
            "null_test": part("null", self.null),
        }

    def _equal_quality(self, found: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, Any]:
        """The cheapest dense network that is as accurate as the selective one, and the whole sweep."""
        sweep = [
            {"name": name, **_method(found[name], costs[name]), "difference": found[name]["difference"],
             "macs": costs[name]["macs"], **_ratios(costs[name])}
            for name in costs
        ]  # fmt: skip
        as_good = [row for row in sweep if row["value"] >= found["selective"]["value"]]
        best = min(as_good, key=lambda row: row["cpu_s"], default=None)
        reached = {} if best is None else {job: best[job] for job in ("batch_1", "best_batch")}
        return {"dense": None if best is None else best["name"], **reached, "sweep": sweep}


def network(ffn: Callable[[], nn.Module]) -> nn.Sequential:
    """The network around what ``ffn`` makes."""
    return mlp(ffn, data.PIXELS, WIDTH, 10)


def looking(ffn: Callable[[], nn.Module]) -> Looking:
    """The same network with the rows that a picture's patches name added to what the first layer gives."""
    enter, *rest = network(ffn)
    assert isinstance(enter, nn.Linear)
    return Looking(enter, (LEVEL - MEAN) / SPREAD, nn.Sequential(*rest))


def _key(name: str, epochs: int, wrong: float = 0.0) -> str:
    """A network's file, by its name, its epochs and the share of labels that lie."""
    return f"{name}-{epochs}-{wrong}".replace(" ", "-").replace(",", "")


def recipe_for(model: nn.Module, steps: int) -> Recipe:
    """How a network is trained: wide dense blocks want a lower rate."""
    widest = max(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    return Recipe(steps, lr=2e-3 if widest < WIDE else 1e-3)


def _macs(model: nn.Module) -> int:
    """Multiplications of one answer."""
    with torch.inference_mode(), count() as ledger:
        model.eval()(torch.zeros(1, data.PIXELS))
    return ledger.macs


def _method(found: Mapping[str, Any], cost: Mapping[str, Any] | None) -> dict[str, Any]:
    entry = {name: found[name] for name in ("value", "lo", "hi", "training_cpu_s")}
    return entry | ({} if cost is None else {"cpu_s": cost["batch_1"]["dense_cpu_s"]})


def _ratios(cost: Mapping[str, Any]) -> dict[str, Any]:
    """Dense ÷ selective processor time of an answer, by job."""
    return {job: cost[job]["saving"]["cpu_s"] for job in ("batch_1", "best_batch")}


def _row(strength: float, rights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    mine = rights["selective"]
    return {
        "strength": strength,
        **{name: {**share(found), "difference": difference(mine, found)} for name, found in rights.items()},
    }


def bench(mode: Mode, say: Say, *, fresh: bool = False) -> dict[str, Any]:
    """The whole JSON document of a run."""
    return document("fashion", Fashion(mode, say, fresh=fresh).run(), mode.name)
