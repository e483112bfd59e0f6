"""The page's figures: each takes a Workload and gives a <figure>, or "" where the result lacks what it would draw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from sparingly.report import charts, findings, trained
from sparingly.report.provenance import joules
from sparingly.report.result import Workload, number
from sparingly.report.text import percent, seconds, times


def quality_against_time(workload: Workload) -> str:
    """P@1 (or whatever the metric) against processor time per answer, one input at a time."""
    methods = [method for method in workload.methods if method.answer_cpu_s]
    marks = {
        method.kind if method.kind in ("selective", "exact") else method.name: charts.Mark(
            method.name, method.kind, method.answer_cpu_s or 0.0, method.quality.value, method.quality.bounds
        )
        for method in methods
    }
    if len(marks) < 2:
        return ""
    link, words = None, percent if workload.unit is None else _plain
    mine, exact = marks.get("selective"), marks.get("exact")
    if mine and exact:
        link = (mine, exact, f"{times(exact.x / mine.x)} less time")
    svg = charts.scatter(
        list(marks.values()),
        title=f"{workload.metric} against processor time per answer",
        description="; ".join(f"{m.label}: {words(m.y)} at {seconds(m.x)}" for m in marks.values()),
        x_label="processor time per answer, one input at a time",
        y_label=workload.metric,
        x_words=seconds,
        y_words=_share if workload.unit is None else words,
        link=link,
    )
    better = "Down" if workload.lower_is_better else "Up"
    return _figure("Quality against cost", f"{better} is better, left is cheaper.", svg)


def quality_against_energy(workload: Workload) -> str:
    """The same against joules per answer, with each figure's own range; drawn where the result has joules."""
    marks = [
        charts.Mark(m.name, m.kind, energy.value, m.quality.value, m.quality.bounds, energy.bounds)
        for m in workload.methods
        if (energy := m.answer_energy_j) is not None and energy.bounds[0] > 0
    ]
    if len(marks) < 2:
        return ""
    svg = charts.scatter(
        marks,
        title=f"{workload.metric} against energy per answer",
        description="; ".join(f"{m.label}: {percent(m.y)} at {joules(m.x)}" for m in marks),
        x_label="energy per answer, with its range",
        y_label=workload.metric,
        x_words=joules,
        y_words=_share,
    )
    return _figure("Quality against energy", "Whiskers are the range of each figure; its class is in the table.", svg)


def training_curve(workload: Workload) -> str:
    """Quality against processor-seconds of training, selective and dense."""
    series = []
    for kind, label in (("dense", "dense twin"), ("selective", "selective")):
        points = [
            (cpu_s, quality)
            for row in workload.raw.get("curve") or []
            if row.get("which") == kind
            and (cpu_s := number(row.get("cpu_s")))
            and (quality := number(row.get("quality"))) is not None
        ]
        if points:
            series.append(charts.Series(label, kind, sorted(points)))
    if not series:
        return ""
    svg = charts.lines(
        series,
        title=f"{workload.metric} during training",
        description="; ".join(
            f"{s.label}: {percent(s.points[-1][1])} after {seconds(s.points[-1][0])}" for s in series
        ),
        x_label="processor time spent on training",
        y_label=workload.metric,
        x_words=seconds,
        y_words=_share,
        y_log=False,
    )
    return _figure("What training buys", "Both start from nothing and learn from the same stream.", svg)


def cost_against_classes(workload: Workload) -> str:
    """Processor time per answer against the number of classes, dense and selective, log-log."""
    rows = findings.scaling(workload)
    if len(rows) < 2:
        return ""
    dense = [(float(classes), dense_s) for classes, dense_s, _ in rows if dense_s]
    series = [charts.Series("selective", "selective", [(float(classes), own_s) for classes, _, own_s in rows])]
    series += [charts.Series("dense", "dense", dense)] if dense else []
    svg = charts.lines(
        series,
        title="Processor time per answer against the number of classes",
        description=findings.growth(workload) or "",
        x_label="number of classes",
        y_label="processor time per answer",
        x_words=_count,
        y_words=seconds,
        y_log=True,
    )
    return _figure("Cost against size", findings.growth(workload) or "", svg)


