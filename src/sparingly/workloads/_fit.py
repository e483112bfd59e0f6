"""Training a network of a benchmark: a cosine schedule, and a file from which it goes on after an interruption."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparingly.optim import optimizer

SAVE_EVERY_S, TELL_EVERY_S = 30.0, 0.5


@dataclass(frozen=True)
class Recipe:
    """``steps`` of AdamW, or with ``momentum`` of SGD (Nesterov's): ``lr`` rises over ``warmup`` of them (a tenth at
    most) and then falls along a cosine."""

    steps: int
    lr: float
    weight_decay: float = 0.1
    warmup: int = 200
    momentum: float | None = None


@dataclass(frozen=True)
class Fitted:
    """Processor-seconds of training, those of making batches included, and the mean loss of the last twentieth."""

    cpu_s: float
    loss: float


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    recipe: Recipe,
    *,
    tick: Callable[[float], None] = lambda part: None,
    file: Path | None = None,
    groups: list[dict[str, Any]] | None = None,
) -> Fitted:
    """Train ``model`` in place and leave it in evaluation mode.

    ``loss(model, step)``: a scalar for step 0, 1, ...; it must depend on nothing but its arguments and PyTorch's
    random numbers. ``tick`` hears the share that is done. ``file`` is written every 30 seconds and at the end: a call
    with the same file goes on from there, to the same numbers, and returns at once where training is complete.
    ``groups``: of parameters, instead of all of them in one; the "scale" of a group multiplies its rate.
    """
    optim: torch.optim.Optimizer = optimizer(
        model if groups is None else groups, lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    if recipe.momentum is not None:
        options: Any = {"momentum": recipe.momentum, "nesterov": True, "weight_decay": recipe.weight_decay}
        optim = torch.optim.SGD(model.parameters(), lr=recipe.lr, **options)
    first, spent, recent = 0, 0.0, 0.0
    if file is not None and file.is_file():
        kept: dict[str, Any] = torch.load(file, weights_only=True)
        model.load_state_dict(kept["model"])
        first, spent, recent = kept["step"], kept["cpu_s"], kept["loss"]
        if first < recipe.steps:
            optim.load_state_dict(kept["optimizer"])
            torch.set_rng_state(kept["random"])
    model.train()
    last = max(1, recipe.steps // 20)
    start, saved, told = time.process_time(), time.monotonic(), 0.0

    def keep(step: int) -> None:
        assert file is not None
        state: dict[str, Any] = {"model": model.state_dict(), "step": step, "loss": recent, "cpu_s": spent}
        if step < recipe.steps:
            state |= {"optimizer": optim.state_dict(), "random": torch.get_rng_state()}
        fresh = file.with_suffix(".tmp")
        torch.save(state, fresh)
        os.replace(fresh, file)

    for step in range(first, recipe.steps):
        for group in optim.param_groups:
            group["lr"] = recipe.lr * group.get("scale", 1.0) * _share(step, recipe)
        optim.zero_grad()
        value = loss(model, step)
        value.backward()
        optim.step()
        if step >= recipe.steps - last:
            recent += float(value.detach()) / last
        now = time.monotonic()
        if now - told > TELL_EVERY_S:
            tick(step / recipe.steps)
            told = now
        if file is not None and now - saved > SAVE_EVERY_S:
            spent, start = spent + time.process_time() - start, time.process_time()
            keep(step + 1)
            start, saved = time.process_time(), time.monotonic()
    if first < recipe.steps:
        spent += time.process_time() - start
        if file is not None:
            keep(recipe.steps)
    model.eval()
    return Fitted(spent, recent)


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself; training in it then takes a third to half of the time."""
    known: Any = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(known is not None and known())


def _share(step: int, recipe: Recipe) -> float:
    rise = min(1.0, (step + 1) / max(1, min(recipe.warmup, recipe.steps // 10)))
    return rise * max(1e-3, 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
