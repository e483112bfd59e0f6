"""Where figures come from: the machine line, the versions line, and the energy records in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparingly.report.result import Interval, Report, Workload
from sparingly.report.text import scaled

_CLASSES = ("measured", "modelled", "estimated", "unavailable")
_JOULES = ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"), (1e-9, "nJ"))


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine of a result file in one line; keys as `energy.machine_info` writes them."""
    parts = [str(machine["cpu"])] if machine.get("cpu") else []
    for key, one, many in (("cores", "core", "cores"), ("threads", "thread", "threads")):
        if machine.get(key):
            parts.append(f"{machine[key]} {one if machine[key] == 1 else many}")
    if machine.get("memory_bytes"):
        parts.append(f"{machine['memory_bytes'] / 2**30:.0f} GiB")
    parts += [str(gpu.get("name", gpu) if isinstance(gpu, Mapping) else gpu) for gpu in machine.get("gpus") or []]
    parts += [str(machine["os"])] if machine.get("os") else []
    parts += [f"Python {machine['python']}"] if machine.get("python") else []
    return ", ".join(parts) or "machine not recorded"


def versions_line(report: Report) -> str:
    """Versions and commit of a result file in one line."""
    parts = [f"{name} {version}" for name, version in report.versions.items() if version]
    commit = report.raw.get("commit")
    return ", ".join([*parts, *([f"commit {str(commit)[:12]}"] if commit else [])]) or "versions not recorded"


def energy_rows(workload: Workload) -> list[Mapping[str, Any]]:
    """The energy records, measured first, unavailable last; never summed."""
    known = {name: rank for rank, name in enumerate(_CLASSES)}
    return sorted(workload.raw.get("energy") or [], key=lambda record: known.get(str(record.get("class")), len(known)))


def energy_value(record: Mapping[str, Any]) -> str:
    """A record's value with its range, or the reason why there is none."""
    value = Interval.of(record)
    if value is None:
        return str(record.get("reason") or "no reason given")
    low, high = value.bounds
    return f"{joules(value.value)} [{joules(low)}, {joules(high)}]"


def energy_lines(workload: Workload) -> list[str]:
    """One line per energy record: class, scope, value or reason, source."""
    return [
        f"{record.get('class')}: {record.get('scope')}: {energy_value(record)} ({record.get('source')})"
        for record in energy_rows(workload)
    ]


def joules(energy_j: float) -> str:
    """Joules in the unit that leaves one to three digits before the point: `19 µJ`."""
    for unit_j, name in _JOULES:
        if abs(energy_j) >= 0.9995 * unit_j:
            return f"{scaled(energy_j / unit_j)} {name}"
    return f"{energy_j:.2g} J"
