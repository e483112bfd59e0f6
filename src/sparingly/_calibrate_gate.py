"""The threshold of a gate, so that no more events are missed than was allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparingly._data import data_hash
from sparingly._progress import Say
from sparingly.contract import Contract
from sparingly.energy.machine import installed
from sparingly.guard import Promise, walk
from sparingly.nn._modes import evaluating
from sparingly.nn.gate import ALWAYS, Counts, Gate, Watch, checked, forget

FIT_EVERY = 4
"""Every so manieth stream makes the path; the others test it."""

POINTS, SPAN, SAFEST = 12, 8.0, 0.05
"""Thresholds of the path; the first of them is reached so many times as often outside events as the last, and by this
share of the items at least."""

BOLDEST = 3.0
"""The last threshold of the path misses so many times what is allowed, and one event, of those that make it."""


@dataclass(frozen=True)
class Heard:
    """A stream with what the scout and the network say of all of it: items [n, ...], scores [n], the network's
    events int64 [events, 2]."""

    items: Any
    scores: np.ndarray
    events: np.ndarray


def hear(gate: Gate, items: Any) -> Heard:
    """Ask both about every item of a stream. What the scout raises is passed on too."""
    forget(gate.scout)
    forget(gate.net)
    scores = checked(gate.scout(items), len(items), "scout")
    return Heard(items, scores, gate.events.of(checked(gate.net(items), len(items), "net")))


def missed_at(gate: Gate, heard: Sequence[Heard], threshold: float) -> tuple[np.ndarray, Counts]:
    """(bool [events], which of them a gate with that threshold misses; what it does meanwhile)."""
    watch, found = Watch(gate.net, gate.before, gate.after), [np.zeros(0, dtype=bool)]
    for one in heard:
        watch.restart()
        found.append(gate.events.missed(one.events, watch.advance(one.items, one.scores >= threshold)))
    return np.concatenate(found), watch.counts()


def path_of(gate: Gate, heard: Sequence[Heard]) -> list[float]:
    """Thresholds from careful to bold: the last one misses BOLDEST times what is allowed of these events, the first is
    reached SPAN times as often outside events (or by SAFEST of the items), and each between by the same factor more
    often than the next.

    An event counts as missed here where the network sleeps; what it answers awake is left to the test.
    """
    least, outside = [], []
    for one in heard:
        lasting, quiet = _lasting(one.scores, gate.after), np.ones(len(one.scores), dtype=bool)
        for start, stop in one.events.tolist():
            least.append(np.sort(lasting[start:stop])[-int(gate.events.needed(np.array(stop - start)))])
            quiet[start:stop] = False
        outside.append(one.scores[quiet])
    scores, boldest = np.sort(np.concatenate(outside)), ALWAYS
    if least:
        boldest = np.sort(least)[min(len(least) - 1, int(BOLDEST * gate.miss_rate * len(least)) + 1)]
    share = max(float((scores >= boldest).mean()) if len(scores) else 1.0, 1 / max(1, len(scores)))
    shares = np.geomspace(min(1.0, max(share * SPAN, SAFEST)), share, POINTS)[:-1]
    path = {float(scores[min(len(scores) - 1, round((1 - one) * len(scores)))]) for one in shares if len(scores)}
    rising = sorted(value for value in path | {float(boldest)} if np.isfinite(value) and value <= boldest)
    return rising or [float(np.finfo(np.float64).min)]


def calibrate_gate(gate: Gate, streams: Any, confidence: float, say: Say) -> Contract:
    """See :func:`sparingly.calibrate`. Scout and network are asked about every item; what they raise is passed on."""
    promise = Promise(gate.miss_rate, confidence)
    given = _streams(streams)
    if gate.path is None and len(given) < FIT_EVERY:
        raise ValueError(
            f"give at least {FIT_EVERY} streams, of which a part makes the path, or make the gate with path=..., got "
            f"{len(given)} with items"
        )
    try:
        with evaluating(gate), torch.no_grad():
            heard = []
            for place, items in enumerate(given):
                say("asking scout and network", place / len(given))
                heard.append(hear(gate, items))
            tests = heard if gate.path else [one for place, one in enumerate(heard) if place % FIT_EVERY]
            _enough(promise, sum(len(one.events) for one in tests))
            path = gate.path or path_of(gate, heard[::FIT_EVERY])
            counts: dict[float, Counts] = {}

            def missed(threshold: float) -> np.ndarray:
                say(f"testing threshold {threshold:.3g}", None)
                found, counts[threshold] = missed_at(gate, tests, threshold)
                return found

            found = walk(path, missed, promise)
    finally:
        gate.reset()
        forget(gate.net)
    chosen = None if found.chosen is None else path[found.chosen]
    items = sum(len(one.items) for one in tests)
    contract = Contract.of(
        found,
        promise,
        [{"threshold": value} for value in path],
        metric="events",
        data_hash=data_hash(given),
        dense_quality=1.0,
        selective_quality=1.0 if found.chosen is None else 1 - found.tried[found.chosen].drop,
        versions=installed(),
    )
    gate.threshold = ALWAYS if chosen is None else chosen
    gate.expected = Counts(items, items, items, len(tests)) if chosen is None else counts[chosen]
    gate.sparingly_contract = contract
    gate.reset_counts()
    return contract


def _enough(promise: Promise, events: int) -> None:
    if not events:
        raise ValueError("there are no events: the network calls nothing in these streams positive")
    try:
        promise.check(events, binary=True)
    except ValueError as error:
        raise ValueError(f"{error} (an example is an event: a run of items that the network calls positive)") from None


def _streams(streams: Any) -> list[Any]:
    given = [streams] if isinstance(streams, (Tensor, np.ndarray)) else list(streams)
    wrong = [type(one).__name__ for one in given if not isinstance(one, (Tensor, np.ndarray))]
    if wrong:
        raise TypeError(f"streams must be tensors or arrays [n, ...], got {wrong[0]}")
    given = [one for one in given if len(one)]
    if not given:
        raise ValueError("there are no items: give streams [n, ...]")
    return given


def _lasting(scores: np.ndarray, after: int) -> np.ndarray:
    """[n] -> [n]: the highest of an item's score and those of the ``after`` before it: up to there it is awake."""
    padded = np.concatenate([np.full(after, -np.inf), scores])
    return np.lib.stride_tricks.sliding_window_view(padded, after + 1).max(axis=1)
