"""The README's figures, generated from result files between markers: `python -m sparingly.report.readme [--check]`.

A block starts with `<!-- figures: NAME -->` and ends with `<!-- /figures -->`; NAME is a key of BLOCKS.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sparingly.report import conversion, findings
from sparingly.report.provenance import energy_rows, energy_value, machine_line, versions_line
from sparingly.report.result import JOBS, RULERS, Report, Saving, Workload, load, number
from sparingly.report.text import amount, percent_interval, seconds, times, times_interval

_NAMES = (
    *("spell", "smollm", "minilm", "relu", "fashion", "lm", "census"),
    *("langid", "fashion-cnn", "topic", "stream"),
)
RESULTS = tuple(Path(f"benchmarks/results/{name}.json") for name in _NAMES)
README = Path("README.md")
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def update(text: str, *reports: Report) -> str:
    """README text -> the same with every block filled from the workloads of `reports`.

    Raises ValueError if there is no block, one with a name that is not in BLOCKS, or no workload for it.
    """
    names = [match.group(2) for match in _BLOCK.finditer(text)]
    unknown = sorted(set(names) - set(BLOCKS))
    if not names or unknown:
        raise ValueError(f"README blocks must be among {sorted(BLOCKS)} and at least one, got {names}")
    return _BLOCK.sub(lambda match: match.group(1) + BLOCKS[match.group(2)](reports) + match.group(3), text)


def _find(reports: Sequence[Report], converted: bool) -> tuple[Report, Workload]:
    """The first workload that converts a network, or that does not, and its report."""
    for report in reports:
        for workload in report.workloads:
            if conversion.is_conversion(workload) == converted:
                return report, workload
    raise ValueError(f"no result of a {'converted' if converted else 'trained'} network for a block of the README")


def table(reports: Sequence[Report]) -> str:
    """The table: quality, cost, and the saving by the smallest ruler, then its losses and where it comes from."""
    report, workload = _find(reports, converted=False)
    classes = "" if workload.num_classes is None else f", {workload.num_classes:,} classes"
    head = [f"{workload.title}{classes}", "selective", "compared with", "saving"]
    rows = [head, ["---", "---", "---", "---:"], *_quality(workload), *_costs(workload), *_others(workload)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *_small_print(report, workload)]) + "\n"


def batching(reports: Sequence[Report]) -> str:
    """The sentence on what a batch eats."""
    return (findings.batching(_find(reports, converted=False)[1]) or "Batches were not measured.") + "\n"


def converted(reports: Sequence[Report]) -> str:
    """What a converted network lost and saved: the contract, quality, costs, the output layer, losses, provenance."""
    report, workload = _find(reports, converted=True)
    lines = [f"{workload.title}: {conversion.contract(workload)}. {conversion.headline(workload)}.", ""]
    for made in conversion.summary(workload):
        rows = [(made.caption, *made.heads[1:]), ("---", *["---:"] * (len(made.heads) - 1)), *made.rows]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    lost = conversion.losses(workload)
    lines += [f"Where it loses: {'; '.join(lost)}."] if lost else []
    note = report.raw.get("note")
    lines += [str(note)] if note else []
    return "\n".join([*lines, f"Measured on {machine_line(report.machine)}; {versions_line(report)}."]) + "\n"


def others(reports: Sequence[Report]) -> str:
    """Further converted networks in a paragraph each: contract, smallest saving, losses, commit."""
    found = [(report, one) for report in reports for one in report.workloads if conversion.is_conversion(one)]
    lines = []
    for report, workload in found[1:]:
        lost = conversion.losses(workload)
        told = [f"**{workload.title}**: {conversion.contract(workload)}", conversion.headline(workload).rstrip(".")]
        told += [f"Where it loses: {'; '.join(lost)}"] if lost else []
        lines.append(f"- {'. '.join(told)}. Commit {str(report.raw.get('commit'))[:12]}.")
    return "\n".join(lines or ["No other network was measured."]) + "\n"


def trained(reports: Sequence[Report]) -> str:
    """Further networks that were trained selectively in a paragraph each: quality, savings, losses, commit."""
    found = [
        (report, one)
        for report in reports
        for one in report.workloads
        if not conversion.is_conversion(one) and not one.is_cascade
    ]
    return _paragraphs(found[1:])


def cascades(reports: Sequence[Report]) -> str:
    """Cascades and gates in a paragraph each: quality, savings, contract, equal quality, losses, commit."""
    return _paragraphs([(report, one) for report in reports for one in report.workloads if one.is_cascade])


def _paragraphs(found: Sequence[tuple[Report, Workload]]) -> str:
    lines = []
    for report, workload in found:
        told = [f"{method.name} {amount(method.quality, workload.unit)}" for method in workload.methods]
        unit = "" if workload.unit is None or workload.unit in workload.metric else f", {workload.unit}"
        sentences = [f"{workload.metric}{unit}: {'; '.join(told)}", f"{_costs_of(workload)}: {_by_job(workload)}"]
        sentences += [f"{name.capitalize()}: {sentence}" for name, sentence in findings.comparisons(workload)]
        lost = findings.losses(workload)
        sentences += [f"Where it loses: {'; '.join(lost)}"] if lost else []
        lines.append(f"- **{workload.title}**: {'. '.join(sentences)}. Commit {str(report.raw.get('commit'))[:12]}.")
    return "\n".join(lines or ["No other network was measured."]) + "\n"


def _costs_of(workload: Workload) -> str:
    return "Cost of the large network ÷ cost of the cascade" if workload.is_cascade else "Dense cost ÷ selective cost"


def _by_job(workload: Workload) -> str:
    """Each job's saving in processor time, the ruler that every job has."""
    parts = [
        f"{JOBS[saving.job]} {times_interval(saving.rulers['cpu_s'])}"
        for saving in workload.savings
        if "cpu_s" in saving.rulers
    ]
    return f"{', '.join(parts)} ({RULERS['cpu_s']})"


