"""Passes over batches of answers that a network learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparingly._progress import Say


def run_passes(
    data: Sequence[Any],
    epochs: int,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Any], Tensor],
    say: Say,
    what: str,
) -> list[float]:
    """A step for each batch, ``epochs`` times over; the rate falls to 0 along a cosine. The mean loss of each epoch.

    Raises ValueError, before its step, for a batch whose loss is not finite.
    """
    steps, losses = epochs * len(data), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        total = 0.0
        for place, batch in enumerate(data):
            say(what, (epoch * len(data) + place) / steps)
            value = loss(batch)
            if not torch.isfinite(value):
                raise ValueError(f"the loss is {value.item()} in batch {place}: look for NaN in inputs and weights")
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            total += float(value.detach())
        losses.append(total / len(data))
    return losses
