"""What a converted network's result says, as tables of text that the terminal and the page both show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparingly.report.result import RULERS, Interval, Workload
from sparingly.report.text import percent, percent_interval, times, times_interval

PRECISIONS = {"saving": "fp32", "saving_bf16": "bf16", "saving_int8": "int8"}
JOBS = {
    "decode": "",
    "generate": "by generate(), ",
    "batch_1": "one at a time, ",
    "best_batch": "best batches, ",
    "description": "one long text, ",
    "same_engine": "same engine, ",
    "every_layer": "same engine, every layer skips, ",
}
"""Keys of ``inference`` and what stands before their precision: for one decoded token, one text or one image."""


@dataclass(frozen=True)
class Table:
    """A caption, the heads of the columns and rows of cells."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def is_conversion(workload: Workload) -> bool:
    """True for a workload that makes an existing network selective."""
    return "contract" in workload.raw and not workload.is_cascade


def savings(workload: Workload) -> Iterator[tuple[str, dict[str, Interval]]]:
    """(job and precision, ruler -> dense cost ÷ selective cost), see :data:`JOBS`."""
    inference = workload.raw.get("inference") or {}
    for job, words in JOBS.items():
        for key, precision in PRECISIONS.items():
            raw = (inference.get(job) or {}).get(key) or {}
            found = {ruler: Interval.of(raw.get(ruler)) for ruler in RULERS}
            present = {ruler: interval for ruler, interval in found.items() if interval is not None}
            if present:
                yield words + precision, present


def headline(workload: Workload) -> str:
    """The contract and the smallest saving over every ruler and precision, in one sentence."""
    contract = workload.raw["contract"]
    lossless = contract.get("lossless", False)
    if contract.get("setting") is None and not lossless:
        return "No setting kept the contract: the network stays dense."
    found = [
        (interval.value, RULERS[ruler], precision)
        for precision, rulers in savings(workload)
        for ruler, interval in rulers.items()
    ]
    if not found:
        return "The contract holds; no saving was measured."
    value, ruler, precision = min(found)
    if value < 1:
        return f"No saving: {times(value)} is the smallest ratio of dense to selective cost ({precision}, {ruler})"
    return f"{times(value)} is the smallest saving ({precision}, {ruler}) {_KEPT[lossless]}"


_KEPT = {False: "under the contract", True: "without a change of any answer"}


def contract(workload: Workload) -> str:
    """The promise, and what the test found, in one sentence."""
    raw = workload.raw["contract"]
    if raw.get("lossless"):
        return f"lossless: scores differ by rounding, at most {raw['largest_difference']:.0e}, on {raw['n']:,} examples"
    asked = f"at most {percent(raw['max_drop'])} of {raw['metric']} lost, at {percent(raw['confidence'])} confidence"
    if raw.get("setting") is None:
        return f"{asked}: nothing passed on {raw['n']:,} examples"
    found = f"{percent(raw['drop'])} lost, at most {percent(raw['upper'])}"
    clipped = f"; {raw['clipped']} counted as {raw['clip']:g} times the limit" if raw.get("clipped") else ""
    return f"{asked}: {found} on {raw['n']:,} examples ({raw['bound']}{clipped})"


def losses(workload: Workload) -> list[str]:
    """Where selection did not pay, one sentence each."""
    found = [
        f"{precision}: {RULERS[ruler]} {times(interval.value)}, not shown to be a saving"
        for precision, rulers in savings(workload)
        for ruler, interval in rulers.items()
        if interval.bounds[0] <= 1
    ]
    inference = workload.raw.get("inference") or {}
    dense = [words for job, words in JOBS.items() if (inference.get(job) or {}).get("runs") == "dense"]
    if dense:
        found.append(f"{''.join(dense)}the dense network should go on: selection costs as much there, or more")
    drop = Interval.of((workload.raw.get("quality") or {}).get("drop"))
    limit = workload.raw["contract"].get("max_drop")
    if drop is not None and limit is not None and drop.value > limit:
        found.append(f"{percent(drop.value)} lost on held-out data, more than the contract's {percent(limit)}")
    return found


def summary(workload: Workload) -> list[Table]:
    """What the README shows; parts that were not measured are left out."""
    made = (part(workload) for part in (_quality, _savings, _recovered, _head))
    return [table for table in made if table.rows]


def tables(workload: Workload) -> list[Table]:
    """Everything that was measured."""
    more = (part(workload) for part in (_controls, _layers, _timed_layers))
    return summary(workload) + [table for table in more if table.rows]


