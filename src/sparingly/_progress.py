"""How long work tells what it is doing."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str, float | None], None]
"""Told what is being done, and the share done."""


def silent(what: str, share: float | None) -> None:
    """Tell nobody."""
