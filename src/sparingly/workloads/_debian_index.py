"""Debian's package index as apt keeps it: its lists, their stanzas, and a frozen copy of what was read.

The index changes with every point release, so it is read once, and every later run reads the copy.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

_INDEX = re.compile(r".*_dists_[a-z0-9]+_[a-z]+_(?:i18n_Translation-en|binary-[a-z0-9]+_Packages)(\.\w+)?")
"""The release's own lists; those of updates and security (with a hyphen) change by the day."""

Row = TypeVar("Row", bound=tuple[str, ...])


def frozen_copy(
    copy: Path, index: str | os.PathLike[str], read: Callable[[Path], Sequence[Row]], row: Callable[..., Row]
) -> tuple[tuple[Row, ...], str]:
    """(The rows that ``copy`` holds, their SHA-256); where there is no copy, ``read`` makes them from ``index``.

    Raises ValueError if the copy is damaged, and what ``read`` raises.
    """
    if not copy.exists():
        _write(copy, read(Path(index)))
    try:
        stored: dict[str, Any] = json.loads(gzip.decompress(copy.read_bytes()))
        rows = tuple(row(*fields) for fields in stored["packages"])
        intact = stored["sha256"] == _digest(rows)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{copy} is damaged ({error}): delete it, it is made again from {index}") from error
    if not intact:
        raise ValueError(f"{copy} is not what its hash says: delete it, it is made again from {index}")
    return rows, stored["sha256"]


def _digest(rows: Sequence[tuple[str, ...]]) -> str:
    return hashlib.sha256("".join(f"{chr(0).join(row)}\n" for row in rows).encode()).hexdigest()


def _write(file: Path, rows: Sequence[tuple[str, ...]]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        text = json.dumps({"sha256": _digest(rows), "packages": rows}, ensure_ascii=False)
        fresh.write_bytes(gzip.compress(text.encode(), mtime=0))
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)


def index_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(Lists of packages, long descriptions) under ``folder``. Raises FileNotFoundError if either is missing."""
    files = sorted(file for file in folder.glob("*") if _INDEX.fullmatch(file.name)) if folder.is_dir() else []
    translations = [file for file in files if "_i18n_" in file.name]
    indices = [file for file in files if "_i18n_" not in file.name]
    if not translations or not indices:
        raise FileNotFoundError(
            f"no {'lists of packages' if not indices else 'long descriptions (Translation-en)'} under {folder}: "
            "as root, apt-get -o Acquire::Languages=en update (containers leave them out)"
        )
    return indices, translations


def stanzas(files: Sequence[Path]) -> Iterator[dict[str, str]]:
    """Every stanza with a package's name of deb822 files; lines of one field are joined by newlines."""
    for file in files:
        for stanza in _text(file).split("\n\n"):
            fields: dict[str, str] = {}
            key = ""
            for line in stanza.split("\n"):
                if line.startswith((" ", "\t")):
                    fields[key] += "\n" + line[1:]
                elif ":" in line:
                    key, _, value = line.partition(":")
                    fields[key] = value.strip()
            if "Package" in fields:
                yield fields


def _text(file: Path) -> str:
    """A list, decompressed (by apt's own helper: Python reads no lz4)."""
    if file.suffix in (".lz4", ".xz", ".zst", ".bz2"):
        helper = "/usr/lib/apt/apt-helper"
        return subprocess.run([helper, "cat-file", str(file)], capture_output=True, check=True).stdout.decode()
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix == ".gz" else data).decode()


def description(field: str) -> tuple[str, str]:
    """(first line, the rest with one line per paragraph): " ." parts paragraphs."""
    short, _, rest = field.partition("\n")
    paragraphs = re.split(r"^\.$", rest, flags=re.M)
    return short.strip(), "\n".join(filter(None, (re.sub(r"\s+", " ", part).strip() for part in paragraphs)))
