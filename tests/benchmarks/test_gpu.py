"""benchmarks/gpu.py where it cannot run: it says so; its contenders need a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    done = _run("--quick", "--json", str(rows))
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr
    assert not rows.exists()


def test_a_window_too_short_for_nvml_is_refused() -> None:
    done = _run("--window-s", "3")
    assert done.returncode == 2
    assert "0 or at least 10" in done.stderr and "got 3.0" in done.stderr
