"""What a network that was trained selectively says: other denominators, noise, what others reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparingly.report.conversion import Table
from sparingly.report.result import Interval, Workload
from sparingly.report.text import amount, difference, percent_interval, seconds, times, times_interval

NOISE = {
    "gaussian": "standard deviation, share of the range",
    "impulse": "share of pixels that turn black or white",
    "occlusion": "side of a black square, pixels",
    "labels": "share of wrong labels in training",
}
"""Kinds of noise and what their strength is."""

JOBS = {"batch_1": "one at a time", "best_batch": "best batches"}


def comparisons(workload: Workload) -> Iterator[tuple[str, str]]:
    """(denominator, sentence): dense networks of equal training time, equal running cost and equal quality."""
    spent = workload.raw.get("equal_training") or {}
    gap = Interval.of(spent.get("difference"))
    if gap is not None:
        yield "equal training", f"{difference(gap, workload.unit)} against {spent.get('dense')}, the best dense one"
    equal = workload.raw.get("equal_cost") or {}
    gap = Interval.of(equal.get("difference"))
    if gap is not None:
        yield "equal cost", f"{difference(gap, workload.unit)} against {equal.get('dense')}{_paid(equal)}"
    found = workload.raw.get("equal_quality") or {}
    kind, own = ("single network", "the cascade") if workload.is_cascade else ("dense network", "the selective one")
    if found.get("dense"):
        yield "equal quality", f"{found['dense']} is the cheapest {kind} as good as {own}{_paid(found)}"
    elif found.get("sweep"):
        yield "equal quality", f"none of {len(found['sweep'])} {kind}s is as good as {own}"
    yield from _as_good(workload)


def _as_good(workload: Workload) -> Iterator[tuple[str, str]]:
    """What the best dense network's quality costs where the other side is made as small as it may."""
    found = workload.raw.get("as_good") or {}
    ratio = Interval.of((found.get("saving") or {}).get("cpu_s"))
    if ratio is not None:
        gap = Interval.of(found.get("difference"))
        better = "" if gap is None else f", {difference(gap, workload.unit)} {workload.metric}"
        yield "as good", f"{found.get('selective')} for {found.get('dense')}: {times_interval(ratio)} cheaper{better}"


def _paid(entry: Mapping[str, Any]) -> str:
    """What that dense network costs: `; it costs 0.71× one at a time, 0.32× best batches`."""
    found = {words: Interval.of(ratio) for words, ratio in zip(JOBS.values(), _ratios(entry), strict=True)}
    parts = [f"{times(interval.value)} {words}" for words, interval in found.items() if interval is not None]
    return f"; it costs {', '.join(parts)}" if parts else ""


def _ratios(entry: Mapping[str, Any]) -> list[Any]:
    """Dense ÷ selective processor time of an answer, one at a time and in the best batches; None where it is absent."""
    cost = entry.get("cost") or {}
    found = [entry.get(job) or (cost.get(job) or {}).get("to_selective") for job in JOBS]
    return [found[0] or entry.get("to_selective"), found[1]]


def differences(workload: Workload) -> dict[str, Interval]:
    """Key of another method -> selective minus that, paired over the same examples."""
    raw = (workload.raw.get("quality") or {}).get("differences") or {}
    found = {key: Interval.of(entry) for key, entry in raw.items()}
    return {key: interval for key, interval in found.items() if interval is not None}


def losses(workload: Workload) -> list[str]:
    """Where a dense network is better, or the selective one is less robust, one sentence each."""
    sign = -1 if workload.lower_is_better else 1
    found = [
        f"{difference(interval, workload.unit)} {workload.metric} against {NAMES.get(key, key)}"
        for key, interval in differences(workload).items()
        if max(sign * bound for bound in interval.bounds) < 0
    ]
    for name, rows in noise(workload).items():
        for row in rows:
            key = sides(row)[-1][0]
            gap = Interval.of(row[key].get("difference"))
            if gap is not None and gap.bounds[1] < 0:
                found.append(f"noise, {name} {row['strength']:g}: {difference(gap, None)} against {key}")
    return found


