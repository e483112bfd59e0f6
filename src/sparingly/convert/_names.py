"""Recognise multi-layer perceptrons by the names of their attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparingly.convert._families import ATTENTION_WORDS, FUSED_NAMES, MLP_NAMES
from sparingly.convert._match import Match


def within(name: str, upper: str) -> bool:
    """True if a module's name is upper or lies inside it."""
    return name == upper or name.startswith(upper + ".")


def above(name: str) -> list[str]:
    """Names of the modules that hold this one, nearest first, down to ""."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


def is_attention(modules: Mapping[str, nn.Module], name: str) -> bool:
    """True for a layer inside an attention module, by the names of modules or by the classes of the two that hold it.

    A class whose name also says that it is a layer (DecoderLayerWithAttention) holds an MLP too: it does not count.
    """
    if any(word in part.lower() for part in name.split(".")[:-1] for word in ATTENTION_WORDS):
        return True
    classes = [type(modules[upper]).__name__.lower() for upper in above(name)[:2] if upper]
    return any(word in c for c in classes for word in ATTENTION_WORDS if "layer" not in c)


def named_matches(holder: str) -> list[tuple[Match, str | None]]:
    """What the names of the table would be within this module, each with the name of its activation."""
    dot = f"{holder}." if holder else ""
    rows = [
        (
            Match(dot + r.up, dot + r.down, dot + r.gate if r.gate else None, None),
            dot + r.activation if r.activation else None,
        )
        for r in MLP_NAMES
    ]
    fused = [(Match(dot + u, dot + d, dot + u, None, "gate_up"), dot + a if a else None) for u, d, a in FUSED_NAMES]
    return rows + fused


def attribute(model: nn.Module, path: str) -> Any:
    """model.a.b.c, or None where there is none that can be called."""
    value: Any = model
    for part in path.split("."):
        # Members of a ModuleList are named by their number.
        value = getattr(value, "_modules", {}).get(part) or getattr(value, part, None)
    return value if callable(value) else None
