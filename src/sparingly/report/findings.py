"""What a result says in words: the headline, the comparisons at equal quality and with incumbents, and the losses."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sparingly.report import cascades, trained
from sparingly.report.result import JOBS, RULERS, Interval, Method, Workload, number
from sparingly.report.text import difference, percent, seconds, times


def headline(workload: Workload) -> str:
    """The smallest saving over every job, precision and ruler, as one sentence."""
    smallest = workload.smallest
    if smallest is None:
        return "No saving was measured."
    ruler, figure = smallest.smallest
    return f"{times(figure.value)} is the smallest saving ({smallest.name}, {RULERS[ruler]})"


def by_job(workload: Workload) -> str:
    """Each job's smallest saving over rulers, as a range over precisions where there are several."""
    parts = [(JOBS[job], _smallest_per_precision(workload, job)) for job in JOBS]
    return "; ".join(f"{label} {_range(values)}" for label, values in parts if values)


def _smallest_per_precision(workload: Workload, job: str) -> list[float]:
    return [saving.smallest[1].value for saving in workload.savings if saving.job == job]


def _range(values: list[float]) -> str:
    low, high = times(min(values)), times(max(values))
    return low if low == high else f"{low} to {high}"


def comparisons(workload: Workload) -> Iterator[tuple[str, str]]:
    """(denominator, sentence) for the two that are not the dense twin itself: equal quality, and each incumbent."""
    by_kind = {method.kind: method for method in workload.converged}
    dense, selective = by_kind.get("dense"), by_kind.get("selective")
    if dense and selective:
        text = f"20,000 classes, both trained at length: {percent(selective.quality.value)} against dense "
        text += percent(dense.quality.value)
        if dense.training_cpu_s and selective.training_cpu_s:
            ratio = dense.training_cpu_s / selective.training_cpu_s
            spent, dense_spent = seconds(selective.training_cpu_s), seconds(dense.training_cpu_s)
            text += f", for {spent} against {dense_spent} ({times(ratio)})"
        yield "equal quality", text
    yield from cascades.comparisons(workload)
    yield from trained.comparisons(workload)
    mine = workload.method("selective")
    for other in workload.methods:
        if other.kind == "incumbent" and mine is not None:
            text = f"{_gap(workload, mine, other)} {workload.metric} against {other.name}"
            if other.answer_cpu_s and mine.answer_cpu_s:
                ratio = other.answer_cpu_s / mine.answer_cpu_s
                pace = f"{times(ratio)} less" if ratio >= 1 else f"{times(1 / ratio)} more"
                text += f", {pace} processor time per answer"
            yield "incumbent", text


def growth(workload: Workload) -> str | None:
    """How both costs grow over the sweep's last tenfold (or what it has of it), or None without a sweep."""
    rows = scaling(workload)
    if len(rows) < 2:
        return None
    last = rows[-1]
    first = min(rows[:-1], key=lambda row: abs(math.log(10 * row[0] / last[0])))
    text = f"{first[0]:,} to {last[0]:,} classes: selective cost grows {times(last[2] / first[2])}"
    if first[1] and last[1]:
        text += f", dense {times(last[1] / first[1])}"
    return text


def scaling(workload: Workload) -> list[tuple[int, float | None, float]]:
    """(classes, dense_cpu_s or None, selective_cpu_s) per row of the sweep, by number of classes."""
    rows = []
    for row in workload.raw.get("scaling") or []:
        dense_s, selective_s = number(row.get("dense_cpu_s")), number(row.get("selective_cpu_s"))
        if selective_s and row.get("num_classes"):
            rows.append((int(row["num_classes"]), dense_s, selective_s))
    return sorted(rows)


