"""The thresholds of a cascade, or of a network with exits, under an accuracy contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparingly._data import batches, data_hash, inputs
from sparingly._progress import Say
from sparingly.contract import Contract
from sparingly.convert import CONTRACT
from sparingly.energy.machine import installed
from sparingly.guard import walk
from sparingly.metrics import Metric, observe
from sparingly.nn.cascade import NEVER, Staged, length

FIT_SHARE = 4
"""Every so manieth example makes the path; the others test it."""

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)
"""Mean drops of the path's points on the examples that make it, in shares of the one that is allowed."""

CAREFUL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""What share of those that leave at the first of these points leaves at the ones before it. A mean of 0 on few examples
may be well above the limit on others, and the first point that fails is the last: of eight splits of 16,800 package
descriptions three to five kept a dense cascade for that reason."""


class _Given(nn.Module):
    """A model that answers what it holds."""

    def __init__(self, probabilities: Tensor):
        super().__init__()
        self._probabilities = probabilities

    def forward(self, x: Any) -> Tensor:
        return self._probabilities


def calibrate_cascade(
    model: Staged, calibration: Any, metric: Metric, max_drop: float, confidence: float, say: Say
) -> Contract:
    """See :func:`sparingly.calibrate`. Every stage answers every example once; what raises then is passed on."""
    if metric.relative:
        raise ValueError(
            f"a cascade decides among classes: take accuracy, agreement or a metric of yours, not {metric.name}"
        )
    promise = metric.promise(max_drop, confidence)
    data = batches(calibration, size=256)
    answers = _answers(model, data, say)
    count = len(answers[0])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    fit_on, test_on = order[: count // FIT_SHARE], order[count // FIT_SHARE :]
    promise.check(len(test_on), metric.answers)
    losses = torch.stack([_losses(metric, stage, data) for stage in answers])
    good = [1 - metric.drops(losses[-1], loss)[fit_on].double().clamp(0, 1) for loss in losses[:-1]]
    before = model.weights
    try:
        model.fit_measure([stage[fit_on] for stage in answers[:-1]], good)
        sure = torch.stack([model.sure(stage, place).cpu() for place, stage in enumerate(answers[:-1])])
        path = _path(metric, losses[:, fit_on], sure[:, fit_on], promise.limit)
        losses, sure = losses[:, test_on], sure[:, test_on]

        def drops(settings: dict[str, float]) -> Tensor:
            return metric.drops(losses[-1], _chosen(losses, left_at(list(settings.values()), sure)))

        found = walk(path, drops, promise)
    except BaseException:
        model.weights = before
        raise
    kept = [NEVER] * len(sure) if found.chosen is None else list(path[found.chosen].values())
    exits = left_at(kept, sure)
    contract = Contract.of(
        found,
        promise,
        [{name: _told(value) for name, value in one.items()} for one in path],
        metric=metric.name,
        data_hash=data_hash(data),
        dense_quality=metric.quality(losses[-1], losses[-1]),
        selective_quality=metric.quality(losses[-1], _chosen(losses, exits)),
        versions=installed(),
    )
    model.thresholds.copy_(torch.tensor(kept, dtype=torch.float64))
    model.expected.copy_(torch.bincount(exits, minlength=len(losses)))
    model.reset_counts()
    setattr(model, CONTRACT, contract)
    return contract


def _chosen(losses: Tensor, exits: Tensor) -> Tensor:
    """Of what the metric observes of every stage, [stages, n], that of the stage at which each example left, [n]."""
    return losses.gather(0, exits.unsqueeze(0)).squeeze(0)


def left_at(thresholds: Sequence[float], sure: Sequence[Tensor] | Tensor) -> Tensor:
    """At which stage each example leaves, int64 [n]; sure: how sure each stage but the last is, float64 [n] each."""
    exits = torch.full((len(sure[0]),), len(sure), dtype=torch.int64)
    for place in reversed(range(len(sure))):
        exits[sure[place] >= thresholds[place]] = place
    return exits


def _told(threshold: float) -> float | None:
    """As JSON holds it."""
    return None if threshold == NEVER else threshold


def _answers(model: Staged, data: list[Any], say: Say) -> list[Tensor]:
    """Every stage's probabilities of all examples, float32 [n, classes] each."""
    parts = []
    for done, batch in enumerate(data):
        say("asking every stage", done / len(data))
        parts.append(model.stage_answers(inputs(batch)))
    found = [torch.cat(stage) for stage in zip(*parts, strict=True)]
    if len({stage.shape[1] for stage in found}) > 1:
        raise ValueError(f"stages must agree on the classes, got {[stage.shape[1] for stage in found]}")
    return found


