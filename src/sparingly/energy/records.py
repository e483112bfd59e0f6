"""One energy figure with everything that a reader needs to judge it: class, interval, source, scope, reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["Record", "ResultClass", "unavailable"]

ResultClass = Literal["measured", "modelled", "estimated", "unavailable"]
_PROVENANCE = ("source", "scope", "window_s", "n", "idle_policy", "coverage", "table_version", "reason")
_CLASSES = ("measured", "modelled", "estimated", "unavailable")


@dataclass(frozen=True)
class Record:
    """One figure of one class. Classes are never mixed: adding two classes raises.

    ``value``, ``lo``, ``hi`` in ``unit`` (joules unless said otherwise), all None when unavailable, never 0.
    ``kind`` is the class (``"class"`` in JSON). ``window_s``: seconds that the figure spans, ``n``: how many
    items or windows it is over, ``idle_policy``: ``"gross"`` or what was subtracted, ``coverage``: share of the
    work that the ledger knew, ``table_version``: which price table. Raises ValueError if the parts disagree.
    """

    value: float | None
    lo: float | None
    hi: float | None
    kind: ResultClass
    source: str
    scope: str
    unit: str = "J"
    window_s: float | None = None
    n: int | None = None
    idle_policy: str | None = None
    coverage: float | None = None
    table_version: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in _CLASSES:
            raise ValueError(f"class must be one of {_CLASSES}, got {self.kind!r}")
        figures = (self.value, self.lo, self.hi)
        if self.kind == "unavailable":
            if figures != (None, None, None) or not self.reason:
                raise ValueError(f"an unavailable record has no figures and gives its reason, got {figures}")
        elif self.value is None or self.lo is None or self.hi is None:
            raise ValueError(f"a {self.kind} record needs value, lo and hi, got {figures}; use unavailable(...)")
        elif not (math.isfinite(self.value) and self.lo <= self.value <= self.hi):
            raise ValueError(f"a record needs a finite value with lo <= value <= hi, got {figures}")

    def __add__(self, other: Record) -> Record:
        """Sum of different scopes over one window, or of one scope over windows that follow each other.

        Bounds are added, as the errors of one class share their causes. Raises TypeError across classes,
        ValueError across units, idle policies or price tables.
        """
        if not isinstance(other, Record):
            return NotImplemented
        if self.kind != other.kind:
            raise TypeError(f"a {self.kind} and a {other.kind} record are never added; report both")
        for name in ("unit", "idle_policy", "table_version"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"records differ in {name}: {mine!r} and {theirs!r}")
        in_turn = self.scope == other.scope
        return replace(
            self,
            value=_sum(self.value, other.value),
            lo=_sum(self.lo, other.lo),
            hi=_sum(self.hi, other.hi),
            source=_join(self.source, other.source),
            scope=_join(self.scope, other.scope),
            window_s=_sum(self.window_s, other.window_s) if in_turn else _largest(self.window_s, other.window_s),
            n=_sum(self.n, other.n) if in_turn else _largest(self.n, other.n),
            coverage=None if self.coverage is None or other.coverage is None else min(self.coverage, other.coverage),
            reason=_join(self.reason or "", other.reason or "") or None,
        )

    def times(self, factor: float, unit: str | None = None, scope: str | None = None) -> Record:
        """This figure scaled by a known positive factor: joules per item, gCO2e, money. Same class, same source.

        Raises ValueError if ``factor`` is not finite and >= 0.
        """
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"factor must be finite and >= 0, got {factor}")
        scaled = [None if figure is None else figure * factor for figure in (self.value, self.lo, self.hi)]
        new = {"value": scaled[0], "lo": scaled[1], "hi": scaled[2], "unit": unit or self.unit}
        return replace(self, **new, scope=scope or self.scope)

    def per(self, items: int, what: str) -> Record:
        """This figure per item, such as ``record.per(1000, "query")``. Raises ValueError unless items >= 1."""
        if items < 1:
            raise ValueError(f"items must be at least 1, got {items}")
        return replace(self.times(1 / items, unit=f"{self.unit}/{what}"), n=items)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form with the keys of ENERGY.md (``kind`` as ``class``) and the unit."""
        figures = {"value": self.value, "lo": self.lo, "hi": self.hi, "class": self.kind, "unit": self.unit}
        return {**figures, **{name: getattr(self, name) for name in _PROVENANCE}}

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.scope}: unavailable ({self.reason})"
        return f"{self.scope}: {self.value:.4g} {self.unit} [{self.lo:.4g}, {self.hi:.4g}] {self.kind}, {self.source}"


def unavailable(source: str, scope: str, reason: str, **more: Any) -> Record:
    """A record that says why there is no figure."""
    return Record(None, None, None, "unavailable", source, scope, reason=reason, **more)


def _sum(a: Any, b: Any) -> Any:
    return None if a is None or b is None else a + b


def _largest(a: Any, b: Any) -> Any:
    return None if a is None or b is None else max(a, b)


def _join(a: str, b: str) -> str:
    return a if a == b or not b else b if not a else f"{a} + {b}"
