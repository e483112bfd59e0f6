"""What a result of a cascade or gate says: its contract, other splits of the same examples, who leaves where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparingly.report.conversion import Table, contract
from sparingly.report.result import Interval, Workload
from sparingly.report.text import figure, percent, percent_interval, times, times_interval

SHOWN = 60
"""Characters of an example that are shown."""


def comparisons(workload: Workload) -> Iterator[tuple[str, str]]:
    """(name, sentence): the contract, and in how many other splits of the same examples it would have been kept."""
    if not workload.is_cascade:
        return
    yield "contract", contract(workload)
    split = workload.raw.get("resplits") or {}
    if split:
        worst = max(split["drops"]) if split.get("drops") else None
        tail = "" if worst is None else f"; the worst lost {percent(worst)}"
        yield "re-splits", f"the promise was kept on fresh examples in {split['kept']} of {split['of']} splits{tail}"


def losses(workload: Workload) -> list[str]:
    """Where the contract gave nothing, or was kept more seldom than it says."""
    if not workload.is_cascade:
        return []
    found = []
    if workload.raw["contract"].get("setting") is None:
        found.append("no thresholds kept the contract: the large network answers everything")
    split = workload.raw.get("resplits") or {}
    if split and split["kept"] < workload.raw["contract"]["confidence"] * split["of"]:
        found.append(f"the promise was kept in {split['kept']} of {split['of']} re-splits only")
    equal = workload.raw.get("equal_quality") or {}
    ratio = Interval.of(equal.get("batch_1"))
    if equal.get("dense") and ratio is not None and ratio.value < 1:
        found.append(f"{equal['dense']} alone is as good, for {times(ratio.value)} the processor time at batch 1")
    return found


def tables(workload: Workload, examples: bool = True) -> list[Table]:
    """Stages: how good each is alone, who leaves there, how many of those answers are right, and ``examples``."""
    stages = workload.raw.get("stages") or []
    heads = ("stage", f"alone: {workload.metric}", "leave there", "right of those")
    rows = [_stage(stage) for stage in stages]
    if examples and any(_shown(stage) for stage in stages):
        heads, rows = (*heads, "examples"), [(*row, _shown(stage)) for row, stage in zip(rows, stages, strict=True)]
    made = [Table("Who leaves where", heads, tuple(rows)), _duties(workload)]
    return [table for table in made if table.rows]


def _duties(workload: Workload) -> Table:
    """A gate over streams that differ in how much of them is worth waking for."""
    rows = []
    for duty, row in (workload.raw.get("duties") or {}).items():
        saved = [Interval.of((row[job].get("saving") or {}).get("cpu_s")) for job in ("batch_1", "best_batch")]
        events = f"{row['events']['missed']} of {row['events']['n']:,}"
        told = (percent(row["share_ran"]), *("–" if one is None else times_interval(one) for one in saved), events)
        rows.append((percent(float(duty)), *told, percent(row["missed_chunks"]), figure(row["false_wakes_per_hour"])))
    heads = (
        "duty",
        "network ran on",
        "one at a time",
        "best batches",
        "events missed",
        "of its items",
        "false wakes/h",
    )
    return Table("Streams by duty, on fresh data: processor time of the large network ÷ the gate's", heads, tuple(rows))


def _stage(stage: dict[str, Any]) -> tuple[str, ...]:
    alone, right = Interval.of(stage.get("alone")), stage.get("right_of_those")
    told = ("–" if alone is None else percent_interval(alone), percent(stage["left"]))
    return (str(stage["name"]), *told, "–" if right is None else percent(right))


def _shown(stage: dict[str, Any]) -> str:
    """Some of the inputs that left there, where they are text."""
    texts = [text for text in stage.get("examples") or [] if isinstance(text, str)]
    return " · ".join(text if len(text) <= SHOWN else text[:SHOWN] + "…" for text in texts)
