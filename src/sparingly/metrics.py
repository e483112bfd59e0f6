"""What a contract is about: per-example losses of a model, and how much worse one model does than another.

A :class:`Metric` observes a model on batches. For most metrics an observation is the loss of each example; for
:data:`agreement` it is the model's answers, because its loss is how often they differ from the dense model's.

    dense = observe(metric, model, data)           # before conversion, or with every unit running
    selective = observe(metric, model, data)
    metric.drops(dense, selective)                 # [n], what sparingly.guard tests
    metric.promise(max_drop=0.01, confidence=0.95)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparingly._data import batches, to_device
from sparingly.guard import Promise
from sparingly.nn._modes import evaluating

__all__ = ["METRICS", "Metric", "accuracy", "agreement", "as_metric", "observe", "perplexity"]

_CHUNK = 1 << 22
"""Logits that are float32 at a time: 16 MiB. A window of 2,048 tokens and 49,152 classes would be 384 MiB."""


def _one(loss: float) -> float:
    return loss


def _share_right(loss: float) -> float:
    return 1.0 - loss


@dataclass(frozen=True)
class Metric:
    """How a model is judged, one example at a time.

    ``observe``: (model, batch) -> losses [n] floating, or with ``answers`` what the model answers, int64 [n, ...].
    ``bounds``: the least and greatest loss, None if there is none. ``relative``: losses are log-losses, and a drop of
    0.01 is one per cent of ``exp(loss)``; else it is 0.01 of the loss. ``quality_of``: mean loss -> what is shown.
    """

    name: str
    observe: Callable[[nn.Module, Any], Tensor]
    bounds: tuple[float, float] | None
    relative: bool = False
    answers: bool = False
    higher_is_better: bool = False
    quality_of: Callable[[float], float] = _one

    def losses(self, dense: Tensor, observed: Tensor) -> Tensor:
        """Observations of the dense and of some model -> the latter's losses [n]: float64, or bool if all or nothing.

        With ``answers`` of shape [n, ...] the loss of an example is the share of its answers that differ.
        """
        if dense.shape != observed.shape:
            raise ValueError(
                f"both models must be observed on the same examples, got {list(dense.shape)} and {list(observed.shape)}"
            )
        if not self.answers:
            return observed
        differs = dense != observed
        return differs if differs.dim() == 1 else differs.flatten(1).double().mean(1)

    def drops(self, dense: Tensor, selective: Tensor) -> Tensor:
        """Observations of both -> how much worse the selective model does on each example, [n] float64 or bool."""
        losses = self.losses(dense, selective)
        return losses if self.answers else losses - dense

    def quality(self, dense: Tensor, observed: Tensor) -> float:
        """The figure to show: perplexity, share of right answers, share of answers as the dense model's, mean loss."""
        return self.quality_of(float(self.losses(dense, observed).double().mean()))

    def promise(self, max_drop: float, confidence: float = 0.95) -> Promise:
        """The promise to test on :meth:`drops`. Raises ValueError for values that make no sense."""
        span = None
        if self.bounds:
            low, high = self.bounds
            span = self.bounds if self.answers else (low - high, high - low)
        return Promise(max_drop, confidence, bounds=span, relative=self.relative)


