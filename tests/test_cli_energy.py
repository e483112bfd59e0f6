"""``sparingly info`` and ``sparingly measure`` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparingly.cli import app

runner = CliRunner()


def sparingly(*args: str, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparingly.cli", *args], capture_output=True, text=True, timeout=120, **more
    )


def test_info_names_machine_meters_and_kernels_with_reasons(tmp_path: Path):
    file = tmp_path / "info.json"
    result = runner.invoke(app, ["info", "--json", str(file)])
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert content["machine"]["cpu"] in " ".join(result.output.split())
    assert {meter["source"] for meter in content["meters"]} == {"rapl", "nvml"}
    assert all(meter["available"] or meter["reason"] for meter in content["meters"])
    assert content["versions"]["torch"]
    kernels = {(kernel["op"], kernel["device"]): kernel for kernel in content["kernels"]}
    assert kernels["gather_dot", "cpu"]["available"]
    assert all(kernel["available"] or kernel["reason"] for kernel in kernels.values())


def test_info_writes_only_json_to_standard_output():
    result = runner.invoke(app, ["info", "--json", "-"])
    assert json.loads(result.stdout)["machine"]["os"]


def test_measure_passes_everything_through(tmp_path: Path):
    file = tmp_path / "cost.json"
    script = "import sys; print(sys.stdin.read().upper(), end=''); print('to stderr', file=sys.stderr); sys.exit(3)"
    result = sparingly("measure", "--json", str(file), "--", sys.executable, "-c", script, input="hello\n")
    assert result.returncode == 3
    assert result.stdout == "HELLO\n"
    assert "to stderr" in result.stderr
    assert "processor-seconds" in result.stderr
    content = json.loads(file.read_text())
    assert content["exit_code"] == 3
    assert content["command"][0] == sys.executable
    assert content["cpu_s"] > 0
    assert all(record["value"] is not None or record["reason"] for record in content["gross"])
    assert content["machine"]


def test_options_after_the_command_are_the_commands_own():
    result = sparingly("measure", sys.executable, "-c", "import sys; print(sys.argv[1:])", "--json", "x", "--help")
    assert result.returncode == 0
    assert result.stdout.strip() == "['--json', 'x', '--help']"


def test_a_missing_command_is_127_and_a_missing_argument_a_usage_error():
    assert sparingly("measure", "--", "sparingly-no-such-command").returncode == 127
    assert sparingly("measure").returncode == 2


@pytest.mark.parametrize("idle", ["0.5", "-3"])
def test_bad_idle_windows_are_refused_before_the_command_runs(idle: str, tmp_path: Path):
    file = tmp_path / "made"
    result = runner.invoke(app, ["measure", f"--idle={idle}", "--", sys.executable, "-c", f"open({str(file)!r}, 'w')"])
    assert result.exit_code == 2
    assert not file.exists()


def test_json_that_cannot_be_written_says_so(tmp_path: Path):
    result = sparingly("measure", "--json", str(tmp_path / "no" / "folder.json"), "--", sys.executable, "-c", "pass")
    assert result.returncode == 2
    assert "cannot write" in result.stderr
