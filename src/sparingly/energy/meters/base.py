"""What a meter is: reads a counter at both ends of a window and turns the difference into records."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field

from sparingly.energy.records import Record

__all__ = ["Meter", "Reading"]


@dataclass(frozen=True)
class Reading:
    """Raw counters at one end of a window, by zone name, with the monotonic time in seconds."""

    at_s: float
    counters: dict[str, int] = field(default_factory=dict)


class Meter(abc.ABC):
    """One kind of hardware counter.

    A meter never raises because a machine lacks its counter: :meth:`unavailable` says why, and its records do.
    """

    source: str
    """Short name, such as ``"rapl"``."""
    min_window_s: float
    """Windows shorter than this are refused."""

    @abc.abstractmethod
    def unavailable(self) -> str | None:
        """Why nothing can be measured here, or None."""

    @abc.abstractmethod
    def read(self) -> Reading:
        """The counters now; outstanding device work is finished first. Raises OSError if unavailable."""

    @abc.abstractmethod
    def records(self, start: Reading, end: Reading) -> list[Record]:
        """Gross joules between two readings, one record per scope: measured, or unavailable with a reason."""

    @abc.abstractmethod
    def scopes(self) -> list[str]:
        """What its records would be about, such as ``"cpu packages + dram"``; never empty."""