NAMES = {
    "large": "the large network",
    "dense_same_capacity": "dense of the same capacity",
    "dense_equal_cost": "dense of equal running cost",
}


def noise(workload: Workload) -> dict[str, list[Mapping[str, Any]]]:
    """Kind -> rows of a strength and each network's accuracy."""
    raw = workload.raw.get("noise") or {}
    return {**(raw.get("pictures") or {}), **({"labels": raw["labels"]} if raw.get("labels") else {})}


def sides(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, label, kind) of each network in a row of noise, the dense one of the same capacity last.

    "dense N" is one of N units, "dense N with noise" has seen noise in training too.
    """
    dense = sorted((key for key in row if key.startswith("dense")), key=lambda key: (int(key.split()[1]), key))
    kinds = ["incumbent" if "noise" in key else "exact" for key in dense[:-1]] + ["dense"]
    return [("selective", "selective", "selective")] + [
        (key, key, kind) for key, kind in zip(dense, kinds, strict=True)
    ]


def tables(workload: Workload) -> list[Table]:
    """Everything that only such a workload has; tables without a row are left out."""
    made = [_sweep(workload), _others(workload), *_noise(workload), _published(workload)]
    return [table for table in made if table.rows]


def _sweep(workload: Workload) -> Table:
    rows = []
    for row in (workload.raw.get("equal_quality") or {}).get("sweep") or []:
        value, gap = Interval.of(row), Interval.of(row.get("difference"))
        ratios = [Interval.of(ratio) for ratio in _ratios(row)]
        if value is not None:
            cells = ["–" if ratio is None else times_interval(ratio) for ratio in ratios]
            own = "–" if gap is None else difference(gap, workload.unit)
            trained = seconds(row["training_cpu_s"]) if row.get("training_cpu_s") else "–"
            rows.append((str(row["name"]), amount(value, workload.unit), own, *cells, trained))
    kind, own, minus = ("dense network", "the selective one's", "selective minus dense")
    if workload.is_cascade:
        kind, own, minus = ("single network", "the cascade's", "cascade minus single")
    heads = (kind, workload.metric, minus, *JOBS.values(), "training")
    return Table(f"{kind.capitalize()}s of every size: quality, and cost of an answer ÷ {own}", heads, tuple(rows))


def _others(workload: Workload) -> Table:
    rows = []
    for name, row in (workload.raw.get("others") or {}).items():
        costs = [seconds(row[key]) if row.get(key) else "–" for key in ("cpu_s", "training_cpu_s")]
        rows.append((name, amount(_interval(row), workload.unit), *costs))
    return Table("Other networks", ("", workload.metric, "an answer", "training"), tuple(rows))


def _noise(workload: Workload) -> Iterator[Table]:
    for name, noisy in noise(workload).items():
        rows = []
        for row in noisy:
            values = [
                percent_interval(Interval(*(row[key][k] for k in ("value", "lo", "hi")))) for key, _, _ in sides(row)
            ]
            last = Interval.of(row[sides(row)[-1][0]].get("difference"))
            rows.append((f"{row['strength']:g}", *values, "–" if last is None else difference(last, None)))
        heads = (NOISE.get(name, name), *(label for _, label, _ in sides(noisy[0])), "selective minus the last")
        yield Table(f"Noise, {name}: {workload.metric}", heads, tuple(rows))


def _interval(row: Mapping[str, Any]) -> Interval:
    return Interval(row["value"], row["lo"], row["hi"])


def _published(workload: Workload) -> Table:
    rows = [
        (str(row["name"]), str(row["preprocessing"]), f"{100 * row['accuracy']:.1f} %")
        for row in workload.raw.get("published") or []
    ]
    return Table(
        "Results that others reported to the data set's authors", ("", "preprocessing", "accuracy"), tuple(rows)
    )
