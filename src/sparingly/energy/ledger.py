"""The ledger: what really ran, per operation and dtype, in MACs and bytes.

``with count() as ledger`` counts PyTorch's own operations through a dispatch mode (``torch_ops.py``);
Sparingly's kernels call :func:`record` with what they did for the selection that they were given.
Bytes are those that an operation asks of memory (each operand once per operation), whatever cache answers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Entry", "Ledger", "active", "count", "record"]

MIN_COVERAGE = 0.95
"""Under this share of known work no modelled energy is given (ENERGY.md)."""


@dataclass(slots=True)
class Entry:
    """Sums for one operation and dtype: MACs, other operations (counts), bytes read and written, calls."""

    macs: int = 0
    other: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    calls: int = 0

    @property
    def bytes(self) -> int:
        """Bytes read plus bytes written."""
        return self.bytes_read + self.bytes_written

    def __add__(self, more: Entry) -> Entry:
        return Entry(
            self.macs + more.macs,
            self.other + more.other,
            self.bytes_read + more.bytes_read,
            self.bytes_written + more.bytes_written,
            self.calls + more.calls,
        )


@dataclass
class Ledger:
    """Counts of one :func:`count` block.

    ``entries`` maps ``(op, dtype)``, such as ``("aten::mm", "float32")``, to an :class:`Entry`;
    ``unknown`` holds operations without a counting rule: their bytes are those of all their operands,
    their MACs are missing. Both may be read while counting goes on.
    """

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    unknown: dict[tuple[str, str], Entry] = field(default_factory=dict)
    # CUDA backward passes run in the autograd engine's own threads.
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, op: str, dtype: str, entry: Entry, *, known: bool = True) -> None:
        """Add ``entry`` under ``(op, dtype)``; ``known=False`` lowers :attr:`coverage` instead."""
        book = self.entries if known else self.unknown
        with self._lock:
            before = book.get((op, dtype))
            book[op, dtype] = entry if before is None else before + entry

    @property
    def total(self) -> Entry:
        """The sum over every known operation."""
        return sum(list(self.entries.values()), Entry())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of known operations."""
        return self.total.macs

    @property
    def other(self) -> int:
        """Operations of known operations that are not MACs (adds, compares, exponentials …, each as one)."""
        return self.total.other

    @property
    def bytes_read(self) -> int:
        """Bytes read by known operations."""
        return self.total.bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes written by known operations."""
        return self.total.bytes_written

    @property
    def bytes(self) -> int:
        """Bytes read and written by known operations."""
        return self.total.bytes

    @property
    def coverage(self) -> float:
        """Known share in 0..1: the smaller of the share of calls and the share of bytes; NaN when empty.

        Bytes alone would overlook an unknown operation that computes much on little data, calls alone
        one large unknown operation among many small known ones. Views are free and no calls. Work
        outside PyTorch that nobody recorded (NumPy, ONNX Runtime) is not seen and not in this figure.
        """
        known, unknown = self.total, sum(list(self.unknown.values()), Entry())
        calls, size = known.calls + unknown.calls, known.bytes + unknown.bytes
        if not calls:
            return float("nan")
        return min(known.calls / calls, known.bytes / size if size else 1.0)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form: ``total``, ``coverage`` (None when empty), ``ops`` and ``unknown`` as lists of rows."""

        def rows(book: dict[tuple[str, str], Entry]) -> list[dict[str, Any]]:
            ordered = sorted(book.items(), key=lambda item: -item[1].bytes)
            return [{"op": op, "dtype": dtype, **_fields(entry)} for (op, dtype), entry in ordered]

        coverage = self.coverage
        return {
            "total": _fields(self.total),
            "coverage": None if coverage != coverage else coverage,
            "ops": rows(self.entries),
            "unknown": rows(self.unknown),
        }

    def __str__(self) -> str:
        total = self.total
        head = f"Ledger: {total.macs:,} MACs, {total.other:,} other operations, {total.bytes:,} bytes"
        lines = [f"{head}, coverage {self.coverage:.1%}"]
        for row in self.as_dict()["ops"][:12]:
            size = row["bytes_read"] + row["bytes_written"]
            lines.append(f"  {row['op']} {row['dtype']}: {row['macs']:,} MACs, {size:,} bytes, {row['calls']:,} calls")
        lines.extend(f"  unknown: {op} {dtype}, {entry.calls:,} calls" for (op, dtype), entry in self.unknown.items())
        return "\n".join(lines)


def _fields(entry: Entry) -> dict[str, int]:
    return {name: getattr(entry, name) for name in ("macs", "other", "bytes_read", "bytes_written", "calls")}


_stack: ContextVar[tuple[Ledger, ...]] = ContextVar("sparingly_ledgers", default=())


def active() -> bool:
    """True while a ledger counts in this thread; lets a kernel skip working out its count."""
    return bool(_stack.get())


def record(
    op: str,
    *,
    dtype: torch.dtype | str,
    macs: int = 0,
    other: int = 0,
    bytes_read: int = 0,
    bytes_written: int = 0,
) -> None:
    """Add one call of ``op`` to every ledger that counts in this thread; returns at once when there is none.

    Record from the calling thread: pool threads that run parts of a kernel have no ledger.

    Raises ValueError if a count is negative.
    """
    ledgers = _stack.get()
    if not ledgers:
        return
    if min(macs, other, bytes_read, bytes_written) < 0:
        raise ValueError(f"counts of {op} must not be negative, got {(macs, other, bytes_read, bytes_written)}")
    entry = Entry(int(macs), int(other), int(bytes_read), int(bytes_written), 1)
    name = str(dtype).removeprefix("torch.")
    for ledger in ledgers:
        ledger.add(op, name, entry)


@contextlib.contextmanager
def recording_into(ledgers: tuple[Ledger, ...]) -> Iterator[None]:
    """Make ``ledgers`` the ones that :func:`record` writes to, in this thread, for the block."""
    token = _stack.set(ledgers)
    try:
        yield
    finally:
        _stack.reset(token)


@contextlib.contextmanager
def count() -> Iterator[Ledger]:
    """Count what runs inside the block: ``with count() as ledger: model(x)``.

    Blocks nest (an outer ledger includes the inner ones) and are separate per thread. A backward pass is
    counted in the block that calls it: for CPU graphs the engine runs in the calling thread, for CUDA graphs
    the dispatch mode follows into the engine's threads. Counting slows every operation by some tens of
    microseconds: time in another run than the one that is counted.
    """
    from sparingly.energy.torch_ops import CountingMode

    ledger = Ledger()
    ledgers = (*_stack.get(), ledger)
    with recording_into(ledgers), CountingMode(ledger, ledgers):
        yield ledger
