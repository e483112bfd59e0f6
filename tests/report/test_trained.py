"""A network that was trained selectively: other denominators, noise and losses in words, for shares and for bits."""

from __future__ import annotations

import copy
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from sparingly.report import findings, html, readme, result, terminal, trained


def interval(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "lo": value - half, "hi": value + half}


def saving(value: float) -> dict[str, Any]:
    return {"saving": {"cpu_s": interval(value), "macs": 50.0, "bytes": 40.0}, "dense_cpu_s": 1e-3, "engine": "onnx"}


def noisy(strength: float, gap: float) -> dict[str, Any]:
    return {
        "strength": strength,
        "selective": interval(0.8),
        "dense 84": {**interval(0.7), "difference": interval(0.1)},
        "dense 16384": {**interval(0.8 - gap), "difference": interval(gap)},
    }


ENTRY: dict[str, Any] = {
    "title": "Clothes",
    "quality": {
        "metric": "accuracy",
        "n": 10_000,
        "selective": {**interval(0.9), "cpu_s": 2e-5, "training_cpu_s": 30.0},
        "dense_same_capacity": {**interval(0.91), "cpu_s": 1e-3, "training_cpu_s": 900.0},
        "dense_equal_cost": {**interval(0.88), "cpu_s": 1e-5, "training_cpu_s": 10.0},
        "differences": {"dense_same_capacity": interval(-0.02), "dense_equal_cost": interval(0.02)},
    },
    "training": saving(20.0),
    "inference": {"batch_1": saving(50.0), "best_batch": saving(0.9)},
    "equal_cost": {"dense": "dense 84", "difference": interval(0.02), "batch_1": interval(0.7)},
    "equal_quality": {
        "dense": "dense 1024",
        "batch_1": interval(3.1),
        "sweep": [{"name": "dense 1024", **interval(0.905), "batch_1": interval(3.1), "training_cpu_s": 40.0}],
    },
    "others": {"with a bank": {**interval(0.92), "cpu_s": 5e-5, "training_cpu_s": 50.0}},
    "noise": {"pictures": {"gaussian": [noisy(0.1, 0.05), noisy(0.5, -0.05)]}, "labels": [noisy(0.4, 0.02)]},
    "published": [{"name": "XgBoost", "preprocessing": "none", "accuracy": 0.898}],
}


def report(entry: dict[str, Any] = ENTRY) -> result.Report:
    return result.parse({"schema": 1, "commit": "abc", "workloads": {"fashion": entry}})


def test_denominators_and_losses_are_said():
    (workload,) = report().workloads
    told = dict(findings.comparisons(workload))
    assert told["equal cost"] == "+2.0 points [1.0, 3.0] against dense 84; it costs 0.70× one at a time"
    assert told["equal quality"].startswith("dense 1024 is the cheapest") and "3.1×" in told["equal quality"]
    lost = findings.losses(workload)
    assert "−2.0 points [−3.0, −1.0] accuracy against dense of the same capacity" in lost
    assert "noise, gaussian 0.5: −5.0 points [−6.0, −4.0] against dense 16384" in lost
    assert any("0.90×, not shown to be a saving" in one for one in lost)
    assert not any("dense of equal running cost" in one or "gaussian 0.1" in one or "labels" in one for one in lost)


def test_where_lower_is_better_signs_turn():
    entry = copy.deepcopy(ENTRY)
    entry["quality"] |= {"unit": "bits per byte", "lower_is_better": True}
    (workload,) = report(entry).workloads
    lost = findings.losses(workload)
    assert "+0.020 [0.010, 0.030] accuracy against dense of equal running cost" in lost
    assert not any("same capacity" in one for one in lost)
    out = StringIO()
    terminal.show(report(entry), Console(file=out, width=100, color_system=None))
    assert "0.900 [0.890, 0.910]" in out.getvalue() and "90.0 %" not in out.getvalue()


def test_the_page_draws_noise_and_lists_everything():
    text = html.page(report())
    for words in ("Accuracy under gaussian", "Accuracy under labels", "with a bank", "XgBoost", "dense 1024", "Noise"):
        assert words in text
    entry = {name: value for name, value in ENTRY.items() if name not in ("noise", "others", "published")}
    assert "Accuracy under" not in html.page(report(entry))


@pytest.mark.parametrize("gone", ["equal_cost", "equal_quality", "noise", "others", "training", "inference"])
def test_a_part_that_is_absent_is_left_out(gone: str):
    entry = {name: value for name, value in ENTRY.items() if name != gone}
    html.page(report(entry))
    terminal.show(report(entry), Console(file=StringIO(), width=80))
    assert [table.caption for table in trained.tables(report(entry).workloads[0])]


def test_the_readme_has_a_paragraph_for_each_but_the_first():
    text = "<!-- figures: trained -->\n<!-- /figures -->\n"
    assert "No other network was measured." in readme.update(text, report())
    both = result.parse({"schema": 1, "commit": "abc", "workloads": {"spell": ENTRY, "fashion": ENTRY}})
    found = readme.update(text, both)
    assert found.count("- **Clothes**") == 1 and "dense, same capacity 91.0 %" in found and "Where it loses" in found
