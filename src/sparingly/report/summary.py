"""All workloads of a report on one screen, those that failed included."""

from __future__ import annotations

from textwrap import shorten

from sparingly.report import conversion, findings
from sparingly.report.conversion import Table
from sparingly.report.result import Interval, Report, Workload
from sparingly.report.text import amount, difference, times

HEADS = ("workload", "quality", "against dense or large", "batch 1", "best batch", "training", "losses")


def needed(report: Report) -> bool:
    """Whether there is more than one result to sum up, or one that is missing."""
    return len(report.workloads) != 1 or bool(report.failures)


def table(report: Report) -> Table:
    """A row for each workload: quality, how much it differs from the dense or large network, and the smallest saving
    of each job over all rulers and precisions; what failed says why."""
    rows = [_row(workload) for workload in report.workloads]
    for name, reason in report.failures.items():
        rows.append((name, f"failed: {shorten(reason, 80, placeholder='…')}", *[""] * (len(HEADS) - 2)))
    return Table(f"All {len(rows)} workloads: smallest saving over processor time, MACs and bytes", HEADS, tuple(rows))


def _row(workload: Workload) -> tuple[str, ...]:
    if conversion.is_conversion(workload):
        kept = workload.raw["contract"]
        gap = "dense" if kept.get("drop") is None else f"−{100 * kept['drop']:.1f} %"
        gap = "lossless" if kept.get("lossless") else gap
        saved = {words.split(",")[0]: min(one.value for one in rulers.values()) for words, rulers in _jobs(workload)}
        first = next(iter(saved.values()), None)
        one = saved.get("one at a time", first)
        cells = [_times(one), _times(saved.get("best batches")), "–"]
        return workload.name, str(kept.get("metric", "")), gap, *cells, str(len(conversion.losses(workload)) or "–")
    mine = workload.method("selective")
    quality = "–" if mine is None else f"{amount(Interval(mine.quality.value), workload.unit)} {workload.metric}"
    saved = {
        job: min((s.smallest[1].value for s in workload.savings if s.job == job), default=None)
        for job in ("batch_1", "best_batch", "training")
    }
    lost = len(findings.losses(workload))
    return workload.name, quality, _gap(workload), *map(_times, saved.values()), str(lost or "–")


def _jobs(workload: Workload):
    return sorted(conversion.savings(workload), key=lambda job: "fp32" not in job[0])


def _gap(workload: Workload) -> str:
    """Own quality minus that of the network it stands beside."""
    mine, other = workload.method("selective"), workload.method("dense") or workload.method("exact")
    if mine is None or other is None:
        return "–"
    return difference(Interval(mine.quality.value - other.quality.value), workload.unit)


def _times(value: float | None) -> str:
    return "–" if value is None else times(value)
