"""A result as one HTML page that opens offline: inline SVG and CSS, no script, and a policy that forbids requests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from sparingly.report import cascades, conversion, figures, findings, summary, trained
from sparingly.report.provenance import energy_rows, energy_value, machine_line, versions_line
from sparingly.report.result import JOBS, RULERS, Interval, Method, Report, Saving, Workload
from sparingly.report.text import amount, percent, seconds, times, times_interval

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CLASSES = {
    "measured": "read from a hardware counter",
    "modelled": "operations and bytes that ran × published energy per operation",
    "estimated": "seconds × constant watts: shown, never ranked",
    "unavailable": "no counter",
}


def write(report: Report, path: str | PathLike[str]) -> None:
    """Write the page for `report` to `path`, UTF-8."""
    Path(path).write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """`report` -> a complete HTML document."""
    css = resources.files("sparingly.report").joinpath("page.css").read_text(encoding="utf-8")
    titles = ", ".join(workload.title for workload in report.workloads)
    body = "".join("".join(_workload(workload)) for workload in report.workloads)
    if summary.needed(report):
        body = _section("All workloads", "", _plain(summary.table(report))) + body
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Sparingly: {escape(titles)}</title><style>{css}</style></head>"
        f"<body><main>{body}</main>{_footer(report)}</body></html>\n"
    )


def _workload(workload: Workload) -> Iterator[str]:
    if conversion.is_conversion(workload):
        yield from _converted(workload)
        return
    yield _header(workload)
    yield _section("", "", _row("three", [_tile(workload, job) for job in JOBS]))
    lead = "Every axis of cost is logarithmic: equal distances are equal ratios."
    charts = [draw(workload) for draw in figures.CHARTS]
    yield _section("What it costs, and what it gets right", lead, _row("two", charts))
    lead = "The field is every class there is, one point each. Lit are the classes that this word was compared with."
    cards = [_example(example, workload) for example in workload.raw.get("examples") or []]
    yield _section("Which units ran", lead, _row("two", cards))
    lead = "Right answers where what comes in, or what was learned from, is disturbed."
    yield _section("Noise", lead, _row("two", figures.noise(workload)))
    yield _section("Where it does not pay", findings.batching(workload) or "", _losses(workload))
    tables = [_quality(workload), _savings(workload), _others(workload), *_trained(workload)]
    yield _section("Every figure", "", _row("", tables))
    lead = "Classes of result are never added up, and a missing figure is never a zero."
    yield _section("Energy", lead, _energy(workload))


def _converted(workload: Workload) -> Iterator[str]:
    """A network that was made selective."""
    sentences = (conversion.headline(workload) + ".", conversion.contract(workload) + ".")
    lead = " ".join(escape(sentence) for sentence in sentences)
    yield f'<header><h1>{escape(workload.title)}</h1><p class="lead">{lead}</p></header>'
    for made in conversion.tables(workload):
        yield _section("", "", _plain(made))
    items = conversion.losses(workload)
    lost = "".join(f"<li>{escape(item)}</li>" for item in items)
    none = '<p class="say">In this run selection paid on every ruler.</p>'
    yield _section("Where it does not pay", "", f'<ul class="card losses">{lost}</ul>' if items else none)


def _row(kind: str, parts: list[str]) -> str:
    inner = "".join(parts)
    return f'<div class="row {kind}">{inner}</div>' if inner else ""


def _header(workload: Workload) -> str:
    mine = workload.method("selective")
    classes = "" if workload.num_classes is None else f" over {workload.num_classes:,} classes"
    sentences = []
    if mine is not None:
        tested = "" if workload.num_tested is None else f" on {workload.num_tested:,} inputs that training never saw"
        value = amount(Interval(mine.quality.value), workload.unit)
        sentences.append(f"<strong>{value}</strong> {escape(workload.metric)}{tested}.")
    if workload.agreement is not None:
        share = percent(workload.agreement.value)
        sentences.append(f"The same top answer as scoring every class, <strong>{share}</strong> of the time.")
    sentences.append(escape(findings.headline(workload)) + ".")
    return f'<header><h1>{escape(workload.title)}{classes}</h1><p class="lead">{" ".join(sentences)}</p></header>'


def _tile(workload: Workload, job: str) -> str:
    savings = [saving for saving in workload.savings if saving.job == job]
    if not savings:
        return ""
    first = savings[0]
    ruler, figure = first.smallest
    cost = f" {findings.costs(workload, job) or ''}".rstrip()
    loss = "" if figure.bounds[0] > 1 else " loss"
    widest = max(value.value for saving in workload.savings for value in saving.rulers.values())
    bars = "".join(_bars(saving, widest, len(savings) > 1) for saving in savings)
    return (
        f'<section class="card tile"><h3>{escape(JOBS[job].capitalize())}</h3>'
        f'<div class="big{loss}">{times(figure.value)}</div>'
        f"<p>less {RULERS[ruler]} than the {workload.other}, {first.precision} on both sides.{cost}</p>"
        f'<dl class="bars">{bars}</dl></section>'
    )


def _bars(saving: Saving, widest: float, grouped: bool) -> str:
    """The rulers of one saving as bars on a log scale from 1 to `widest`; the smallest stands out."""
    rows = [f'<dt class="group">{saving.precision}</dt>'] if grouped else []
    for ruler, value in saving.rulers.items():
        share = math.log(max(value.value, 1.0)) / math.log(max(widest, math.e))
        bar = _bar(share, "smallest" if ruler == saving.smallest[0] else "")
        rows.append(f"<dt>{RULERS[ruler]}</dt><dd>{bar}</dd><dd>{times_interval(value)}</dd>")
    return "".join(rows)


def _example(example: dict[str, Any], workload: Workload) -> str:
    answers = example.get("answers") or []
    best = str(answers[0][0]) if answers else "no answer"
    typed = str(example.get("typed", ""))
    bars = "".join(
        f"<dt>{escape(str(word))}</dt><dd>{_bar(share)}</dd><dd>{percent(share)}</dd>" for word, share in answers
    )
    arrow = '<span aria-label="read as">→</span>'
    return (
        f'<article class="card"><div class="word"><span class="typed">{escape(typed)}</span>{arrow}'
        f'<span class="answer">{escape(best)}</span></div>{figures.field(example, workload)}'
        f'<p class="cost">{escape(figures.field_words(example, workload))}</p><dl class="answers">{bars}</dl></article>'
    )


def _bar(share: float, mark: str = "") -> str:
    """A bar filled to `share` of its width; `mark` is the filled part's class."""
    return f'<span class="bar"><i class="{mark}" style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></span>'


