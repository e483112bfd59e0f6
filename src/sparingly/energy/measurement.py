"""Seconds, processor-seconds and joules of a block of code or of a command."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparingly.energy.meters import Meter, Reading, default_meters
from sparingly.energy.records import Record, unavailable

__all__ = ["Measurement", "measure", "measure_command"]


@dataclass
class Measurement:
    """What a block cost; filled when the block ends, its times NaN until then.

    ``wall_s``: elapsed seconds. ``cpu_s``: processor seconds (user and system, all threads) of this process, or of
    the command and the children that it waited for. ``gross``: one record per scope, measured or unavailable with
    its reason. ``net``: the measured ones less idle power, only when idle was measured; never without gross.
    """

    wall_s: float = float("nan")
    cpu_s: float = float("nan")
    gross: list[Record] = field(default_factory=list)
    net: list[Record] = field(default_factory=list)

    @property
    def joules(self) -> dict[str, float]:
        """Gross joules by scope, only what was measured: look at :attr:`missing` before adding up."""
        return {record.scope: record.value for record in self.gross if record.value is not None}

    @property
    def missing(self) -> dict[str, str]:
        """Reason by scope of what could not be measured."""
        return {record.scope: str(record.reason) for record in self.gross if record.value is None}

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form: wall_s, cpu_s, gross and net records."""
        times = {"wall_s": _or_none(self.wall_s), "cpu_s": _or_none(self.cpu_s)}
        return {**times, "gross": [r.as_dict() for r in self.gross], "net": [r.as_dict() for r in self.net]}

    def __str__(self) -> str:
        lines = [f"{self.wall_s:.3f} s elapsed, {self.cpu_s:.3f} processor-seconds"]
        for record in self.gross:
            lines.append(str(record) + (_watts(record) if record.value is not None else ""))
        lines.extend(f"{record}, {record.idle_policy}" for record in self.net)
        return "\n".join(lines)


def _watts(record: Record) -> str:
    return f", {record.value / record.window_s:.3g} W on average" if record.value and record.window_s else ""


def _or_none(seconds: float) -> float | None:
    return None if seconds != seconds else seconds


def _children_s() -> float:
    """Processor seconds of the children that were waited for, theirs included; NaN where not to be had."""
    try:
        import resource
    except ImportError:
        return float("nan")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class _Window:
    """Readings of every usable meter at both ends of a window."""

    def __init__(self, meters: Sequence[Meter]):
        self.meters = meters
        self.start: list[Reading | str] = [_read(meter) for meter in meters]
        self.started_s = time.monotonic()

    def close(self) -> list[Record]:
        window_s = time.monotonic() - self.started_s
        records: list[Record] = []
        for meter, start in zip(self.meters, self.start, strict=True):
            end = _read(meter) if isinstance(start, Reading) else start
            if isinstance(start, Reading) and isinstance(end, Reading):
                records.extend(meter.records(start, end))
            else:
                more = {"window_s": window_s, "idle_policy": "gross"}
                records.extend(unavailable(meter.source, scope, str(end), **more) for scope in meter.scopes())
        return records


def _read(meter: Meter) -> Reading | str:
    """A reading, or the reason why there is none."""
    reason = meter.unavailable()
    if reason:
        return reason
    try:
        return meter.read()
    except OSError as error:
        return f"cannot be read: {error}"


def _idle(meters: Sequence[Meter], idle_s: float) -> dict[str, Record]:
    """Idle joules by scope over ``idle_s`` seconds before the block."""
    if idle_s == 0:
        return {}
    if idle_s < 1:
        raise ValueError(f"idle_s must be 0 or at least 1 s (10 s for GPUs), got {idle_s}")
    window = _Window(meters)
    time.sleep(idle_s)
    return {record.scope: record for record in window.close() if record.value is not None}


def _net(gross: Record, idle: Record | None) -> Record | None:
    """``gross`` less idle power over its window; both errors count."""
    if gross.value is None or idle is None or idle.value is None or not idle.window_s or not gross.window_s:
        return None
    share = gross.window_s / idle.window_s
    policy = f"net of idle, {idle.value / idle.window_s:.3g} W over {idle.window_s:.0f} s before"
    lo, hi = float(gross.lo or 0) - float(idle.hi or 0) * share, float(gross.hi or 0) - float(idle.lo or 0) * share
    return replace(gross, value=gross.value - idle.value * share, lo=lo, hi=hi, idle_policy=policy)


def _finish(result: Measurement, window: _Window, idle: dict[str, Record]) -> None:
    result.gross = window.close()
    nets = (_net(record, idle.get(record.scope)) for record in result.gross)
    result.net = [record for record in nets if record is not None]


@contextlib.contextmanager
def measure(meters: Sequence[Meter] | None = None, *, idle_s: float = 0.0) -> Iterator[Measurement]:
    """Measure the block: ``with measure() as m: work()``, then ``m.wall_s, m.cpu_s, m.joules, m.missing``.

    ``meters``: default every kind that Sparingly knows. ``idle_s``: seconds to sleep first to read idle power, so
    that ``m.net`` is filled too. Counters are read at the ends only. The result is filled also when the block raises.
    Raises ValueError for an ``idle_s`` between 0 and 1.
    """
    meters = default_meters() if meters is None else meters
    result, idle = Measurement(), _idle(meters, idle_s)
    window = _Window(meters)
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        yield result
    finally:
        result.wall_s, result.cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        _finish(result, window, idle)


def measure_command(
    argv: Sequence[str], meters: Sequence[Meter] | None = None, *, idle_s: float = 0.0
) -> tuple[Measurement, int]:
    """Run a command with this process's input and output; returns (what it cost, its exit code).

    ``cpu_s`` is the command's and that of the children it waited for. The code is 127 if the command does not exist,
    126 if it may not be run (the reason goes to stderr), 128 + n if signal n ended it, as in a shell. Ctrl-C reaches
    the command; this call returns when the command does. Raises ValueError if ``argv`` is empty.
    """
    if not argv:
        raise ValueError("argv must name a command, got an empty list")
    meters = default_meters() if meters is None else meters
    result, idle = Measurement(), _idle(meters, idle_s)
    window = _Window(meters)
    children, wall = _children_s(), time.perf_counter()
    code = _run(argv)
    result.wall_s, result.cpu_s = time.perf_counter() - wall, _children_s() - children
    _finish(result, window, idle)
    return result, code


def _run(argv: Sequence[str]) -> int:
    try:
        child = subprocess.Popen(list(argv))
    except FileNotFoundError:
        print(f"command not found: {argv[0]}", file=sys.stderr)
        return 127
    except OSError as error:
        print(f"cannot run {argv[0]}: {error.strerror}", file=sys.stderr)
        return 126
    with _passing_signals_to(child):
        code = child.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _passing_signals_to(child: subprocess.Popen[Any]) -> Iterator[None]:
    """A terminal sends Ctrl-C to the command as well, so here it only must not end the wait; SIGTERM is handed on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupted(number: int, frame: Any) -> None:
        if not (sys.stdin and sys.stdin.isatty()):
            child.send_signal(number)

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, interrupted),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number)),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
