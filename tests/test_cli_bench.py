"""`sparingly bench` with several workloads: one that fails does not keep the others from running, and is shown."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from typer.testing import CliRunner

from sparingly import cli


def workload(result: Any) -> Any:
    """A module that gives this result, or raises it."""

    def bench(mode: str, say: Any, *, fresh: bool) -> dict[str, Any]:
        if isinstance(result, Exception):
            raise result
        return {"schema": 1, "workloads": result}

    return SimpleNamespace(MODES={"default": "default"}, bench=bench)


def test_what_fails_is_listed_and_the_others_run(tmp_path, monkeypatch):
    made = {"quality": {"metric": "accuracy", "n": 10, "selective": {"value": 0.9, "lo": 0.8, "hi": 0.95}}}
    monkeypatch.setattr(cli, "WORKLOADS", ("relu", "fashion-cnn", "census"))
    for name, result in (
        ("relu", FileNotFoundError("no network: install it")),
        ("fashion_cnn", {"fashion-cnn": made}),
        ("census", {"census": made}),
    ):
        monkeypatch.setitem(sys.modules, f"sparingly.workloads.{name}", workload(result))
    file, page = tmp_path / "out.json", tmp_path / "out.html"
    done = CliRunner().invoke(cli.app, ["bench", "all", "--json", str(file), "--report", str(page)])
    assert done.exit_code == 2
    content = json.loads(file.read_text())
    assert list(content["workloads"]) == ["fashion-cnn", "census"]
    assert content["failures"] == {"relu": "no network: install it"}
    for shown in (done.output, page.read_text()):
        assert "All 3 workloads" in shown and "no network" in shown and "fashion-cnn" in shown
