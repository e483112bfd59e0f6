"""The ``sparingly`` command: a thin shell over the library."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparingly import _cli_convert

app = typer.Typer(
    help="Run only the parts of a neural network that an input needs, and see what that saved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write JSON here; - is standard output.")]


def write_json(content: Any, file: Path) -> None:
    """Write ``content`` as JSON to ``file``; ``-`` is standard output. Ends the command if it cannot."""
    text = json.dumps(content, indent=2, allow_nan=False)
    if str(file) == "-":
        print(text)
        return
    try:
        file.write_text(text + "\n")
    except OSError as error:
        print(f"cannot write {file}: {error.strerror}", file=sys.stderr)
        raise typer.Exit(2) from error


def _kernels() -> list[dict[str, Any]]:
    from sparingly.ops import registered

    return [
        {"op": op, "device": device, "available": available, "reason": reason}
        for op, device, available, reason in registered()
    ]


def _meters() -> list[dict[str, Any]]:
    from sparingly.energy.meters import default_meters

    return [
        {"source": meter.source, "scopes": meter.scopes(), "available": reason is None, "reason": reason}
        for meter in default_meters()
        for reason in [meter.unavailable()]
    ]


@app.command()
def info(json_file: JsonFile = None) -> None:
    """Show what this machine can measure and which kernels run, with the reasons why not."""
    from sparingly.energy.machine import commit, machine_info, versions

    content = {
        "machine": machine_info(),
        "versions": versions(),
        "commit": commit(),
        "meters": _meters(),
        "kernels": _kernels(),
    }
    if json_file is not None:
        write_json(content, json_file)
    if str(json_file) != "-":
        _print_info(content)


def _print_info(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table("machine", "", show_edge=False)
    for name, value in {**content["machine"], "commit": content["commit"]}.items():
        facts.add_row(name, "unknown" if value is None else str(value or "none"))
    packages = Table("package", "version", show_edge=False)
    for name, version in content["versions"].items():
        packages.add_row(name, version or "not installed")
    meters = Table("meter", "measures", "", show_edge=False)
    for meter in content["meters"]:
        meters.add_row(meter["source"], ", ".join(meter["scopes"]), _verdict(meter))
    kernels = Table("kernel", "device", "", show_edge=False)
    for kernel in content["kernels"]:
        kernels.add_row(kernel["op"], kernel["device"], _verdict(kernel))
    for table in (facts, packages, meters, kernels):
        console.print(table, "")
    if not any(meter["available"] for meter in content["meters"]):
        console.print("No energy counter here: savings are shown in processor time, MACs and bytes.")


def _verdict(row: dict[str, Any]) -> str:
    from rich.markup import escape

    return "[green]works[/green]" if row["available"] else f"[yellow]unavailable[/yellow]: {escape(str(row['reason']))}"


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def measure(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="The command and its arguments.")],
    json_file: JsonFile = None,
    idle_s: Annotated[
        float, typer.Option("--idle", metavar="SECONDS", help="First read idle power for so long, to give net figures.")
    ] = 0.0,
) -> None:
    """Measure any command: elapsed and processor seconds, and joules where a counter can be read.

    The command's input, output and exit code pass through; the summary goes to standard error.
    """
    from sparingly.energy.machine import commit, machine_info, versions
    from sparingly.energy.measurement import measure_command

    if idle_s and idle_s < 1:
        raise typer.BadParameter(f"must be 0 or at least 1, got {idle_s:g}", param_hint="--idle")
    result, code = measure_command(command, idle_s=idle_s)
    print(f"sparingly: exit code {code}\n{result}", file=sys.stderr)
    if json_file is not None:
        line = {"machine": machine_info(), "versions": versions(), "commit": commit()}
        write_json({"schema": 1, "command": command, "exit_code": code, **result.as_dict(), **line}, json_file)
    raise typer.Exit(code)


WORKLOADS = (
    *("spell", "smollm", "minilm", "relu", "fashion", "lm", "census"),
    *("langid", "fashion-cnn", "topic", "stream"),
)


@app.command()
def bench(
    workloads: Annotated[list[str] | None, typer.Argument(help=f"What to run: {', '.join(WORKLOADS)}, or all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything: spell in 90 seconds.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Everything: spell in 45 minutes.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do parts again that an earlier run has finished.")] = False,
    json_file: JsonFile = None,
    report_file: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write an HTML page.")] = None,
) -> None:
    """Run a real task (spell by default), selective beside dense and beside what one would use instead.

    Finished parts are kept: after an interruption the same command goes on where it was.
    """
    from sparingly.report import html, result, terminal

    chosen = list(WORKLOADS) if workloads == ["all"] else workloads or ["spell"]
    for name in chosen:
        if name not in WORKLOADS:
            raise typer.BadParameter(f"must be of {', '.join(WORKLOADS)}, got {name!r}", param_hint="WORKLOADS")
    if quick and full:
        raise typer.BadParameter("give one of --quick and --full, not both", param_hint="--quick")
    mode = "quick" if quick else "full" if full else "default"
    content: dict[str, Any] = {"schema": 1, "workloads": {}}
    failures: dict[str, str] = {}
    for name in chosen:
        made = _run_workload(name, mode, fresh)
        if isinstance(made, str):
            failures[name] = made
        else:
            content = made | {"workloads": content["workloads"] | made["workloads"]}
    content |= {"failures": failures} if failures else {}
    if json_file is not None:
        write_json(content, json_file)
    report = result.parse(content)
    if str(json_file) != "-":
        terminal.show(report)
    if report_file is not None:
        html.write(report, report_file)
    if failures:
        raise typer.Exit(2)


def _run_workload(name: str, mode: str, fresh: bool) -> dict[str, Any] | str:
    """The workload's result, or why there is none; the next one runs all the same."""
    from importlib import import_module

    from rich.console import Console

    from sparingly._cli_convert import progress_lines

    console = Console(stderr=True)
    try:
        module = import_module(f"sparingly.workloads.{name.replace('-', '_')}")
        with progress_lines() as say:
            return module.bench(module.MODES[mode], say, fresh=fresh)
    except (FileNotFoundError, ImportError, RuntimeError, ValueError) as error:
        console.print(f"[red]{name} stopped:[/red] {error}", markup=True)
        return str(error)
    except KeyboardInterrupt as error:
        console.print("interrupted; finished parts are kept, the same command goes on from there")
        raise typer.Exit(130) from error


@app.command()
def predict(
    workload: Annotated[str, typer.Argument(help="Which task; there is spell.")],
    words: Annotated[list[str], typer.Argument(help="Misspelt words.")],
) -> None:
    """Answer with the network that `sparingly bench` trained: best five, how many units ran and what it cost."""
    from rich.console import Console
    from rich.table import Table

    if workload != "spell":
        raise typer.BadParameter(f"must be spell, got {workload!r}", param_hint="WORKLOAD")
    try:
        from sparingly.workloads import spell

        speller = spell.latest()
        rows = [spell.predict(speller, word) for word in words]
    except (ImportError, FileNotFoundError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    dense = speller.head.weight.numel()
    table = Table("typed", "best five", "words scored exactly", "MACs", "processor time", show_edge=False)
    for row in rows:
        best = ", ".join(f"{word} {p:.0%}" for word, p in row["answers"])
        few = f"{row['classes_scored']} of {len(speller.vocabulary):,}"
        table.add_row(row["typed"], best, few, f"1/{dense / row['macs']:.0f} of dense", f"{row['cpu_s'] * 1e6:.0f} µs")
    Console().print(table)


_cli_convert.register(app)

if __name__ == "__main__":
    app()
