"""A gate: over a stream, a cheap scout decides when a large network wakes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.contract import Contract
from sparingly.nn._modes import evaluating

Scores = Callable[[Any], Any]

ALWAYS = -math.inf
"""A threshold that every score reaches."""

_LONG = 1 << 60


@dataclass(frozen=True)
class Events:
    """What a gate must not miss.

    Args:
        positive: the network's score from which it says that something is there.
        shortest: an event is a maximal run of at least so many items that the network itself calls positive.
        found: an event counts as found if at least this share of its items (and at least one) is positive in the
            gate's answers too; 1: all of them.
    """

    positive: float = 0.5
    shortest: int = 1
    found: float = 0.5

    def __post_init__(self) -> None:
        if not math.isfinite(self.positive) or self.positive <= 0:
            raise ValueError(f"positive must be more than 0, the answer of a sleeping gate, got {self.positive}")
        if self.shortest < 1:
            raise ValueError(f"shortest must be at least 1, got {self.shortest}")
        if not 0 < self.found <= 1:
            raise ValueError(f"found must be above 0 and at most 1, got {self.found}")

    def of(self, scores: np.ndarray) -> np.ndarray:
        """The network's scores [n] of a whole stream -> int64 [events, 2], first item and the one after the last."""
        found = runs(scores >= self.positive)
        return found[found[:, 1] - found[:, 0] >= self.shortest]

    def missed(self, events: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """bool [events]: which of them a gate's answers [n] miss."""
        hits = np.concatenate([[0], np.cumsum(answers >= self.positive)])
        length = events[:, 1] - events[:, 0]
        return hits[events[:, 1]] - hits[events[:, 0]] < self.needed(length)

    def needed(self, length: np.ndarray) -> np.ndarray:
        """How many items of events of that length [n] must be positive."""
        return np.maximum(1, np.ceil(self.found * length - 1e-9)).astype(np.int64)


class Counts(NamedTuple):
    """``items`` that came, for how many the network was ``awake`` and answered, how many it ``ran`` on (those that it
    only warmed up on are counted), how often it woke (``wakes``), and for how many items the scout had ``failed``."""

    items: int = 0
    awake: int = 0
    ran: int = 0
    wakes: int = 0
    failed: int = 0

    @property
    def share_awake(self) -> float:
        """Share of the items that the network answered; 0 before the first."""
        return self.awake / max(1, self.items)


class Watch:
    """A network's place in one stream: when it last was asked for, and the items before, kept for when it wakes.

    ``place``: how many items of the stream have come; ``asked``: the place of the last one that the network was asked
    for. Not a module, whose attributes are slow to set.
    """

    __slots__ = ("after", "asked", "awake", "before", "earlier", "failed", "net", "place", "ran", "ring", "wakes")

    def __init__(self, net: Scores, before: int, after: int):
        self.net, self.before, self.after = net, before if hasattr(net, "reset") else 0, after
        self.place = 0
        self.clear()
        self.restart()

    def restart(self) -> None:
        """Before the first item of a stream."""
        self.earlier += self.place
        self.place, self.asked, self.ring = 0, -_LONG, None

    def clear(self) -> None:
        """Count from here."""
        self.earlier, self.awake, self.ran, self.wakes, self.failed = -self.place, 0, 0, 0, 0

    def counts(self) -> Counts:
        return Counts(self.earlier + self.place, self.awake, self.ran, self.wakes, self.failed)

    def keep(self, place: int, item: Any) -> None:
        """Put the item [...] of that place among the last ``before``."""
        if self.ring is None:
            shape = (self.before, *item.shape)
            self.ring = item.new_empty(shape) if isinstance(item, Tensor) else np.empty(shape, item.dtype)
        self.ring[place % self.before] = item

    def advance(self, items: Any, asks: np.ndarray) -> np.ndarray:
        """items [n, ...], asks bool [n]: where the network is asked for -> its answers float32 [n], 0 where it slept.

        If it raises, it is asleep afterwards.
        """
        n = len(asks)
        out = np.zeros(n, np.float32)
        asked, self.asked = self.asked, -_LONG
        goes_on = self.place - 1 - asked <= self.after
        at = np.flatnonzero(asks)
        awake = _merged(np.concatenate([[asked - self.place], at]) if goes_on else at, self.after, n)
        goes_on = goes_on and len(awake) > 0 and awake[0, 0] == 0
        given = []
        for place, (start, stop) in enumerate(awake.tolist()):
            warm = None if goes_on and place == 0 else self._before(items, start)
            given.append(items[start:stop] if warm is None else _joined(warm, items[start:stop]))
        for (start, stop), answers in zip(awake.tolist(), self._answers(given, goes_on), strict=True):
            out[start:stop] = answers[len(answers) - (stop - start) :]
        if self.before:
            for place in range(max(0, n - self.before), n):
                self.keep(self.place + place, items[place])
        self.awake += int((awake[:, 1] - awake[:, 0]).sum())
        self.asked = self.place + int(at[-1]) if len(at) else asked
        self.place += n
        return out

    def _answers(self, given: list[Any], goes_on: bool) -> list[np.ndarray]:
        """Scores of runs of items, each after a reset, except the first one where the network is awake."""
        found = [self.net(given[0])] if goes_on else []
        others = given[len(found) :]
        self.wakes += len(others)
        if len(others) > 1 and hasattr(self.net, "runs"):
            found += self.net.runs(others)  # pyright: ignore[reportFunctionMemberAccess]
            others = []
        for one in others:
            forget(self.net)
            found.append(self.net(one))
        self.ran += sum(map(len, given))
        return [checked(one, len(items), "net") for one, items in zip(found, given, strict=True)]

    def go_on(self, item: Any, asks: bool) -> float:
        """The answer to the next item [...] where the one before was awake too and the network has ``step``."""
        place, asked, self.asked = self.place, self.asked, -_LONG
        answer = float(self.net.step(item))  # pyright: ignore[reportFunctionMemberAccess]
        if math.isnan(answer):
            raise ValueError(f"net gave NaN for item {place} of the stream: look for NaN in the stream")
        if self.before:
            self.keep(place, item)
        self.asked, self.place = place if asks else asked, place + 1
        self.awake += 1
        self.ran += 1
        return answer

    def _before(self, items: Any, start: int) -> Any:
        """The items before ``start``, at most ``before``; None if there are none."""
        here = items[max(0, start - self.before) : start]
        wanted = min(self.before - len(here), self.place)
        if not wanted or self.ring is None:
            return here if len(here) else None
        return _joined(self.ring[[(self.place - back) % self.before for back in range(wanted, 0, -1)]], here)


class Gate(nn.Module):
    """A scout looks at every item of a stream; a large network sleeps until the scout's score reaches ``threshold``.

    It then stays awake until ``after`` items have come without such a score. While it sleeps it is not called, and the
    answer is 0. ``sparingly.calibrate(gate, streams)`` finds the highest threshold at which, with confidence, no more
    than ``miss_rate`` of what the network itself would find is missed; before, the network answers everything.

    A stream may come in pieces, ``gate(items)``, or item by item, ``gate.step(item)``: answers are the same as long as
    scout and network do not mind. ``reset()`` begins another stream.

    Args:
        scout: consecutive items [n, ...] -> scores [n], the higher the more likely that something is there. What it
            keeps from item to item, ``scout.reset()`` forgets, if it has that; ``scout.step(item) -> float``, if it has
            that, is asked in ``gate.step``. If it raises, the network runs, and the item is counted as ``failed``.
        net: consecutive items [n, ...] -> scores [n]. If it has ``reset()``, it keeps something from item to item: on
            waking it is reset and sees items from before; what it answers for those is thrown away. ``net.step``, if
            it has that, is asked in ``gate.step``, and ``net.runs(list of [n, ...]) -> list of [n]``, if it has that,
            for several runs at once, each as after a reset; what it keeps is then what the last one leaves.
        miss_rate: between 0 and 1, both left out.
        before: how many items that is at most.
        after: items.
        events: what must not be missed.
        path: thresholds for calibration to test, from the lowest on, that were chosen on other data. None: a quarter of
            the streams makes them, and cannot test.

    Viola, Jones, Rapid Object Detection using a Boosted Cascade of Simple Features, CVPR 2001, on rejecting early; the
    test is that of :mod:`sparingly.guard`::

        @inproceedings{viola2001rapid, title={Rapid Object Detection using a Boosted Cascade of Simple Features},
          author={Viola, Paul and Jones, Michael}, booktitle={CVPR}, year={2001}}
    """

    def __init__(
        self,
        scout: Scores,
        net: Scores,
        miss_rate: float = 0.001,
        *,
        before: int = 8,
        after: int = 16,
        events: Events | None = None,
        path: Sequence[float] | None = None,
    ):
        super().__init__()
        for name, one in (("scout", scout), ("net", net)):
            if not callable(one):
                raise TypeError(f"{name} must be callable, got {type(one).__name__}")
        if not 0 < miss_rate < 1:
            raise ValueError(f"miss_rate must be between 0 and 1, both left out, got {miss_rate}")
        for name, count in (("before", before), ("after", after)):
            if count < 0:
                raise ValueError(f"{name} must be at least 0 items, got {count}")
        path = None if path is None else [float(value) for value in path]
        if path is not None and (not path or path != sorted(set(path)) or not np.isfinite(path).all()):
            raise ValueError(f"path must hold finite thresholds in rising order, got {path}")
        self.scout, self.net, self.miss_rate, self.before, self.after = scout, net, miss_rate, before, after
        self.events, self.path = events or Events(), path
        self.threshold: float = ALWAYS
        self.expected = Counts()
        self.sparingly_contract: Contract | None = None
        self.why_failed: str | None = None
        self._watch = Watch(net, before, after)
        self._one: Callable[[Any], float] | None = getattr(scout, "step", None)
        self._lean = hasattr(net, "step") and not isinstance(net, nn.Module)

    @property
    def counts(self) -> Counts:
        """Since it was made or calibrated, or since ``reset_counts()``."""
        return self._watch.counts()

    def forward(self, items: Any) -> Tensor:
        """The next items of the stream, a tensor or array [n, ...] -> float32 [n] on the CPU, 0 where the net slept.

        No items, no answers. Raises ValueError for scores of another shape, or NaN; what the net raises is passed on.
        """
        if not len(items):
            return torch.zeros(0)
        with evaluating(self), torch.no_grad():
            try:
                raw = self.scout(items)
            except Exception as error:
                asks = self._failed(len(items), error)
            else:
                asks = checked(raw, len(items), "scout") >= self.threshold
            return torch.from_numpy(self._watch.advance(items, asks))

    def step(self, item: Any) -> float:
        """The next item [...] of the stream by itself -> its answer; as ``forward``, with less around it."""
        watch, scout = self._watch, self._one
        if scout is None:
            return float(self(item[None])[0])
        place = watch.place
        try:
            score = scout(item)
        except Exception as error:
            asks = bool(self._failed(1, error)[0])
        else:
            if score < self.threshold and place - watch.asked > watch.after:
                # Asleep, and stays so. What is in the way here costs every item of a stream.
                ring = watch.ring
                if ring is not None:
                    ring[place % watch.before] = item
                elif watch.before:
                    watch.keep(place, item)
                watch.place = place + 1
                return 0.0
            asks = bool(checked([score], 1, "scout")[0] >= self.threshold)
        if self._lean and place - 1 - watch.asked <= watch.after and (asks or place - watch.asked <= watch.after):
            return watch.go_on(item, asks)
        with evaluating(self), torch.no_grad():
            return float(watch.advance(item[None], np.array([asks]))[0])

    def reset(self) -> None:
        """Begin another stream; counts go on."""
        self._watch.restart()
        forget(self.scout)

    def reset_counts(self) -> None:
        """Forget how many items have come."""
        self._watch.clear()
        self.why_failed = None

    def get_extra_state(self) -> dict[str, Any]:
        contract = None if self.sparingly_contract is None else self.sparingly_contract.as_dict()
        return {"threshold": self.threshold, "expected": list(self.expected), "contract": contract}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        contract = None if state["contract"] is None else Contract.from_dict(state["contract"])
        self.threshold, self.expected = float(state["threshold"]), Counts(*state["expected"])
        self.sparingly_contract = contract

    def extra_repr(self) -> str:
        at = "always awake" if self.threshold == ALWAYS else f"awake from {self.threshold:.4g}"
        return f"miss_rate={self.miss_rate}, before={self.before}, after={self.after}, {at}"

    def _failed(self, n: int, error: Exception) -> np.ndarray:
        self._watch.failed += n
        self.why_failed = f"{type(error).__name__}: {error}"
        return np.ones(n, dtype=bool)


def checked(raw: Any, n: int, whose: str) -> np.ndarray:
    """Scores [n], numbers. Raises TypeError or ValueError, naming whose they are, for anything else, and for NaN."""
    if isinstance(raw, Tensor):
        raw = raw.detach().cpu().numpy()
    if not isinstance(raw, (np.ndarray, list)):
        raise TypeError(f"{whose} must give an array or tensor of scores [n], got {type(raw).__name__}")
    found = np.asarray(raw)
    if found.shape != (n,) or found.dtype.kind not in "fiub":
        got = f"{found.dtype} {list(found.shape)}"
        raise ValueError(f"{whose} must give one score for each of {n} items, [{n}], got {got}")
    wrong = found != found
    if wrong.any():
        raise ValueError(f"{whose} gave NaN for item {int(wrong.argmax())} of {n}: look for NaN in the stream")
    return found


def forget(one: Any) -> None:
    """Reset a scout or network, if it keeps anything."""
    if hasattr(one, "reset"):
        one.reset()


def runs(mask: np.ndarray) -> np.ndarray:
    """bool [n] -> int64 [runs, 2]: where each maximal run of True starts, and where it has stopped."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2)


def _merged(asked: np.ndarray, after: int, n: int) -> np.ndarray:
    """Rising places, the first perhaps below 0 -> int64 [runs, 2] inside 0..n, each lasting for ``after`` more."""
    if not len(asked):
        return np.zeros((0, 2), np.int64)
    cuts = np.flatnonzero(np.diff(asked) > after + 1)
    starts = asked[np.concatenate([[0], cuts + 1])]
    stops = asked[np.concatenate([cuts, [-1]])] + after + 1
    found = np.stack([starts, stops], axis=1).clip(0, n)
    return found[found[:, 1] > found[:, 0]]


def _joined(first: Any, then: Any) -> Any:
    return torch.cat([first, then]) if isinstance(first, Tensor) else np.concatenate([first, then])
