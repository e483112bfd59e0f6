"""Passes over batches of answers that a network learns from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparingly._progress import Say

SAVE_EVERY_S = 30.0


def run_passes(
    data: Sequence[Any],
    epochs: int,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Any], Tensor],
    say: Say,
    what: str,
    learner: nn.Module,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[float]:
    """A step for each batch, ``epochs`` times over; the rate falls to 0 along a cosine. The mean loss of each epoch.

    ``checkpoint``: a file that holds the state of ``learner`` and optimiser, written every 30 seconds and at the end. A
    call that finds it goes on from there, to the same result; it must have the same number of batches and epochs.

    Raises ValueError, before its step, for a batch whose loss is not finite, and for a checkpoint of another training.
    """
    steps = epochs * len(data)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    file = None if checkpoint is None else Path(checkpoint)
    parts = {"learner": learner, "optimizer": optimizer, "schedule": schedule}
    done, losses, total = 0, [], 0.0
    if file is not None and file.is_file():
        done, losses, total = _resumed(file, parts, steps)
    saved = time.monotonic()
    for step in range(done, steps):
        place = step % len(data)
        say(what, step / steps)
        value = loss(data[place])
        if not torch.isfinite(value):
            raise ValueError(f"the loss is {value.item()} in batch {place}: look for NaN in inputs and weights")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        total += float(value.detach())
        if place == len(data) - 1:
            losses.append(total / len(data))
            total = 0.0
        if file is not None and (step == steps - 1 or time.monotonic() - saved > SAVE_EVERY_S):
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step + 1, "steps": steps, "losses": losses, "total": total}
            fresh = file.with_name(file.name + ".tmp")
            torch.save(state | {"random": torch.get_rng_state()}, fresh)
            os.replace(fresh, file)
            saved = time.monotonic()
    return losses


def _resumed(file: Path, parts: dict[str, Any], steps: int) -> tuple[int, list[float], float]:
    """Put back what a checkpoint holds -> steps that are done, losses of whole epochs, sum of the one begun."""
    kept: dict[str, Any] = torch.load(file, weights_only=True)
    if kept.get("steps") != steps:
        raise ValueError(
            f"{file} is of a training of {kept.get('steps')} steps, this one has {steps}: delete it, or give the same "
            "batches and epochs"
        )
    try:
        for name, part in parts.items():
            part.load_state_dict(kept[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is of another network: delete it. {error}") from error
    torch.set_rng_state(kept["random"])
    return kept["step"], kept["losses"], kept["total"]