def _losses(metric: Metric, answers: Tensor, data: list[Any]) -> Tensor:
    """What the metric observes of a stage by itself."""
    sizes = [length(inputs(batch)) for batch in data]
    parts = zip(answers.split(sizes), data, strict=True)
    return torch.cat([observe(metric, _Given(part), [batch]) for part, batch in parts])


def _path(metric: Metric, losses: Tensor, sure: Tensor, limit: float) -> list[dict[str, float]]:
    """Thresholds from dense to sparse: every stage lets go at the same expected drop of an input that leaves.

    What an input is expected to lose falls with how sure its stage is (isotonic regression). Points are where the mean
    drop over the examples, losses [stages, n] and sure [stages - 1, n], comes to the shares in SHARES of the limit;
    before them, of those that leave at the first one only the surest of every stage do.
    """
    expected = []
    for how, loss in zip(sure, losses[:-1], strict=True):
        expected.append(falling(how.numpy(), metric.drops(losses[-1], loss).double().numpy()))
    prices = np.unique(np.concatenate([levels for _, levels in expected]))
    names = [f"stage {place}" for place in range(len(sure))]
    path: list[dict[str, float]] = []
    best: dict[float, dict[str, float]] = {}
    for price in prices:
        thresholds = [float(at[levels <= price].min(initial=NEVER)) for at, levels in expected]
        exits = left_at(thresholds, sure)
        # Where nobody leaves, nobody shall at a point before this one, at which fewer have left earlier.
        thresholds = [at if (exits == place).any() else NEVER for place, at in enumerate(thresholds)]
        chosen = _chosen(losses, exits)
        mean = float(metric.drops(losses[-1], chosen).double().mean())
        for share in SHARES:
            if mean <= share * limit:
                best[share] = dict(zip(names, thresholds, strict=True))
    points = [best[share] for share in SHARES if share in best] or [dict.fromkeys(names, NEVER)]
    for point in [*_careful(list(points[0].values()), sure), *(list(one.values()) for one in points)]:
        if (named := dict(zip(names, point, strict=True))) not in path:
            path.append(named)
    return path


def _careful(thresholds: list[float], sure: Tensor) -> list[list[float]]:
    """Thresholds before these, which only the surest of those reach that reach these; none where nobody does."""
    reach = [how[how >= at] for how, at in zip(sure, thresholds, strict=True)]
    if not any(map(len, reach)):
        return []
    return [[float(how.quantile(1 - share)) if len(how) else NEVER for how in reach] for share in CAREFUL]


def falling(sure: np.ndarray, lost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Isotonic regression: expected loss, falling with how sure -> (least surety of a level, its loss), surest first.

    sure and lost float64 [n]. Pool adjacent violators: Ayer, Brunk, Ewing, Reid, Silverman, Annals of Mathematical
    Statistics, 1955.
    """
    order = np.argsort(-sure, kind="stable")
    at, sums, counts = [], [], []
    for how, loss in zip(sure[order].tolist(), lost[order].tolist(), strict=True):
        if at and at[-1] == how:
            # Equally sure: one level.
            sums[-1] += loss
            counts[-1] += 1
        else:
            at.append(how)
            sums.append(loss)
            counts.append(1)
        while len(at) > 1 and sums[-1] * counts[-2] <= sums[-2] * counts[-1]:
            last = at.pop(), sums.pop(), counts.pop()
            at[-1] = last[0]
            sums[-1] += last[1]
            counts[-1] += last[2]
    return np.array(at), np.array(sums) / np.array(counts)