def observe(metric: Metric, model: nn.Module, data: Any) -> Tensor:
    """One observation per example, in the order of the data: float64 losses [n], or int64 answers [n, ...], on the CPU.

    Runs without gradients and in evaluation mode; the mode of every module is put back.

    Args:
        data: batches, or one data set (see ``batches`` in ``sparingly._data``). Batches go to the model's device.

    Raises:
        ValueError: no examples; a loss that is NaN, infinite or out of the metric's bounds (named by its number).
        TypeError: the metric, batch or model gives something else than it has to.
    """
    device = next((value.device for value in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    seen: list[Tensor] = []
    count = 0
    with evaluating(model), torch.no_grad():
        for batch in batches(data):
            values = metric.observe(model, to_device(batch, device))
            seen.append(_checked(metric, values, count))
            count += len(seen[-1])
    if not count:
        raise ValueError("there are no examples: every batch is empty")
    if len({value.shape[1:] for value in seen}) > 1:
        shapes = sorted({str(list(value.shape[1:])) for value in seen})
        raise ValueError(f"{metric.name}: answers need one shape per example over all batches, got {', '.join(shapes)}")
    return torch.cat(seen)


def _checked(metric: Metric, values: Any, start: int) -> Tensor:
    """float64 or int64 on the CPU; ``start``: how many examples came before."""
    kind = "answers int64 [n, ...]" if metric.answers else "losses floating or bool [n]"
    if not isinstance(values, Tensor):
        raise TypeError(f"{metric.name} must give {kind}, got {type(values).__name__}")
    given = f"{values.dtype} {list(values.shape)}"
    if metric.answers:
        if values.dtype != torch.int64 or not values.dim():
            raise TypeError(f"{metric.name} must give {kind}, got {given}")
        return values.cpu()
    if values.dim() != 1 or not (values.dtype.is_floating_point or values.dtype == torch.bool):
        raise TypeError(f"{metric.name} must give {kind}, one per example, got {given}")
    losses = values.double().cpu()
    low, high = metric.bounds or (-math.inf, math.inf)
    bad = ~losses.isfinite() | (losses < low) | (losses > high)
    if bad.any():
        example = int(bad.nonzero()[0])
        allowed = f"in {low:g}..{high:g}" if metric.bounds else "finite"
        raise ValueError(
            f"{metric.name} must be {allowed}, got {float(losses[example])} for example {start + example}. Look for "
            "NaN or infinity in the data and in the model's answers"
        )
    return losses


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    """The model's logits: its output, or that output's ``.logits``. A mapping goes in by keyword."""
    names = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in names else {}
    if isinstance(inputs, Mapping):
        output = model(**inputs, **extra)
    elif "input_ids" in names:
        output = model(input_ids=inputs, **extra)
    else:
        output = model(inputs, **extra)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point or logits.dim() < 2:
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        raise TypeError(f"the model must give logits, floating [n, ..., classes] or with .logits, got {got}")
    return logits


def _unwrapped(batch: Any) -> Any:
    """A loader over one tensor gives lists of one tensor."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch


def _observe_perplexity(model: nn.Module, batch: Any) -> Tensor:
    batch = _unwrapped(batch)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(ids, Tensor):
        raise TypeError(
            "perplexity takes token ids [n, T], or a mapping with input_ids, as tensors; got "
            f"{f'a mapping with {sorted(batch)}' if isinstance(batch, Mapping) else type(batch).__name__}"
        )
    if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2 or ids.shape[1] < 2 or not len(ids):
        raise ValueError(
            f"token ids must be int64 [n, T], n of at least 1 and T of 2, got {ids.dtype} {list(ids.shape)}"
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be as token ids {list(ids.shape)}, got {list(mask.shape)}")
    # A token counts if it and the one it is predicted from are real: the first after padding is predicted from a pad.
    counts = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if not counts.any(1).all():
        row = int((~counts.any(1)).nonzero()[0])
        raise ValueError(f"every window needs two tokens that attention_mask leaves in, got fewer in row {row}")
    logits = _logits(model, batch)
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits must be [n, T, classes] for ids {list(ids.shape)}, got {list(logits.shape)}")
    _check_classes(ids, logits, "token ids")
    losses = [_log_losses(logits[row, :-1], ids[row, 1:].long())[keep].mean() for row, keep in enumerate(counts)]
    return torch.stack(losses)


def _log_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [T, classes], targets int64 [T] -> log-loss of each in nats, float64 [T]; few are float32 at a time."""
    parts = []
    step = max(1, _CHUNK // logits.shape[1])
    for part, right in zip(logits.split(step), targets.split(step), strict=True):
        exact = part if part.dtype == torch.float64 else part.float()
        parts.append(nn.functional.cross_entropy(exact, right, reduction="none").double())
    return torch.cat(parts)


def _check_classes(classes: Tensor, logits: Tensor, what: str) -> None:
    lowest, highest = (int(value) for value in torch.aminmax(classes))
    if lowest < 0 or highest >= logits.shape[-1]:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"{what} must be in 0..{logits.shape[-1] - 1}, got {wrong}")


def _argmax(logits: Tensor) -> Tensor:
    """logits [n, ..., classes] -> int64 [n, ...]; raises ValueError for NaN, which argmax would take for the best."""
    bad = logits.isnan().flatten(1).any(1)
    if bad.any():
        raise ValueError(f"logits hold NaN for example {int(bad.nonzero()[0])} of a batch")
    return logits.argmax(-1)


def _observe_accuracy(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        given = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(f"accuracy takes batches (inputs, targets), targets as a tensor, got {given}")
    inputs, targets = batch
    logits = _logits(model, inputs)
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must be int64 {list(logits.shape[:-1])}, got {targets.dtype} {list(targets.shape)}")
    if targets.numel():
        _check_classes(targets, logits, "targets")
    return (_argmax(logits) != targets).double().flatten(1).mean(1) if targets.dim() > 1 else _argmax(logits) != targets


def _observe_agreement(model: nn.Module, batch: Any) -> Tensor:
    return _argmax(_logits(model, batch[0] if isinstance(batch, (tuple, list)) and batch else batch))


perplexity = Metric("perplexity", _observe_perplexity, None, relative=True, quality_of=math.exp)
"""Mean next-token log-loss of each window; a drop of 0.01 is one per cent of perplexity.

A batch is token ids int64 [n, T], or a mapping with ``input_ids`` and perhaps ``attention_mask`` and more, which goes
to the model by keyword. Each window counts the same; windows of one length make the quality the usual perplexity.
"""

accuracy = Metric("accuracy", _observe_accuracy, (0.0, 1.0), higher_is_better=True, quality_of=_share_right)
"""Share of right answers; a drop of 0.01 is one point of it. A batch is (inputs, targets int64 [n] or [n, T])."""

agreement = Metric(
    "agreement", _observe_agreement, (0.0, 1.0), answers=True, higher_is_better=True, quality_of=_share_right
)
"""Share of answers (argmax) that are the dense model's; a drop of 0.01 is one in a hundred. A batch is the inputs; of a
tuple or list the first is taken. For logits [n, T, classes] an example's loss is the share of its T that differ."""

METRICS = {metric.name: metric for metric in (perplexity, accuracy, agreement)}


def as_metric(metric: Metric | str | Callable[[nn.Module, Any], Tensor]) -> Metric:
    """A metric, the name of one, or your own (model, batch) -> losses [n] in 0..1, which then has absolute drops.

    Raises ValueError for an unknown name, TypeError for anything else.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, or a callable, got {metric!r}")
        return METRICS[metric]
    if not callable(metric):
        raise TypeError(f"metric must be a Metric, a name or a callable, got {type(metric).__name__}")
    return Metric(getattr(metric, "__name__", type(metric).__name__), metric, (0.0, 1.0))