BLOCKS: dict[str, Callable[[Sequence[Report]], str]] = {
    "table": table,
    "batching": batching,
    "converted": converted,
    "others": others,
    "trained": trained,
    "cascades": cascades,
}


def _quality(workload: Workload) -> Iterator[list[str]]:
    mine = workload.method("selective")
    tested = "" if workload.num_tested is None else f", {workload.num_tested:,} inputs never trained on"
    label, own = f"{workload.metric}{tested}", "" if mine is None else f"**{amount(mine.quality, workload.unit)}**"
    for other in workload.methods:
        if other is not mine:
            yield [label, own, f"{other.name}: {amount(other.quality, workload.unit)}", ""]
            label = own = ""
    if workload.agreement is not None:
        yield ["top answer equals the exact one", percent_interval(workload.agreement), "the same weights", ""]


def _costs(workload: Workload) -> Iterator[list[str]]:
    for saving in workload.savings:
        entry = workload.raw.get("training") if saving.job == "training" else None
        entry = entry or (workload.raw.get("inference") or {}).get(saving.job) or {}
        own_s, dense_s = number(entry.get("selective_cpu_s")), number(entry.get("dense_cpu_s"))
        shown = saving.precision == "fp32" and own_s is not None
        engine = f" ({saving.engine})" if saving.engine else ""
        other = f"{workload.other}{engine}" + (f": {seconds(dense_s)}" if shown and dense_s is not None else "")
        yield [
            f"{JOBS[saving.job]}, {saving.precision} both",
            seconds(own_s or 0) if shown else "",
            other,
            _bold(saving),
        ]


def _bold(saving: Saving) -> str:
    ruler, figure = saving.smallest
    return f"**{times_interval(figure)}** {RULERS[ruler]}"


def _others(workload: Workload) -> Iterator[list[str]]:
    by_kind = {method.kind: method for method in workload.converged}
    own, dense = by_kind.get("selective"), by_kind.get("dense")
    if own and dense:
        spent = [f" in {seconds(m.training_cpu_s)}" if m.training_cpu_s else "" for m in (own, dense)]
        ratio = times(dense.training_cpu_s / own.training_cpu_s) if dense.training_cpu_s and own.training_cpu_s else ""
        cells = [f"{percent_interval(m.quality)}{cost}" for m, cost in zip((own, dense), spent, strict=True)]
        yield ["20,000 classes, both trained at length", cells[0], f"dense: {cells[1]}", ratio]
    mine = workload.method("selective")
    for other in workload.methods:
        if other.kind == "incumbent" and mine and other.answer_cpu_s and mine.answer_cpu_s:
            cost = f"{other.name}: {seconds(other.answer_cpu_s)}"
            saved = times(other.answer_cpu_s / mine.answer_cpu_s)
            yield ["one answer, incumbent", seconds(mine.answer_cpu_s), cost, saved]


def _small_print(report: Report, workload: Workload) -> Iterator[str]:
    yield "A saving is the other side's cost divided by the selective cost, by whichever ruler (processor time, MACs,"
    yield "bytes) saves least, with its 95 % interval."
    lost = findings.losses(workload)
    if lost:
        yield f"Where it loses: {'; '.join(lost)}."
    grown = findings.growth(workload)
    if grown:
        yield f"Growth, {grown}."
    missing = [record for record in energy_rows(workload) if record.get("class") == "unavailable"]
    if missing:
        reasons = [f"{record.get('scope')}: {energy_value(record)}" for record in missing]
        yield f"Joules: {'; '.join(reasons)}."
    yield f"Measured on {machine_line(report.machine)}; {versions_line(report)}."


def main(arguments: list[str] | None = None) -> int:
    """Fill the README's blocks; with --check only say whether they are what the result file gives."""
    parser = argparse.ArgumentParser(prog="python -m sparingly.report.readme", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is stale")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, nargs="+", default=RESULTS)
    options = parser.parse_args(arguments)
    text = options.readme.read_text(encoding="utf-8")
    fresh = update(text, *[load(file) for file in options.results])
    if fresh == text:
        return 0
    if options.check:
        print(f"{options.readme} is stale: run python -m sparingly.report.readme", file=sys.stderr)
        return 1
    options.readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
