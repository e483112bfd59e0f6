"""Figures as words: savings, shares, seconds, intervals. One place, so that every view prints a number alike."""

from __future__ import annotations

from sparingly.report.result import Interval

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def figure(value: float) -> str:
    """Two significant digits under 10, three under 1,000, none lost above: 0.83, 2.1, 31, 212, 4,120."""
    size = abs(value)
    if size >= 9.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 1.05 else f"{value:.2f}"


def times(value: float) -> str:
    """A ratio: `212×`."""
    return f"{figure(value)}×"


def times_interval(interval: Interval) -> str:
    """A ratio with its interval where it has one: `212× [198, 230]`."""
    if interval.lo is None or interval.hi is None:
        return times(interval.value)
    return f"{times(interval.value)} [{figure(interval.lo)}, {figure(interval.hi)}]"


def percent(share: float) -> str:
    """A share in 0..1: `78.4 %`."""
    return f"{100 * share:.1f} %"


def percent_interval(interval: Interval) -> str:
    """A share with its interval where it has one: `78.4 % [78.0, 78.8]`."""
    if interval.lo is None or interval.hi is None:
        return percent(interval.value)
    return f"{percent(interval.value)} [{100 * interval.lo:.1f}, {100 * interval.hi:.1f}]"


def scaled(value: float) -> str:
    """A figure in 1..1,000 that has its own unit: two significant digits, no trailing zero."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


def seconds(time_s: float) -> str:
    """Seconds in the unit that leaves one to three digits before the point: `120 µs`."""
    for unit_s, name in _SECONDS:
        if time_s >= 0.9995 * unit_s:
            return f"{scaled(time_s / unit_s)} {name}"
    return f"{time_s:.2g} s"
