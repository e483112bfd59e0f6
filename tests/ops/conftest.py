"""Inputs, float64 answers and error measures that the operators' tests share."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparingly.ops import _threads


@pytest.fixture
def make() -> Callable[..., SimpleNamespace]:
    """Inputs of the gathers with pads in every second token; ``wide`` holds what they mean in float64."""

    def build(
        dtype: torch.dtype = torch.float32,
        tokens: int = 5,
        num_rows: int = 211,
        d: int = 67,
        k: int = 13,
        seed: int = 0,
    ) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, d, generator=generator)
        weights = torch.randn(tokens, k, generator=generator)
        real = torch.randn(num_rows, d, generator=generator)
        bias = torch.randn(num_rows, generator=generator)
        ids = torch.randint(0, num_rows, (tokens, k), generator=generator)
        ids[::2, k // 2 :: 3] = -1
        scale = None
        rows = real.to(dtype) if dtype != torch.int8 else (real * 40).round().clamp(-127, 127).to(torch.int8)
        if dtype == torch.int8:
            scale = torch.rand(num_rows, generator=generator) + 0.5
        wide = rows.double() * (1.0 if scale is None else scale.double().unsqueeze(1))
        return SimpleNamespace(
            hidden=hidden, weights=weights, rows=rows, ids=ids, scale=scale, bias=bias, wide=wide, valid=ids >= 0
        )

    return build


@pytest.fixture
def error() -> Callable[[Tensor, Tensor], float]:
    """Largest difference relative to the largest expected value; NaN or a different infinity counts as infinite."""

    def measure(got: Tensor, expected: Tensor) -> float:
        assert got.shape == expected.shape
        got, expected = got.double(), expected.double()
        finite = torch.isfinite(expected)
        if not torch.equal(got[~finite], expected[~finite]) or not torch.isfinite(got[finite]).all():
            return float("inf")
        if not finite.any():
            return 0.0
        return float((got[finite] - expected[finite]).abs().max() / expected[finite].abs().max())

    return measure


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN (or the largest integer), so that a place that nobody wrote shows."""
    empty = torch.empty

    def poison(*args: object, **options: object) -> Tensor:
        fresh = empty(*args, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return fresh.fill_(float("nan") if fresh.is_floating_point() else torch.iinfo(fresh.dtype).max)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make even small work run in two chunks."""

    monkeypatch.setattr(_threads, "MIN_CHUNK_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int], list[tuple[int, int]]]:
    """A function: make even small work of a kernel's module run on so many threads; returns the chunks begun, a list.

    It watches ``run_chunks`` and not the chunk's function: compiled code that names that one could not be compiled.
    """

    def use(module: Any, threads: int) -> list[tuple[int, int]]:
        begun: list[tuple[int, int]] = []

        def watch(function: Callable[..., object], *args: Any, **options: Any) -> None:
            def noted(start: int, stop: int, *rest: Any) -> None:
                begun.append((start, stop))
                function(start, stop, *rest)

            _threads.run_chunks(noted, *args, **options)

        monkeypatch.setattr(_threads, "MIN_CHUNK_BYTES", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(module, "run_chunks", watch)
        return begun

    return use