def losses(workload: Workload) -> list[str]:
    """Every place where selection did not pay or the rig cannot be trusted, one sentence each; empty if none."""
    found = [
        f"{saving.name}: {RULERS[ruler]} {times(figure.value)}, not shown to be a saving"
        for saving in workload.savings
        for ruler, figure in saving.rulers.items()
        if figure.bounds[0] <= 1
    ]
    mine = workload.method("selective")
    for other in workload.methods:
        # Where differences are paired, those tell more than two intervals side by side.
        paired = trained.differences(workload)
        told = other.name in paired or (paired and other.kind == "dense")
        if mine is not None and other is not mine and not told and _worse(workload, mine.quality, other.quality):
            found.append(f"{workload.metric} {_gap(workload, mine, other)} against {other.name}")
        if mine is not None and other.kind == "incumbent" and other.answer_cpu_s and mine.answer_cpu_s:
            ratio = mine.answer_cpu_s / other.answer_cpu_s
            if ratio > 1:
                found.append(f"{times(ratio)} the processor time of {other.name} per answer")
    found += cascades.losses(workload) + trained.losses(workload)
    by_kind = {method.kind: method.quality for method in workload.converged}
    if len(by_kind) == 2 and _below(by_kind["selective"], by_kind["dense"]):
        gap = difference(Interval(by_kind["selective"].value - by_kind["dense"].value), None)
        found.append(f"{gap} against dense at 20,000 classes, both trained at length")
    if workload.null_test is not None and not null_test_holds(workload):
        found.append("the A/A null test leaves out 1: do not trust the timings of this run")
    return found


def null_test_holds(workload: Workload) -> bool:
    """Whether the A/A interval includes 1. Raises ValueError where no null test was run."""
    if workload.null_test is None:
        raise ValueError(f"workload {workload.name!r} has no null_test")
    low, high = workload.null_test.bounds
    return low <= 1 <= high


def costs(workload: Workload, job: str) -> str | None:
    """What `job` cost in processor time on each side, as a sentence, or None where the result does not say."""
    if job == "training":
        entry = workload.raw.get("training") or {}
        spent, step_s = number(entry.get("selective_cpu_s")), number(entry.get("dense_cpu_s_per_step"))
        if spent is None or step_s is None:
            return None
        return f"{seconds(spent)} trained the selective model; one dense step takes {seconds(step_s)}."
    entry = (workload.raw.get("inference") or {}).get(job) or {}
    own_s, dense_s = number(entry.get("selective_cpu_s")), number(entry.get("dense_cpu_s"))
    if own_s is None or dense_s is None:
        return None
    return f"{seconds(own_s)} an answer; the {workload.other} takes {seconds(dense_s)}."


def batching(workload: Workload) -> str | None:
    """How much of the saving a batch eats, or None where both modes were not measured."""
    smallest = {(s.job, s.precision): s.smallest[1].value for s in workload.savings}
    alone, batched = smallest.get(("batch_1", "fp32")), smallest.get(("best_batch", "fp32"))
    if alone is None or batched is None or batched >= alone:
        return None
    return f"Batching eats it: {times(alone)} one input at a time, {times(batched)} with each side at its best batch."


def quiet_jobs(workload: Workload) -> list[str]:
    """Jobs of JOBS for which the file holds no saving: said, so that nobody reads absence as a win."""
    present = {saving.job for saving in workload.savings}
    return [
        label for job, label in JOBS.items() if job not in present and not (workload.is_cascade and job == "training")
    ]


def _gap(workload: Workload, mine: Method, other: Method) -> str:
    return difference(Interval(mine.quality.value - other.quality.value), workload.unit)


def _worse(workload: Workload, mine: Interval, other: Interval) -> bool:
    """`_below`, or above where lower is better."""
    if not workload.lower_is_better:
        return _below(mine, other)
    turned = [Interval(-one.value, -one.bounds[1], -one.bounds[0]) for one in (mine, other)]
    return _below(turned[0], turned[1])


def _below(mine: Interval, other: Interval) -> bool:
    """`mine` is under `other` by more than both half-widths in quadrature explain."""
    half = [abs(interval.value - bound) for interval, bound in ((mine, mine.bounds[0]), (other, other.bounds[1]))]
    return other.value - mine.value > math.hypot(*half)
