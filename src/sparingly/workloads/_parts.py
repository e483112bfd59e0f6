"""Finished parts of a benchmark on disk, so that one that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sparingly._progress import Say as Say
from sparingly.energy.machine import commit, machine_info, versions


def cache_folder() -> Path:
    """Where results and models are kept: ``$XDG_CACHE_HOME/sparingly``, by default ``~/.cache/sparingly``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparingly"


def find_file(name: str, folders: Sequence[Path], install: str) -> Path:
    """The file of that name in the first folder that has it. Raises FileNotFoundError with how to ``install`` it."""
    found = next((place for one in folders if (place := one / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no {name} in {' or '.join(map(str, folders))}: {install}")
    return found


def check_sha256(content: bytes, expected: str, found: Path, install: str) -> None:
    """Raise ValueError unless ``content``, which comes from the file ``found``, has that SHA-256."""
    got = hashlib.sha256(content).hexdigest()
    if got != expected:
        raise ValueError(f"{found} holds other data: SHA-256 {got[:16]}…, expected {expected[:16]}…. {install}")


def source_mark() -> str:
    """Hash of the package's sources: parts made by other code do not count."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def document(command: str, entry: dict[str, Any], mode: str) -> dict[str, Any]:
    """The JSON of a run of one workload: ``command`` is its name, ``mode`` "default" or an option's name."""
    return {
        "schema": 1,
        "command": f"sparingly bench {command}{'' if mode == 'default' else ' --' + mode}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine_info(),
        "versions": versions(),
        "workloads": {command: entry},
    }


def parts_of(workload: str, mode: Any, *, fresh: bool) -> Parts:
    """The kept parts of a workload in one mode (which has a ``name``), none of them if ``fresh``."""
    mark = f"{source_mark()} {mode}" if not fresh else f"{source_mark()} {mode} {time.time()}"
    return Parts(cache_folder() / f"{workload}-{mode.name}", mark)


class Parts:
    """JSON-able results by name in one folder; ``run(name, work)`` computes what is not there yet.

    A folder that was made with another ``mark`` is started anew.
    """

    def __init__(self, folder: Path, mark: str):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "mark"
        if not note.exists() or note.read_text() != mark:
            for file in folder.iterdir():
                file.unlink()
            note.write_text(mark)

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """The stored result, or that of ``work()``, stored whole or not at all."""
        file = self.folder / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text())
        result = work()
        fresh = file.with_suffix(".tmp")
        fresh.write_text(json.dumps(result, allow_nan=False))
        os.replace(fresh, file)
        return result
