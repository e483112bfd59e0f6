"""How sure a stage is of its answers: measures on probabilities, in PyTorch, and as one compiled pass on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._numba import kernel

LEAST = 1e-7
"""Probabilities below it count as it where a logarithm is taken."""

FEATURES = 5
"""What the learned measure looks at, before the class: 1, logarithms of the three largest probabilities, entropy."""

NO_WEIGHTS = np.empty(0)
"""What measures that are not learned give :func:`sure_rows`."""


def maximum(probabilities: Tensor) -> Tensor:
    """The largest probability, [n, classes] -> [n]."""
    return probabilities.amax(dim=1)


def margin(probabilities: Tensor) -> Tensor:
    """The largest probability minus the second, [n, classes] -> [n]."""
    best = _largest(probabilities, 2)
    return best[:, 0] - best[:, 1]


def entropy(probabilities: Tensor) -> Tensor:
    """1 minus entropy ÷ its maximum, so that higher is surer, [n, classes] -> [n]."""
    most = float(np.log(max(2, probabilities.shape[1])))
    return 1 + torch.special.xlogy(probabilities, probabilities).sum(dim=1) / most


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"maximum": maximum, "margin": margin, "entropy": entropy}
KINDS = (*MEASURES, "learned")


def _largest(probabilities: Tensor, count: int) -> Tensor:
    """The largest ones, falling, [n, classes] -> [n, count]; 0 where there are not as many classes."""
    found = probabilities.topk(min(count, probabilities.shape[1]), dim=1).values
    return torch.nn.functional.pad(found, (0, count - found.shape[1]))


def features(probabilities: Tensor) -> Tensor:
    """[n, classes] -> float64 [n, FEATURES]."""
    wide = probabilities.double()
    logs = _largest(wide, 3).clamp_min(LEAST).log()
    return torch.cat([torch.ones_like(logs[:, :1]), logs, entropy(wide)[:, None]], dim=1)


def learned(probabilities: Tensor, weights: Tensor) -> Tensor:
    """The chance that an answer is as good as the last stage's: [n, classes], weights float64 [FEATURES + classes], of
    the features and of the class that is answered -> float64 [n]."""
    score = features(probabilities) @ weights[:FEATURES] + weights[FEATURES:][probabilities.argmax(dim=1)]
    return score.sigmoid()


def fit_learned(probabilities: Tensor, as_good: Tensor) -> Tensor:
    """Logistic regression: [n, classes], as_good [n] in 0..1 -> weights float64 [FEATURES + classes].

    Weights of classes are held small (ridge), as of many there are few examples.
    """
    classes = probabilities.shape[1]
    given, answer, wanted = features(probabilities), probabilities.argmax(dim=1), as_good.double()
    weights = torch.zeros(FEATURES + classes, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        score = given @ weights[:FEATURES] + weights[FEATURES:][answer]
        value = torch.nn.functional.binary_cross_entropy_with_logits(score, wanted, reduction="sum")
        value = value + 0.5 * weights[FEATURES:].square().sum() + 1e-3 * weights[:FEATURES].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    return weights.detach()


@kernel
def sure_rows(probabilities, kind, weights, sure):
    """Fill ``sure``, float64 [n], by the measure KINDS[kind] of probabilities float32 [n, classes]; weights float64
    [FEATURES + classes], used by the learned one. Returns -1, or the first row that is no distribution."""
    classes = probabilities.shape[1]
    for row in range(probabilities.shape[0]):
        total, least = np.float32(0), np.float32(0)
        first = second = third = np.float32(0)
        best = 0
        for place in range(classes):
            value = probabilities[row, place]
            total += value
            least = min(least, value)
            if value > first:
                first, second, third, best = value, first, second, place
            elif value > second:
                second, third = value, second
            elif value > third:
                third = value
        # Written so that NaN fails; minus infinity is less, plus infinity no sum of 1.
        if not (abs(total - 1) < 1e-3) or not least >= -1e-6:
            return row
        if kind == 0:
            sure[row] = first
        elif kind == 1:
            sure[row] = first - second
        else:
            mean = 0.0
            for place in range(classes):
                value = probabilities[row, place]
                if value > 0:
                    mean += value * np.log(np.float64(value))
            sure[row] = 1 + mean / np.log(np.float64(max(2, classes)))
            if kind == 3:
                score = weights[0] + weights[4] * sure[row] + weights[FEATURES + best]
                score += weights[1] * np.log(max(np.float64(first), LEAST))
                score += weights[2] * np.log(max(np.float64(second), LEAST))
                score += weights[3] * np.log(max(np.float64(third), LEAST))
                sure[row] = 1 / (1 + np.exp(-score))
    return -1
