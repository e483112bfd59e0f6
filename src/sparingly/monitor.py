"""Whether a cascade or gate still meets what it was calibrated on: live shares beside calibration's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparingly.nn.cascade import Staged
from sparingly.nn.gate import Counts, Gate


@dataclass(frozen=True)
class Drift:
    """What share of the inputs left at each stage, in calibration (``expected``) and since (``live``, of ``n``). Of a
    gate, the first stage is the scout, the second the network.

    ``distance``: half the sum of their differences, 0..1: so many inputs leave elsewhere. ``p_value``: of "both are
    draws from one distribution" (G-test; Woolf 1957). ``drifted``: both say that inputs have changed, so that the
    contract's assumption no longer holds.
    """

    expected: tuple[float, ...]
    live: tuple[float, ...]
    n: int
    distance: float
    p_value: float
    drifted: bool

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        shares = "; ".join(
            f"stage {place}: {live:.1%} leave, {expected:.1%} in calibration"
            for place, (expected, live) in enumerate(zip(self.expected, self.live, strict=True))
        )
        said = "inputs have changed: the contract's assumption no longer holds, calibrate again"
        return f"{said if self.drifted else 'no change seen'} ({self.n:,} inputs, p = {self.p_value:.2g}; {shares})"


def monitor(model: Staged | Gate, *, confidence: float = 0.99, distance: float = 0.02) -> Drift:
    """Compare where inputs have left since calibration (or ``reset_counts()``) with where they left then.

    A test alone would call every difference a change once a stream is long enough, and a difference alone any short
    one: drift is what the test is sure of at ``confidence`` and what moves at least the share ``distance`` of the
    inputs. Look once for each window of inputs; who looks after every batch will be alarmed more often.

    Items of a stream come in runs: in a gate's test each waking counts once, with its share of the sleep. A stream with
    more or less in it than calibration's is also a change; whether the promise suffers is then for you to judge.

    Raises ValueError if the model is not calibrated, nothing has come since, or an option is not between 0 and 1.
    """
    for name, value in (("confidence", confidence), ("distance", distance)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    counts, items = _counts(model)
    if not counts[0].sum():
        raise ValueError(f"the {type(model).__name__} is not calibrated: call sparingly.calibrate(model, data) first")
    if not counts[1].sum():
        raise ValueError("no inputs have come since calibration")
    expected, live = (count / count.sum() for count in counts)
    moved = float((expected - live).abs().sum() / 2)
    p_value = _same(torch.stack(counts))
    return Drift(
        tuple(expected.tolist()),
        tuple(live.tolist()),
        items,
        moved,
        p_value,
        p_value < 1 - confidence and moved >= distance,
    )


def _counts(model: Staged | Gate) -> tuple[tuple[Tensor, Tensor], int]:
    """((how many left where in calibration, and since), float64 [stages] each; how many items have come since)."""
    if isinstance(model, Gate):
        return (_wakings(model.expected), _wakings(model.counts)), model.counts.items
    return (model.expected.double().cpu(), model.left.double().cpu()), int(model.left.sum())


def _wakings(counts: Counts) -> Tensor:
    """Items asleep and awake, thinned so that one awake stands for each waking."""
    thinned = counts.wakes / counts.awake if counts.awake else 1.0
    return torch.tensor([counts.items - counts.awake, counts.awake], dtype=torch.float64) * thinned


def _same(counts: Tensor) -> float:
    """The p-value of "both rows of counts [2, stages] are draws from one distribution"."""
    counts = counts[:, counts.sum(dim=0) > 0]
    if counts.shape[1] < 2:
        return 1.0
    wanted = counts.sum(dim=1, keepdim=True) * counts.sum(dim=0) / counts.sum()
    ratio = 2 * torch.special.xlogy(counts, counts / wanted).sum()
    half = torch.tensor((counts.shape[1] - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, (ratio / 2).clamp_min(0)))