def _quality(workload: Workload) -> Table:
    quality = workload.raw.get("quality") or {}
    parts = {"all": quality} | {name: entry for name, entry in quality.items() if _is_pair(entry)}
    int8 = ((workload.raw.get("inference") or {}).get("decode") or {}).get("quality_int8") or {}
    parts |= {f"{int8.get('n')} of them, int8 rows": int8}
    rows = []
    for name, entry in parts.items():
        if not _is_pair(entry):
            continue
        drop = Interval.of(entry.get("drop"))
        values = [_figure(Interval.of(entry[side])) for side in ("dense", "selective")]
        rows.append((name, *values, "-" if drop is None else percent_interval(drop)))
    if workload.agreement is not None:
        rows.append(("same best answer", "", "", percent_interval(workload.agreement)))
    same = (workload.raw.get("continuations") or {}).get("identical")
    if same is not None:
        rows.append(("identical greedy continuations", "", "", percent_interval(Interval(**same))))
    n = "" if workload.num_tested is None else f", {workload.num_tested:,} held-out examples"
    return Table(f"Quality: {workload.metric}{n}", ("", "dense", "selective", "lost, 95 %"), tuple(rows))


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, dict) and "dense" in entry and "selective" in entry


def _figure(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:.4g}"


def _savings(workload: Workload) -> Table:
    found = list(savings(workload))
    present = [ruler for ruler in RULERS if any(ruler in rulers for _, rulers in found)]
    rows = []
    for precision, rulers in found:
        cells = (times_interval(rulers[ruler]) if ruler in rulers else "-" for ruler in present)
        rows.append((precision, times(min(i.value for i in rulers.values())), *cells))
    heads = ("both", "smallest", *(RULERS[ruler] for ruler in present))
    return Table("One answer: cost of the dense network ÷ cost of the selective one", heads, tuple(rows))


def _recovered(workload: Workload) -> Table:
    """What a short distillation made possible under the same contract."""
    found = workload.raw.get("recovered") or {}
    rows = []
    if found:
        lost = percent_interval(Interval(**found["quality"]["drop"]))
        bound = found["contract"]["upper"]
        kept = "the network stays dense" if bound is None else f"at most {percent(bound)} lost"
        rows.append((kept, lost, *(times(found["saving"][ruler]) for ruler in ("macs", "bytes"))))
    spent = f"{found.get('training_cpu_s', 0) / 60:.0f} processor-minutes, {found.get('tokens', 0):,} tokens"
    heads = ("calibrated", "lost on held-out text, 95 %", RULERS["macs"], RULERS["bytes"])
    return Table(f"After recovery ({spent}), fp32, one decoded token", heads, tuple(rows))


def _head(workload: Workload) -> Table:
    rows = [
        (
            f"rank {row['rank']}, {row['keep']:,} exact",
            percent_interval(Interval(**row["agreement"])),
            times_interval(Interval(**row["cpu_s"])),
        )
        for row in (workload.raw.get("head") or {}).get("rows") or []
    ]
    engine = (workload.raw.get("head") or {}).get("engine")
    return Table(f"The output layer alone, against {engine}", ("screen", "same best", "processor time"), tuple(rows))


def _controls(workload: Workload) -> Table:
    controls = workload.raw.get("controls") or {}
    drops = (controls.get("drop") or {}).items()
    rows = [(name, percent_interval(Interval(**drop))) for name, drop in drops]
    share = percent(controls.get("share", 0.0))
    return Table(f"{share} of the hidden units by each selector, without a contract", ("selector", "lost"), tuple(rows))


def _layers(workload: Workload) -> Table:
    """Layers of one kind together: their number, and the mean share of units that ran."""
    groups: dict[tuple[str, str], list[float]] = {}
    for layer in workload.raw.get("layers") or []:
        if layer.get("share_run") is not None:
            key = (str(layer["name"]).rpartition(".")[2], str(layer["selector"]))
            groups.setdefault(key, []).append(float(layer["share_run"]))
    rows = [
        (name, selector, str(len(shares)), percent(sum(shares) / len(shares)), percent(min(shares)))
        for (name, selector), shares in groups.items()
    ]
    return Table("Units that ran", ("layers", "selector", "how many", "mean share", "least"), tuple(rows))


def _timed_layers(workload: Workload) -> Table:
    """Layers that were timed one by one."""
    rows = [
        (str(layer["name"]), percent(layer["share_run"]), times_interval(Interval(**layer["saving"])), layer["runs"])
        for layer in workload.raw.get("layers") or []
        if layer.get("saving")
    ]
    heads = ("layer", "ran", f"dense ÷ selective, {RULERS['cpu_s']}", "runs")
    return Table("Layers, each against its fastest dense form", heads, tuple(rows))
