"""Fashion-MNIST by a network that holds far more units and rows than any picture uses, trained selectively.

784 pixels, width 128, two residual blocks of 16,384 units of which 32 run, ten classes. To what the first layer makes
of the pixels a bag of rows is added, named by ferns: 256 of them compare pairs of pixels within 7 by 7 and read one of
256 rows each, or none where there is nothing to see. Beside it stand dense networks of every size: of the same capacity
(two blocks of as many units, all active), of equal running cost (as many multiplications), and a sweep for equal
quality; the selective network without ferns, with ferns alone, and dense blocks with ferns, to tell what is due to
which; a small convolutional network with either kind of block; and what others reported for these pictures. All of
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
==============================================================  =======  =======

In hidden layers these pictures hardly need capacity; at the entrance they do. Rows that are looked up, 128 wide, added
to what the first layer makes; dense blocks of 84 units behind, 8 epochs, half of the rows left out at random:

==============================================================  =======
rows                                                            accuracy
==============================================================  =======
169 patterns of bright pixels, 3 by 3                           89.42
169 patterns of 9 thresholds: 3 by 3, 5 by 5, 7 by 7            90.05, 90.11, 89.84
169 ferns of 9 comparisons: 5 by 5, 7 by 7                      90.54, 90.54
the same with comparisons by no margin, 10, 60 of 255           90.29, 90.51, 90.18
the same with 0.3, 0.7 of the rows left out                     90.61, 90.06
324 ferns of 9, of 8; 169 of 12                                 90.86, 90.84, 90.65
324 ferns of 9, rows of 32 in 4 groups; 648 in 8 groups         90.66, 90.57
169 ferns of 9 without blocks; with dense blocks of 320         89.48, 90.78
169 ferns of 9, no first layer; 256 of 9; 648 of 9 in 4 groups  88.84, 89.69, 90.23
==============================================================  =======

So it is the ferns that make the network better, and a picture is known with no dense layer at all. They are easily
upset by noise, though: trained as above, 324 ferns of 8 fell behind the dense network of the same capacity by 4 to 10
points under normal noise and by 17 under a black square of 20 pixels. What helped: noise in what ferns see in training,
for half of the pictures, mostly little; that a fern reads nothing where it sees nothing (a square of 20: from 6.5
points behind to 1 ahead); selective blocks (4 points more than dense ones under the strongest noise). Means of 3 by 3
pixels in place of pixels helped against normal noise, not against black and white pixels; a first layer that sees means
of 2 by 2 pixels was 0.4 better on clean pictures and 5 worse under large squares. With all of this, 8 epochs, two
seeds, clean pictures, and normal noise of 0.1, 0.2, 0.3, 0.5 against the network of the same capacity (6 epochs,
89.20):

==========================================  ========  ======================
units of 16,384, ferns of 8                 accuracy  under noise
==========================================  ========  ======================
64 units, 324 ferns                         90.48     +0.1, -0.3, +0.8, +5.4
48 units, 256 ferns                         90.27     -0.1, -0.3, +0.5, +4.1
32 units, 324 ferns                         90.14     -0.1, -0.8,  0.0, +4.0
32 units, 256 ferns: these are taken        90.42     -0.3, -0.4, -0.1, +3.6
the same, 1.4 times the noise in training   90.20     -0.2, -0.5, +0.1, +3.5
==========================================  ========  ======================

An answer of the first costs a third more. How networks stand noise is in ``_robust.py``; a dense network of equal cost
that sees such noise in training stands beside them.
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
from sparingly.nn import SelectiveBag, SelectiveFFN, compile_plan
from sparingly.selectors import Ferns, ProductKey
from sparingly.selectors.ferns import noisy
from sparingly.workloads import _robust
from sparingly.workloads import fashion_data as data
from sparingly.workloads._fit import Recipe, fit
from sparingly.workloads._parts import Say, document, parts_of
from sparingly.workloads._shares import difference, share
from sparingly.workloads._threads import one_thread
from sparingly.workloads._trained import (
    Residual,
    Side,
    answers,
    dense_ffn,
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
FERNS, GROUPS = 256, 4
NOISE = 2.5
"""Up to how much noise half of the pictures are looked at through by ferns in training, in spreads of the pixels."""
ANSWERED = 8192
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
    "default": Mode("default", 16384, 60_000, 8, 1, (320, 1024), 10_000, 15, False),
    "full": Mode("full", 16384, 60_000, 30, 10, (32, 320, 1024, 4096), 10_000, 31, True),
}


def selective_ffn(units: int) -> SelectiveFFN:
    """A block of the selective network: 32 units run for each picture, in 4 groups of 8."""
    return SelectiveFFN(WIDTH, units, selector=ProductKey(heads=1, k=4, key_dim=16), block=BLOCK)


def scaled(images: Tensor) -> Tensor:
    """Pixels 0..255 -> float32 of mean 0 and spread 1.

    The mean matters: with black at 0, networks of every kind lose 20 to 30 points more under noise.
    """
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


class Entrance(nn.Module):
    """What a dense layer makes of a picture and what its ferns say, summed: [n, 784] -> [n, WIDTH]."""

    def __init__(self, bag: SelectiveBag):
        super().__init__()
        self.pixels, self.bag = nn.Linear(data.PIXELS, WIDTH), bag

    def forward(self, x: Tensor) -> Tensor:
        return self.pixels(x) + self.bag(x)


def fern_bag(ferns: int = FERNS) -> SelectiveBag:
    """Rows that ferns name, the sums of four groups side by side: [n, 784] -> [n, WIDTH]."""
    selector = Ferns((28, 28), ferns, tests=8, window=7, margin=0.2, noise=NOISE)
    return SelectiveBag(ferns << 8, WIDTH // GROUPS, selector=selector, groups=GROUPS, gain=4.0, std=1e-3, dropout=0.6)


class Noisy(nn.Module):
    """``network`` that sees in training what ferns see then, noise included."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(noisy(x, NOISE) if self.training else x)


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
        makers: dict[str, Callable[[], nn.Module]] = {
            "selective": lambda: network(self._ffn, Entrance(fern_bag())),
            "selective, without ferns": lambda: network(self._ffn),
            "selective, ferns alone at the entrance": lambda: network(self._ffn, fern_bag(2 * FERNS)),
            f"{self.equal_cost}, with ferns": lambda: network(self._equal_ffn, Entrance(fern_bag())),
            self.equal_noisy: lambda: Noisy(network(self._equal_ffn)),
        }
        for size in self.dense_units:
            makers[f"dense {size}"] = lambda size=size: network(lambda: dense_ffn(WIDTH, size))
        makers["convolutions, selective"] = lambda: Convolutions(self._ffn())
        makers["convolutions, dense"] = lambda: Convolutions(self._equal_ffn())
        return makers

    def _ffn(self) -> SelectiveFFN:
        return selective_ffn(self.mode.units)

    def _equal_ffn(self) -> nn.Module:
        return dense_ffn(WIDTH, self.equal_units)

    @cached_property
    def dense_units(self) -> list[int]:
        """Sizes of the dense networks."""
        return sorted({self.equal_units, *self.mode.sweep, self.mode.units})

    @property
    def dense(self) -> list[str]:
        """Names of the dense networks, smallest first."""
        return [f"dense {units}" for units in self.dense_units]

    @cached_property
    def equal_units(self) -> int:
        """Units of the dense network that makes as many multiplications as the selective one, rounded up."""
        ours, none = (self.macs(one) for one in (network(self._ffn, Entrance(fern_bag())), network(nn.Identity)))
        return math.ceil((ours - none) / 2 / (2 * WIDTH))

    def macs(self, model: nn.Module) -> float:
        """Multiplications of one answer, on average over some test pictures: empty corners cost no row."""
        some = self.inputs[:100]
        with torch.inference_mode(), count() as ledger:
            model.eval()(some)
        return ledger.macs / len(some)

    @property
    def others(self) -> list[str]:
        """Networks that stand beside the selective one and the dense ones."""
        return [name for name in self.makers if name not in ("selective", *self.dense)]

    @property
    def same_capacity(self) -> str:
        return f"dense {self.mode.units}"

    @property
    def equal_cost(self) -> str:
        return f"dense {self.equal_units}"

    @property
    def equal_noisy(self) -> str:
        return f"{self.equal_cost} with noise"

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
        for place, name in enumerate(self.dense):
            self.say("what each dense network costs", place / len(self.dense))
            rows[name] = {"macs": self.macs(self.trained(name)), **self.cost(name)}
        return rows

    def cost(self, name: str) -> dict[str, Any]:
        """What an answer of that network costs, ÷ the selective one's."""
        return inference_cost(self.trained(name), self.trained("selective"), self.inputs[:ANSWERED], self.mode.pairs)

    def other(self, name: str) -> dict[str, Any]:
        """What an answer of a network with ferns or selective blocks costs at batch 1; of others that is not
        measured."""
        model = self.trained(name)
        if isinstance(model, (Convolutions, Noisy)):
            return {}
        one = answers("", compile_plan(model), self.inputs[:ANSWERED], 1)
        many = Side("", lambda: [one.work() for _ in range(ANSWERED)], ANSWERED)
        return {"cpu_s": many.seconds()}

    def null(self) -> dict[str, Any]:
        self.say("the rig against itself", None)
        plan = compile_plan(self.trained("selective"))
        result = null_test(lambda: plan(self.inputs[:64]), pairs=40, threads=1)
        return {"value": result.value, "lo": result.lo, "hi": result.hi}

    def noise(self) -> dict[str, Any]:
        """Accuracy under noise in the pictures, and after training with wrong labels."""
        names = ("selective", self.same_capacity, self.equal_cost)
        pictures: dict[str, list[dict[str, Any]]] = {}
        for place, (kind, strength) in enumerate(_robust.KINDS):
            self.say("noise in the pictures", place / len(_robust.KINDS))
            images = scaled(_robust.disturbed(self.test.images[: self.mode.noisy], kind, strength))
            rights = {name: self.right(self.trained(name), images) for name in (*names, self.equal_noisy)}
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


def network(ffn: Callable[[], nn.Module], enter: nn.Module | None = None) -> nn.Sequential:
    """The network around what ``ffn`` makes; ``enter``: in place of its first layer."""
    return mlp(ffn, data.PIXELS, WIDTH, 10, enter=enter)


def _key(name: str, epochs: int, wrong: float = 0.0) -> str:
    """A network's file, by its name, its epochs and the share of labels that lie."""
    return f"{name}-{epochs}-{wrong}".replace(" ", "-").replace(",", "")


def recipe_for(model: nn.Module, steps: int) -> Recipe:
    """How a network is trained: wide dense blocks want a lower rate."""
    widest = max(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    return Recipe(steps, lr=2e-3 if widest < WIDE else 1e-3)


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