def _losses(workload: Workload) -> str:
    items = findings.losses(workload)
    items += [f"no saving was measured in {job}" for job in findings.quiet_jobs(workload)]
    if not items:
        return '<p class="say">In this run nothing else came out ahead of the selective model on quality or cost.</p>'
    return f'<ul class="card losses">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def _quality(workload: Workload) -> str:
    unit = workload.unit
    rows = [_quality_row(method, unit) for method in workload.methods]
    rows += [_quality_row(method, unit, "20,000 classes, trained at length: ") for method in workload.converged]
    heads = [escape(workload.metric) + ", 95 % interval", "processor time per answer", "processor time of training"]
    return _table("Quality", ["method", *heads], rows)


def _quality_row(method: Method, unit: str | None, prefix: str = "") -> list[str]:
    costs = [seconds(cost) if cost is not None else "–" for cost in (method.answer_cpu_s, method.training_cpu_s)]
    return [escape(prefix + method.name), amount(method.quality, unit), *costs]


def _savings(workload: Workload) -> str:
    present = [ruler for ruler in RULERS if any(ruler in saving.rulers for saving in workload.savings)]
    rows = []
    for saving in workload.savings:
        cells = [times_interval(saving.rulers[ruler]) if ruler in saving.rulers else "–" for ruler in present]
        engine = escape(str(saving.engine or "–"))
        rows.append([f"{JOBS[saving.job]}, {saving.precision} both", engine, times(saving.smallest[1].value), *cells])
    heads = ["job", "dense engine", "smallest", *(RULERS[ruler] for ruler in present)]
    caption = f"cost of the {workload.other} ÷ cost of the {workload.own}"
    return _table(caption.capitalize() if workload.is_cascade else f"Same capacity: {caption}", heads, rows)


def _others(workload: Workload) -> str:
    rows = [[escape(name), f"{escape(sentence)}"] for name, sentence in findings.comparisons(workload)]
    grown = findings.growth(workload)
    rows += [["growth", escape(grown)]] if grown else []
    if workload.null_test is not None:
        low, high = workload.null_test.bounds
        verdict = "includes 1" if findings.null_test_holds(workload) else "leaves out 1: distrust the timings"
        rows.append(["A/A null test", f"{workload.null_test.value:.3f} [{low:.3f}, {high:.3f}], {verdict}"])
    return _table("Equal quality, incumbents, growth, and the rig itself", ["", "finding"], rows, "words")


def _trained(workload: Workload) -> Iterator[str]:
    for made in (*cascades.tables(workload), *trained.tables(workload)):
        yield _plain(made)


def _plain(made: conversion.Table) -> str:
    rows = [[escape(cell) for cell in row] for row in made.rows]
    return _table(made.caption, [escape(head) for head in made.heads], rows)


def _energy(workload: Workload) -> str:
    rows = [
        [
            escape(str(record.get("scope"))),
            f'<span title="{_CLASSES.get(str(record.get("class")), "")}">{escape(str(record.get("class")))}</span>',
            escape(energy_value(record)),
            escape(str(record.get("source") or "–")),
            percent(record["coverage"]) if record.get("coverage") is not None else "–",
        ]
        for record in energy_rows(workload)
    ]
    return _table("", ["scope", "class", "value and range, or why not", "source", "coverage"], rows, "words")


def _table(caption: str, heads: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Cells are HTML already; the first of each row is its header. Empty where there is no row."""
    if not rows:
        return ""
    mark = f' class="{kind}"' if kind else ""
    head = "".join(f'<th scope="col"{mark}>{text}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td{mark}>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="card scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, lead: str, body: str) -> str:
    if not body:
        return ""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return head + (f'<p class="say">{escape(lead)}</p>' if lead else "") + body


def _footer(report: Report) -> str:
    note = report.raw.get("note")
    lines = [f'<p class="stamp">{escape(str(note))}</p>'] if note else []
    lines += [f"<p>{escape(machine_line(report.machine))}</p>", f"<p>{escape(versions_line(report))}</p>"]
    lines += [f"<p>{escape(str(report.raw[key]))}</p>" for key in ("date", "command") if report.raw.get(key)]
    lines.append("<p>Savings are ratios with 95 % intervals; each large figure is the smallest of its rulers.</p>")
    return f"<footer>{''.join(lines)}</footer>"
