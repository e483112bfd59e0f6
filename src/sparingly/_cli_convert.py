"""``sparingly convert``, ``explain`` and ``compare``: an existing network made selective, from the shell."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sparingly._progress import Say

SOURCE = "A transformers folder, a .gguf file (or a folder with one), or module.path:callable, which gives a network."
DATA = "Text (.txt, .md) or tensors (.pt, .safetensors, .npy)."

Saved = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `sparingly convert` wrote.")]
Data = Annotated[Path, typer.Option("--data", metavar="FILE", help=DATA)]
Into = Annotated[
    str | None,
    typer.Option("--into", metavar="MODULE:CALLABLE", help="What gives the dense network, if it is not transformers'."),
]
Windows = Annotated[
    int, typer.Option("--windows", metavar="N", min=2, help="At most so many examples, evenly spread over FILE.")
]


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE)],
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    max_drop: Annotated[
        str, typer.Option("--max-drop", metavar="SHARE", help="How much quality may be lost: 1% or 0.01.")
    ] = "1%",
    confidence: Annotated[
        str, typer.Option("--confidence", metavar="SHARE", help="How sure that has to be: 95% or 0.95.")
    ] = "95%",
    metric: Annotated[
        str, typer.Option("--metric", metavar="NAME", help="perplexity, accuracy or agreement.")
    ] = "perplexity",
    where: Annotated[
        str | None,
        typer.Option(
            "--where",
            metavar="PART",
            help="mlp, linear, attention, head, or a glob on names; default: mlp, linear, head.",
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows", metavar="KIND", help="int8: units run from int8 rows; default: the weights as they are."
        ),
    ] = None,
    windows: Windows = 200,
) -> None:
    """Make a network run only the units that each input needs, and keep its quality under a contract.

    Text is cut into windows of 256 tokens (fewer where the network takes fewer). A quarter of the examples fits the
    selectors, the rest tests the promise; more examples allow sparser networks. If nothing keeps the promise, the
    network stays dense and the contract says so. DIR appears when everything is done, or not at all.
    """
    with _one_line_errors("nothing was written"):
        from sparingly._cli_sources import read_data, read_model
        from sparingly._folder import check_free, save_folder
        from sparingly.calibrate import calibrate
        from sparingly.convert import convert_

        drop, sure = _share("--max-drop", max_drop), _share("--confidence", confidence)
        check_free(out)
        with progress_lines() as say:
            say(f"reading {source}", None)
            model, tokenizer = read_model(source)
            say(f"reading {data}", None)
            examples = read_data(data, model, tokenizer, windows)
            say("finding what can be selective", None)
            changes = convert_(model, where=where, example=None if tokenizer else _example(examples), rows=rows)
            contract = calibrate(model, examples, metric, drop, sure, progress=say)
            say(f"writing {out}", None)
            also = None if tokenizer is None else lambda folder: tokenizer.save_pretrained(str(folder))
            save_folder(model, out, also)
    print(f"{len(changes.changed)} layers are selective, {len(changes.skipped)} were left alone")
    print(f"{contract}\nwritten to {out}")


def explain(directory: Saved, into: Into = None) -> None:
    """Show what each layer of a converted network does: its selector, setting and kernel, and the contract.

    What share of the units ran is known where the network ran: `sparingly.explain` in Python, `compare` here.
    """
    with _one_line_errors("nothing was changed"):
        from sparingly.explain import explain as explained

        with progress_lines() as say:
            say(f"reading {directory}", None)
            model = _load(directory, into)
        _show(explained(model))


def compare(directory: Saved, data: Data, into: Into = None, windows: Windows = 100) -> None:
    """Put a converted network beside its dense twin: quality, bytes, MACs, processor time, and joules.

    FILE should be held out: nothing that the network was trained or converted with. Text is cut as for `convert`.
    """
    with _one_line_errors("nothing was changed"):
        from sparingly._cli_sources import read_data, read_tokenizer
        from sparingly.compare import compare as compared

        with progress_lines() as say:
            say(f"reading {directory}", None)
            model = _load(directory, into)
            tokenizer = read_tokenizer(str(directory)) if (directory / "tokenizer_config.json").exists() else None
            examples = read_data(data, model, tokenizer, windows)
            say("comparing", None)
            comparison = compared(model, examples)
        _show(comparison)


def register(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    for command in (convert, explain, compare):
        app.command()(command)


def _load(directory: Path, into: str | None) -> Any:
    from sparingly import store
    from sparingly._cli_sources import called

    return store.load(directory, into=None if into is None else called(into))


def _show(what: Any) -> None:
    """In colour and as wide as the terminal; wider than rich takes a file or pipe to be."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(what)
    else:
        print(what)


def _share(option: str, text: str) -> float:
    number, percent = text.strip(), text.strip().endswith("%")
    try:
        return float(number.removesuffix("%")) / (100 if percent else 1)
    except ValueError as error:
        raise ValueError(f"{option} must be a share such as 1% or 0.01, got {text!r}") from error


def _example(examples: Any) -> Any:
    """Two of the examples, as one forward takes them."""
    from torch import Tensor

    if isinstance(examples, Tensor):
        return examples[:2]
    if isinstance(examples, dict):
        return {name: value[:2] for name, value in examples.items()}
    return examples[0][:2] if isinstance(examples[0], Tensor) else _example(examples[0])


@contextmanager
def _one_line_errors(after: str) -> Iterator[None]:
    """One line on standard error and exit code 2; 130 after Ctrl-C."""
    try:
        yield
    except (
        ArithmeticError,
        ImportError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, typer.Exit):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"sparingly: {text}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        print(f"sparingly: interrupted, {after}", file=sys.stderr)
        raise typer.Exit(130) from error


@contextmanager
def progress_lines() -> Iterator[Say]:
    """A function (what is being done, share done or None) that shows both on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        shown: dict[str, Any] = {}

        def finish() -> None:
            for task in shown.values():
                progress.update(task, total=1, completed=1)
                progress.stop_task(task)

        def say(what: str, share: float | None) -> None:
            if what not in shown:
                finish()
                shown[what] = progress.add_task(what, total=None if share is None else 1)
            if share is not None:
                progress.update(shown[what], completed=share)

        yield say
        finish()
