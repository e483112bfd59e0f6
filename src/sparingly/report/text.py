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


def amount(interval: Interval, unit: str | None) -> str:
    """A quality with its interval where it has one: a share as a percentage, else as it is."""
    if unit is None:
        return percent_interval(interval)
    bounds = "" if interval.lo is None or interval.hi is None else f" [{interval.lo:.3f}, {interval.hi:.3f}]"
    return f"{interval.value:.3f}{bounds}"


def difference(interval: Interval, unit: str | None) -> str:
    """A difference of two qualities: `+1.2 points [0.8, 1.6]`, or of bits per byte `−0.031 [−0.034, −0.028]`."""
    factor, digits, name = (100, 1, " points") if unit is None else (1, 3, "")
    bounds = ", ".join(f"{factor * bound:.{digits}f}" for bound in interval.bounds)
    tail = "" if interval.lo is None else f" [{bounds}]"
    return f"{factor * interval.value:+.{digits}f}{name}{tail}".replace("-", "−")


def scaled(value: float) -> str:
    """A figure in 1..1,000 that has its own unit: two significant digits, no trailing zero."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


def seconds(time_s: float) -> str:
    """Seconds in the unit that leaves one to three digits before the point: `120 µs`."""
    for unit_s, name in _SECONDS:
        if time_s >= 0.9995 * unit_s:
            return f"{scaled(time_s / unit_s)} {name}"
    return f"{time_s:.2g} s"