def equal_quality(workload: Workload) -> str:
    """Quality against the processor time of training, both sides trained at length on fewer classes."""
    marks = [
        charts.Mark(m.name, m.kind, m.training_cpu_s, m.quality.value, m.quality.bounds)
        for m in workload.converged
        if m.training_cpu_s
    ]
    if len(marks) < 2:
        return ""
    svg = charts.scatter(
        marks,
        title=f"{workload.metric} against training time at 20,000 classes, both trained at length",
        description="; ".join(f"{m.label}: {percent(m.y)} after {seconds(m.x)}" for m in marks),
        x_label="processor time spent on training",
        y_label=workload.metric,
        x_words=seconds,
        y_words=_share,
    )
    return _figure("Both trained at length", "At 20,000 classes, where dense can be. The upright axis is cut.", svg)


def noise(workload: Workload) -> list[str]:
    """Accuracy against the strength of each kind of noise, one chart each."""
    return [_noise(name, rows) for name, rows in trained.noise(workload).items()]


def _noise(name: str, rows: list[Mapping[str, Any]]) -> str:
    series = [
        charts.Series(label, kind, [(row["strength"], row[key]["value"]) for row in rows])
        for key, label, kind in trained.sides(rows[0])
    ]
    ends = ", ".join(f"{one.label} {percent(one.points[-1][1])}" for one in series)
    svg = charts.lines(
        series,
        title=f"Accuracy under {name}",
        description=f"at the greatest strength: {ends}",
        x_label=trained.NOISE.get(name, "strength"),
        y_label="accuracy",
        x_words=lambda value: f"{value:.2g}",
        y_words=_share,
        x_log=False,
        y_log=False,
    )
    what = "wrong labels" if name == "labels" else "noisy pictures"
    return _figure(name.capitalize(), f"The same {what} for every network.", svg)


CHARTS = (quality_against_time, quality_against_energy, cost_against_classes, training_curve, equal_quality)


def field(example: Mapping[str, Any], workload: Workload) -> str:
    """The field of every class with those that `example` scored lit, or "" without ids."""
    ids, total = example.get("ids_scored") or [], workload.num_classes
    if not ids or not total:
        return ""
    title = f"Classes scored for {example.get('typed')}"
    return charts.units(ids, total, title=title, description=field_words(example, workload))


def field_words(example: Mapping[str, Any], workload: Workload) -> str:
    """What one example ran: `1,888 of 288,992 classes scored (0.65 %), 121 µs of processor time`."""
    scored, total, cpu_s = example.get("classes_scored"), workload.num_classes, number(example.get("cpu_s"))
    parts = []
    if scored is not None and total:
        share = 100 * scored / total
        parts.append(f"{scored:,} of {total:,} classes scored ({share:.2g} %)")
    drawn = len(example.get("ids_scored") or [])
    if scored is not None and 0 < drawn < scored:
        parts.append(f"{drawn:,} of them drawn")
    if cpu_s is not None:
        parts.append(f"{seconds(cpu_s)} of processor time")
    return ", ".join(parts)


def _figure(title: str, caption: str, svg: str) -> str:
    return f'<figure class="card"><h3>{escape(title)}</h3><figcaption>{escape(caption)}</figcaption>{svg}</figure>'


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _plain(value: float) -> str:
    return f"{value:.2f}"


def _count(value: float) -> str:
    exponent = round(math.log10(value))
    if abs(value - 10.0**exponent) < 1e-6 * value:
        return {3: "1k", 4: "10k", 5: "100k", 6: "1M", 7: "10M", 8: "100M"}.get(exponent, f"{value:,.0f}")
    return f"{value:,.0f}"
