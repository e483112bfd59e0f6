"""One screen of a result: quality, what training and answering cost, the other two denominators, and the losses."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sparingly.report import cascades, conversion, findings, summary
from sparingly.report.provenance import energy_lines, machine_line, versions_line
from sparingly.report.result import JOBS, RULERS, Method, Report, Workload
from sparingly.report.text import amount, percent_interval, seconds, times, times_interval

_STYLES = {"selective": "bold green", "exact": "default", "dense": "yellow", "incumbent": "magenta"}
_BAR_WIDTH = 10


def show(report: Report, console: Console | None = None) -> None:
    """Print every workload of `report` to `console` (by default a new one on standard output)."""
    console = console or Console()
    for workload in report.workloads:
        console.print(render(workload))
    if summary.needed(report):
        console.print(Text(""), _drawn(summary.table(report)))
    console.print(Text(machine_line(report.machine), style="dim"))
    console.print(Text(versions_line(report), style="dim"))


def render(workload: Workload) -> RenderableType:
    """One workload as a rich renderable, 80 columns or wider."""
    if conversion.is_conversion(workload):
        return _converted(workload)
    title = workload.title if workload.num_classes is None else f"{workload.title}, {workload.num_classes:,} classes"
    headline = Text(findings.headline(workload), style="bold green")
    headline.append(f"\n{findings.by_job(workload)}", style="not bold default")
    blank = Text("")
    return Group(
        Panel(headline, title=title, title_align="left", box=box.ROUNDED),
        *_quality(workload),
        blank,
        *_savings(workload),
        *(_drawn(made) for made in cascades.tables(workload, examples=False)),
        blank,
        *_facts(workload),
        *_losses(workload),
        *(Text(f" energy  {line}", style="dim") for line in energy_lines(workload)),
    )


def _converted(workload: Workload) -> RenderableType:
    """A network that was made selective."""
    headline = Text(conversion.headline(workload), style="bold green")
    headline.append(f"\n{conversion.contract(workload)}", style="not bold default")
    parts: list[RenderableType] = [Panel(headline, title=workload.title, title_align="left", box=box.ROUNDED)]
    for made in conversion.tables(workload):
        parts += [_drawn(made), Text("")]
    parts += [Text(f" loss  {sentence}", style="red") for sentence in conversion.losses(workload)]
    return Group(*parts)


def _drawn(made: conversion.Table) -> Table:
    table = _table(made.caption)
    for place, head in enumerate(made.heads):
        table.add_column(head, justify="right" if place else "left")
    for row in made.rows:
        table.add_row(*map(Text, row))
    return table


def _quality(workload: Workload) -> Iterator[RenderableType]:
    if not workload.methods:
        return
    tested = "" if workload.num_tested is None else f" on {workload.num_tested:,} inputs that training never saw"
    table = _table(f"Quality: {workload.metric}{tested}")
    table.add_column("method")
    table.add_column("95 % interval", no_wrap=True)
    table.add_column("", width=_BAR_WIDTH, no_wrap=True)
    table.add_column("per answer", justify="right", no_wrap=True)
    for method in workload.methods:
        style = _STYLES[method.kind]
        bar = _bar(method) if workload.unit is None else ""
        cost = "" if method.answer_cpu_s is None else seconds(method.answer_cpu_s)
        table.add_row(Text(method.name, style), amount(method.quality, workload.unit), Text(bar, style), cost)
    yield table


def _bar(method: Method) -> str:
    """The share as a bar of eighths of a cell."""
    eighths = round(8 * _BAR_WIDTH * min(max(method.quality.value, 0.0), 1.0))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _savings(workload: Workload) -> Iterator[RenderableType]:
    if not workload.savings:
        return
    caption = f"cost of the {workload.other} ÷ cost of the {workload.own}"
    table = _table(caption.capitalize() if workload.is_cascade else f"Same capacity: {caption}")
    present = [ruler for ruler in RULERS if any(ruler in saving.rulers for saving in workload.savings)]
    table.add_column("job", no_wrap=True)
    table.add_column("both", no_wrap=True)
    table.add_column("smallest", justify="right", style="bold", no_wrap=True)
    for ruler in present:
        table.add_column(RULERS[ruler], justify="right", no_wrap=True)
    shown = ""
    for saving in workload.savings:
        figure = saving.smallest[1]
        style = "green" if figure.bounds[0] > 1 else "bold red"
        cells = [times_interval(saving.rulers[ruler]) if ruler in saving.rulers else "–" for ruler in present]
        job = "" if saving.job == shown else JOBS[saving.job]
        table.add_row(job, saving.precision, Text(times(figure.value), style), *cells)
        shown = saving.job
    yield table


def _facts(workload: Workload) -> Iterator[RenderableType]:
    grid = Table.grid(padding=(0, 2), pad_edge=True)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, sentence in findings.comparisons(workload):
        grid.add_row(name, sentence)
    if workload.agreement is not None:
        grid.add_row("agreement", f"{percent_interval(workload.agreement)} of top answers equal the exact top answer")
    grown = findings.growth(workload)
    if grown:
        grid.add_row("growth", grown)
    if workload.null_test is not None:
        verdict = "includes 1" if findings.null_test_holds(workload) else "LEAVES OUT 1"
        low, high = workload.null_test.bounds
        text = f"{workload.null_test.value:.3f} [{low:.3f}, {high:.3f}] {verdict}"
        grid.add_row("A/A null test", text)
    if grid.row_count:
        yield grid


def _losses(workload: Workload) -> Iterator[Text]:
    for sentence in findings.losses(workload):
        yield Text(f" loss  {sentence}", style="red")
    for job in findings.quiet_jobs(workload):
        yield Text(f" not measured  saving in {job}", style="yellow")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
