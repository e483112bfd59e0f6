"""Scouts: small networks that learn what a large one answers, to stand before it in a cascade."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly._data import call
from sparingly._data import inputs as inputs_of
from sparingly._progress import Say, silent
from sparingly.nn._modes import evaluating
from sparingly.nn._passes import run_passes
from sparingly.nn.cascade import Stage, asked
from sparingly.optim import optimizer


class _Tokens(nn.Module):
    """Mean of the embeddings of token ids, then a perceptron; ids are folded into ``rows``."""

    def __init__(self, width: int, classes: int, rows: int = 1 << 15):
        super().__init__()
        self.rows, self.embedding = rows, nn.Embedding(rows, width)
        self.rest = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [n, T] -> logits [n, classes]."""
        return self.rest(self.embedding(ids % self.rows).mean(dim=1))


def scout_for(example: Any, classes: int, width: int = 64) -> nn.Module:
    """A small network for inputs like these: pictures [n, channels, height, width], vectors [n, d], or token ids int64
    [n, T]. Raises TypeError for any other kind."""
    if isinstance(example, Tensor) and example.is_floating_point() and example.dim() == 4:
        trunk = [
            nn.Conv2d(example.shape[1], width // 4, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(width // 4, width, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * width, classes),
        ]  # fmt: skip
        return nn.Sequential(*trunk)
    if isinstance(example, Tensor) and example.is_floating_point() and example.dim() == 2:
        return nn.Sequential(nn.Linear(example.shape[1], width), nn.GELU(), nn.Linear(width, classes))
    if isinstance(example, Tensor) and example.dtype == torch.int64 and example.dim() == 2:
        return _Tokens(width, classes)
    got = f"{example.dtype} {list(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
    raise TypeError(
        "a scout of its own choice takes pictures [n, channels, height, width], vectors [n, d] or token ids int64 "
        f"[n, T], got {got}; give distill_scout a network: scout=..."
    )


def distill_scout(
    net: Stage,
    batches: Iterable[Any],
    scout: nn.Module | None = None,
    *,
    epochs: int = 5,
    lr: float = 2e-3,
    width: int = 64,
    progress: Say | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Train a small network from a large one's answers; no labels are needed. For ``sparingly.Cascade([scout, net])``.

    Args:
        net: the large network, or any stage of a cascade; asked once for each batch.
        batches: inputs, or (inputs, targets), of which targets are not looked at.
        scout: the small network, from inputs to logits [n, classes], trained in place. None: one that fits the inputs,
            see :func:`scout_for`, of that ``width``.
        epochs, lr: passes, and the rate of :func:`sparingly.optimizer`, which falls to 0 along a cosine.
        progress: called with what is being done and the share done.
        checkpoint: a file that training goes on from after an interruption; written every 30 seconds and at the end.

    Returns the scout, in evaluation mode. Raises ValueError for no batches, answers that are no probabilities or hold
    NaN, or a scout of other classes; TypeError for inputs that no scout is known for. Hinton, Vinyals, Dean, Distilling
    the Knowledge in a Neural Network, 2015, section 2, at a temperature of 1.
    """
    data = [inputs_of(batch) for batch in batches]
    if not data or epochs < 1:
        raise ValueError(f"distill_scout needs at least 1 batch and 1 epoch, got {len(data)} and {epochs}")
    say, wanted = progress or silent, []
    for place, given in enumerate(data):
        say("asking the large network", place / len(data))
        wanted.append(_answers(net, given))
    trained = scout_for(data[0], wanted[0].shape[1], width) if scout is None else scout

    def loss(batch: tuple[Any, Tensor]) -> Tensor:
        given, right = batch
        logits = call(trained, given)
        if logits.shape != right.shape:
            raise ValueError(f"the scout must give logits {list(right.shape)}, got {list(logits.shape)}")
        return F.cross_entropy(logits.float(), right.to(logits.device))

    trained.train()
    pairs = list(zip(data, wanted, strict=True))
    run_passes(pairs, epochs, optimizer(trained, lr=lr), loss, say, "training the scout", trained, checkpoint)
    return trained.eval()


def _answers(net: Stage, given: Any) -> Tensor:
    with evaluating(net) if isinstance(net, nn.Module) else nullcontext(), torch.no_grad():
        return asked(net, given, 0)
