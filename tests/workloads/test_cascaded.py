"""Helpers of the workloads of cascades: answers that are known, re-splits, costs, and the JSON's entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparingly.nn.cascade import NEVER, Cascade
from sparingly.report import cascades, conversion, findings, html, result, summary, terminal
from sparingly.workloads import _cascaded as cascaded
from sparingly.workloads._parts import Parts

pytest.importorskip("sklearn", reason="part of the benchmark extra")


def answers(n: int = 4000, seed: int = 0) -> cascaded.Answers:
    """A scout that is right in 90 of 100 and knows when, and a large network that is right in 96."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)

    def stage(share: float, sure: float) -> torch.Tensor:
        right = torch.rand(n, generator=generator) < share
        said = torch.where(right, labels, (labels + 1) % 3)
        best = torch.where(right, sure, 0.5 + 0.4 * torch.rand(n, generator=generator)).float()
        return torch.full((n, 3), 0.0).add_(((1 - best) / 2)[:, None]).scatter_(1, said[:, None], best[:, None])

    return cascaded.Answers(["scout", "large"], [stage(0.9, 0.95), stage(0.96, 0.9)], labels)


def judged() -> dict:
    known = answers()
    found, own = cascaded.judge(known, torch.arange(2000), torch.arange(2000, 4000))
    assert found["selective"]["value"] == own.mean() and len(own) == found["n"] == 2000
    return found


def test_a_judged_cascade_keeps_its_contract_and_says_who_left():
    found = judged()
    first, last = found["stages"]
    assert found["contract"]["drop"] <= cascaded.MAX_DROP and found["contract"]["n"] == 1500
    assert (
        last["threshold"] is None and 0.85 < first["left"] < 0.95 and first["left"] + last["left"] == pytest.approx(1)
    )
    assert first["right_of_those"] > 0.99
    assert found["resplits"]["of"] == len(found["resplits"]["drops"]) == cascaded.RESPLITS
    assert found["resplits"]["kept"] == sum(drop <= cascaded.MAX_DROP for drop in found["resplits"]["drops"])


def test_thresholds_go_to_the_models_themselves():
    found = judged()
    known = answers()
    model = Cascade([lambda ids: known.stages[0][ids], lambda ids: known.stages[1][ids]])
    cascaded.set_thresholds(model, found)
    model(torch.arange(2000, 4000))
    assert model.share_left() == [stage["left"] for stage in found["stages"]]
    found["stages"][0]["threshold"] = None
    assert cascaded.thresholds_of(found) == [NEVER]


def test_every_batch_is_answered_and_counted():
    asked: list[int] = []
    side = cascaded.side("engine", lambda part: asked.append(len(part)), list(range(100)), batch=8, chunk=20)
    side.work()
    assert (side.name, side.examples, asked) == ("engine, batch 8", 16, [8, 8])
    alone = cascaded.side("engine", lambda part: asked.append(len(part)), list(range(5)), batch=1, chunk=20)
    alone.work()
    assert (alone.name, alone.examples, asked[2:]) == ("engine", 5, [1] * 5)


def test_the_entry_is_shown_by_every_view(tmp_path, capsys):
    small, large = torch.nn.Linear(8, 3), torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(20)])
    setting = cascaded.Setting(torch.randn(64, 8), (16,), (16, 16), pairs=5)
    own = {"cascade": small}
    costs = cascaded.inference({"pytorch": large}, own, setting, (large, small))
    assert costs["batch_1"]["saving"]["macs"] == pytest.approx(20 * 64 / 24)
    found = judged()
    right = np.random.default_rng(0).random(2000) < 0.9999
    row = {"name": "single", **cascaded.share(right), "difference": cascaded.difference(right, right)}
    sweep = [row | cascaded.beside({"pytorch": large}, own, setting)]

    class Made:
        parts = Parts(tmp_path, "mark")

        def quality(self) -> dict:
            return found | {"training_cpu_s": {}}

        def costs(self, found) -> dict:
            return costs

        def sweep(self, found) -> list:
            return sweep

    entry = cascaded.run(Made(), "A title", "accuracy", ["single"])
    report = result.parse(
        {"schema": 1, "workloads": {"made-up": entry}, "failures": {"other": "no data: " + "x" * 200}}
    )
    (workload,) = report.workloads
    assert workload.is_cascade and not conversion.is_conversion(workload)
    told = dict(findings.comparisons(workload))
    assert "kept on fresh examples in" in told["re-splits"] and "single is the cheapest" in told["equal quality"]
    assert [row[0] for row in cascades.tables(workload)[0].rows] == ["scout", "large"]
    rows = summary.table(report).rows
    assert [row[0] for row in rows] == ["made-up", "other"] and rows[1][1].startswith("failed: no data")
    terminal.show(report)
    shown = capsys.readouterr().out
    assert "large network" in shown and "All 2 workloads" in shown
    page = html.page(report)
    assert "All workloads" in page and "Who leaves where" in page and "dense twin" not in page


def test_what_broke_its_promise_is_a_loss():
    found = judged()
    found["resplits"]["kept"] = 15
    found["contract"]["setting"] = None
    entry = {"contract": found["contract"], "stages": found["stages"], "resplits": found["resplits"]}
    entry["equal_quality"] = {"dense": "scout", "batch_1": {"value": 0.5, "lo": 0.4, "hi": 0.6}}
    (workload,) = result.parse({"schema": 1, "workloads": {"made-up": entry}}).workloads
    assert len(cascades.losses(workload)) == 3
