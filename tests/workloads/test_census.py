"""The workload on a few hundred made-up people and small layers; the census is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparingly.report import result, terminal
from sparingly.workloads import census, census_data
from sparingly.workloads.census_data import People

pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn")


def made_up(n: int, seed: int) -> People:
    """Rich by two features."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 50, (n, 7)).astype(np.float32)
    kinds = rng.integers(0, 3, (n, 32)).astype(np.uint8)
    return People(numbers, kinds, (numbers[:, 0] > 30) & (kinds[:, 0] == 1))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> census.Mode:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(census, "BATCH", 64)
    train, test = made_up(1200, 0), made_up(300, 1)
    # Ten of the test people are alike to people for training.
    for ours, theirs in ((test.numbers, train.numbers), (test.kinds, train.kinds), (test.rich, train.rich)):
        ours[:10] = theirs[:10]
    monkeypatch.setattr(census_data, "load", lambda: (train, test))
    return census.Mode("tiny", 256, 1000, None, 6, 2, (4, 16), 20, 5, 50)


def nothing(what: str, part: float | None) -> None:
    pass


def test_the_whole_run_has_the_shape_of_the_others(tiny: census.Mode):
    content = census.bench(tiny, nothing)
    entry = content["workloads"]["census"]
    quality = entry["quality"]
    assert (quality["n"], quality["left_out"]) == (290, 10)
    methods = [quality[name] for name in ("selective", "dense_same_capacity", "dense_equal_cost")]
    for method in (*methods, quality["incumbents"][census.BOOSTER]):
        assert 0.1 < method["lo"] <= method["value"] <= method["hi"] <= 1.0
        assert method["cpu_s"] > 0 < method["training_cpu_s"] and "resampled" not in method
    booster = quality["incumbents"][census.BOOSTER]
    assert booster["value"] > 0.95 and booster["all_people"]["accuracy"] > 0.95
    gap = quality["differences"][census.BOOSTER]
    assert gap["value"] == pytest.approx(quality["selective"]["value"] - booster["value"])
    for part in (entry["training"], *entry["inference"].values()):
        assert {*part["saving"]} == {"cpu_s", "macs", "bytes"} and part["saving"]["macs"] > 1
    assert [row["units"] for row in entry["equal_quality"]["sweep"]] == [4, 16]
    assert entry["equal_cost"]["difference"] == quality["differences"]["dense_equal_cost"]
    terminal.render(result.parse(content).workloads[0])
    # What is finished is not done again.
    run: Any = census.Census(tiny, nothing)
    run.quality = run.booster = run.costs = run.of_size = lambda *_: pytest.fail("done again")
    run.people = None, None, np.array([True] * 290 + [False] * 10)
    assert run.run() == entry


def test_the_metric_is_that_of_scikit_learn_with_ties_and_weights():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    rich, scores, weights = rng.random(500) < 0.1, rng.integers(0, 40, 500) / 40, rng.integers(0, 4, 500)
    found = census.average_precision(rich, scores, [weights])
    assert found == pytest.approx(
        [average_precision_score(rich, scores), average_precision_score(rich, scores, sample_weight=weights)]
    )
    assert census.average_precision(rich, rich.astype(float), ())[0] == 1.0
    assert census.average_precision(rich, np.zeros(500), ())[0] == pytest.approx(rich.mean())


def test_trees_in_another_engine_answer_alike():
    people = made_up(400, 2)
    model = census.Booster(people, 8)
    table = torch.from_numpy(made_up(200, 3).table)
    scores = [np.asarray(engine(table)).ravel() for engine in model.engines.values()]
    assert len(scores) == 2 and scores[0].std() > 0.1
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


def test_every_pass_sees_everybody_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(census, "BATCH", 5)
    order = census._Order(20)
    passes = [np.concatenate([order(step) for step in range(first, first + 4)]) for first in (0, 4)]
    assert [sorted(one) for one in passes] == [[*range(20)]] * 2 and passes[0].tolist() != passes[1].tolist()
    assert census._Order(20)(6).tolist() == passes[1][10:15].tolist()
