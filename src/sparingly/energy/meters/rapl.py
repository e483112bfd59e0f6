"""Processor and memory energy through Linux powercap (RAPL; Intel, and AMD since Zen).

Sums ``package-*`` zones and ``dram``, leaves out ``psys`` and ``mmio`` (the same joules again), drops dies that
mirror another die's counter, corrects for wrap-around. The figure is the whole socket's, other processes included.
Readable by root only since CVE-2020-8694 (Lipp et al., "PLATYPUS", IEEE S&P 2021).
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from sparingly.energy.meters.base import Meter, Reading
from sparingly.energy.records import Record, unavailable

__all__ = ["Rapl"]

_UJ = 1e-6
_MAX_POWER_W = 1000.0
"""Upper limit on one zone's draw where the machine states none; only used to refuse ambiguous windows."""
_MIRROR_UJ = 2_000_000
"""Two counters of one package this close at both ends are one counter: 2 J is 10 ms at 200 W, and independent
counters run over a range of 65 to 262 kJ."""


@dataclass(frozen=True)
class Zone:
    """One powercap folder: its key (folder name), ``name`` file, package and range in microjoules."""

    key: str
    name: str
    package: str
    path: Path
    range_uj: int
    max_power_w: float


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _max_power_w(folder: Path) -> float:
    """Twice the largest limit that the zone states (turbo exceeds the rating for seconds)."""
    found = (_text(path) for path in folder.glob("constraint_*_max_power_uw"))
    limits = [int(value) * _UJ for value in found if value and value.isdigit() and int(value)]
    return 2 * max(limits) if limits else _MAX_POWER_W


class Rapl(Meter):
    """Joules of all packages and their memory. ``root`` and ``cpuinfo`` are files of the running system by default."""

    source = "rapl"
    min_window_s = 1.0

    def __init__(self, root: Path | str = "/sys/class/powercap", cpuinfo: Path | str = "/proc/cpuinfo"):
        self.root = Path(root)
        self.cpuinfo = Path(cpuinfo)

    def scopes(self) -> list[str]:
        """``["cpu packages + dram"]``, ``["cpu packages"]`` where memory has no counter."""
        has_dram = any(zone.name == "dram" for zone in self.zones())
        return ["cpu packages + dram" if has_dram or not self.zones() else "cpu packages"]

    def zones(self) -> list[Zone]:
        """The zones that are summed, before mirrored ones are dropped."""
        folders = {}
        for path in sorted(self.root.glob("*:*")) if self.root.is_dir() else ():
            if "mmio" not in path.name:
                folders[path.name] = path
        names = {key: _text(path / "name") or "" for key, path in folders.items()}
        zones = []
        for key, path in folders.items():
            name, parent = names[key], key.rpartition(":")[0]
            holder = name if name.startswith("package") else names.get(parent, "")
            if not holder.startswith("package") or not (name.startswith("package") or name == "dram"):
                continue
            package = re.match(r"package-\d+", holder)
            limit = int(_text(path / "max_energy_range_uj") or 0)
            zones.append(Zone(key, name, package[0] if package else holder, path, limit, _max_power_w(path)))
        return zones

    def unavailable(self) -> str | None:
        """Why there is no figure: no powercap, no package zone, or no permission."""
        if not self.root.is_dir():
            return f"no powercap at {self.root} (a virtual machine, a container, or not Linux)"
        zones = self.zones()
        if not any(zone.name.startswith("package") for zone in zones):
            return f"no package zone under {self.root} (counters not passed through, or the driver is not loaded)"
        try:
            for zone in zones:
                (zone.path / "energy_uj").read_text()
        except PermissionError as error:
            return f"RAPL needs root since CVE-2020-8694: permission denied on {error.filename}"
        except OSError as error:
            return f"cannot read {error.filename}: {error.strerror}"
        return None

    def read(self) -> Reading:
        """Microjoules per zone key."""
        at_s = time.monotonic()
        return Reading(at_s, {zone.key: int((zone.path / "energy_uj").read_text()) for zone in self.zones()})

    def _relative_error(self) -> float:
        return 0.15 if "AuthenticAMD" in (_text(self.cpuinfo) or "") else 0.05

    def records(self, start: Reading, end: Reading) -> list[Record]:
        """One record: all packages and their memory."""
        window_s = end.at_s - start.at_s
        scope = self.scopes()[0]
        more = {"window_s": window_s, "idle_policy": "gross"}
        if window_s < self.min_window_s:
            reason = f"window of {window_s:.3g} s is under {self.min_window_s:g} s"
            return [unavailable(self.source, scope, reason, **more)]
        if start.counters.keys() != end.counters.keys():
            return [unavailable(self.source, scope, "zones came or went during the window", **more)]
        total_uj = 0
        for zone in self._distinct(start, end):
            spent, reason = _difference(zone, start.counters[zone.key], end.counters[zone.key], window_s)
            if reason:
                return [unavailable(self.source, scope, reason, **more)]
            total_uj += spent
        value, error = total_uj * _UJ, self._relative_error()
        return [Record(value, value * (1 - error), value * (1 + error), "measured", self.source, scope, n=1, **more)]

    def _distinct(self, start: Reading, end: Reading) -> list[Zone]:
        """Zones of the readings without those that mirror another one of the same package and kind."""
        kept: list[Zone] = []
        for zone in self.zones():
            if zone.key in start.counters and not any(_mirrors(zone, other, start, end) for other in kept):
                kept.append(zone)
        return kept


def _mirrors(zone: Zone, other: Zone, start: Reading, end: Reading) -> bool:
    same_kind = zone.package == other.package and (zone.name == "dram") == (other.name == "dram")
    near = all(abs(ends.counters[zone.key] - ends.counters[other.key]) <= _MIRROR_UJ for ends in (start, end))
    return same_kind and near


def _difference(zone: Zone, first: int, last: int, window_s: float) -> tuple[int, str | None]:
    """Microjoules between two counts, and the reason if that cannot be told."""
    spent = last - first
    if spent < 0:
        if not zone.range_uj:
            return 0, f"{zone.key} went backwards and states no range"
        spent += zone.range_uj
    if spent < 0:
        return 0, f"{zone.key} went backwards by more than its range"
    if zone.range_uj and window_s * zone.max_power_w >= (spent + zone.range_uj) * _UJ:
        longest = zone.range_uj * _UJ / zone.max_power_w
        reason = f"{zone.key} could have wrapped once more in {window_s:.0f} s; measure windows under {longest:.0f} s"
        return 0, reason
    return spent, None
