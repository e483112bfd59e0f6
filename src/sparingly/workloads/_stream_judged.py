"""How a gate over streams is judged: F1, other splits by recording, and small networks that answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparingly.guard import Promise, binomial_upper, walk
from sparingly.nn.gate import runs
from sparingly.workloads._stream_scout import Scout
from sparingly.workloads.stream_data import Scene


class Alone:
    """A scout that answers by itself: speech where one of the last ``lasts`` + 1 scores reaches ``threshold``."""

    def __init__(self, scout: Scout, threshold: float, lasts: int):
        self.scout, self.threshold, self.lasts = scout, threshold, lasts

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        """A whole stream, int16 [n, 256] -> bool [n]."""
        self.scout.reset()
        return lasting(self.scout(chunks) >= self.threshold, self.lasts)

    @classmethod
    def best(cls, scout: Scout, scenes: Sequence[Scene]) -> Alone:
        """With the threshold and the length that give the best F1 on these scenes."""
        found = []
        for scene in scenes:
            scout.reset()
            found.append(scout(scene.chunks))
        ranked = []
        for lasts in (0, 2, 4, 8, 12):
            for threshold in np.arange(-4, 4.1, 0.5):
                says = [lasting(scores >= threshold, lasts) for scores in found]
                counts = sum(confusion(one, scene.owner >= 0) for one, scene in zip(says, scenes, strict=True))
                ranked.append((f1(np.asarray(counts)), float(threshold), lasts))
        _, threshold, lasts = max(ranked)
        return cls(scout, threshold, lasts)


def lasting(mask: np.ndarray, lasts: int) -> np.ndarray:
    """bool [n] -> [n]: True there and for ``lasts`` more."""
    out = mask.copy()
    for by in range(1, lasts + 1):
        out[by:] |= mask[:-by]
    return out


def confusion(says: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """bool [n] each -> (both, only says, only truth)."""
    return np.array([(says & truth).sum(), (says & ~truth).sum(), (~says & truth).sum()], np.float64)


def f1(counts: np.ndarray) -> float:
    """What :func:`confusion` gives, or a sum of it -> the harmonic mean of precision and recall."""
    return float(2 * counts[0] / max(1.0, 2 * counts[0] + counts[1] + counts[2]))


def interval(counts: np.ndarray, resamples: int) -> dict[str, float]:
    """Of each scene, float64 [scenes, 3] -> F1 of all, with its 95 % interval over resampled scenes."""
    rng, n = np.random.default_rng(0), len(counts)
    found = [f1(counts[rng.integers(n, size=n)].sum(axis=0)) for _ in range(resamples)]
    lo, hi = np.quantile(found, (0.025, 0.975))
    value = f1(counts.sum(axis=0))
    return {"value": value, "lo": min(value, float(lo)), "hi": max(value, float(hi))}


def resplits(table: dict[float, np.ndarray], owner: np.ndarray, promise: Promise, times: int) -> dict[str, Any]:
    """Other splits by recording: some choose a threshold of the path, the others count its misses.

    table: threshold -> bool [events], missed there; owner int64 [events]: whose event. As many choose as have 3 % more
    events than it takes, or half of them: the others' rate is then known the better. ``kept``: in how many splits that
    rate is no higher than was promised.
    """
    share = max(0.5, min(1.03 * promise.needed(binary=True) / max(1, len(owner)), 0.9))
    rng, path, rows = np.random.default_rng(0), sorted(table), []
    names = np.unique(owner)
    for _ in range(times):
        ours = np.isin(owner, rng.permutation(names)[: round(share * len(names))])
        try:
            chosen = walk(path, lambda threshold, ours=ours: table[threshold][ours], promise).chosen
        except ValueError:  # too few events for anything to pass
            chosen = None
        lost = np.zeros(int((~ours).sum()), dtype=bool) if chosen is None else table[path[chosen]][~ours]
        threshold = None if chosen is None else path[chosen]
        rows.append({"threshold": threshold, "missed": int(lost.sum()), "events": len(lost)})
    return {
        "of": times,
        "kept": sum(row["missed"] <= promise.max_drop * row["events"] for row in rows),
        "certified": sum(row["threshold"] is not None for row in rows),
        "drops": [row["missed"] / max(1, row["events"]) for row in rows],
        "missed": sum(row["missed"] for row in rows),
        "events": sum(row["events"] for row in rows),
    }


def owner_of(events: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """events [n, 2], owner [chunks] -> int64 [n], in which recording each lies, or which one came last before."""
    last = np.maximum.accumulate(owner)
    return np.maximum(
        0, [int(owner[a:b].max(initial=-1)) if (owner[a:b] >= 0).any() else int(last[a]) for a, b in events]
    )


def upper(lost: np.ndarray) -> float:
    """The upper bound at 95 % of the rate of misses, bool [events]; 1 without an event."""
    return binomial_upper(int(lost.sum()), len(lost), 0.95) if len(lost) else 1.0


def useful(answers: np.ndarray, speech: np.ndarray) -> int:
    """How many stretches of answers hold something that silero alone calls speech."""
    return sum(bool(speech[start:stop].any()) for start, stop in runs(answers > 0))
