"""The spelling workload end to end, on its quick mode, and its parts."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from sparingly import cli
from sparingly.workloads import spell
from sparingly.workloads._parts import Parts
from sparingly.workloads._speller import Recipe, Speller, exact_best, other_than_typed, train_dense, train_selective
from sparingly.workloads.spell_data import Pairs, Vocabulary, misspellings


def sparingly(folder, *arguments):
    """Run the command with its cache in ``folder``."""
    program = "import sys; from sparingly.cli import app; sys.argv[0] = 'sparingly'; app()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=560
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One quick run: (folder, the JSON's entry of the workload, the page, what the terminal showed)."""
    folder = tmp_path_factory.mktemp("bench")
    files = ("--json", str(folder / "out.json"), "--report", str(folder / "out.html"))
    done = sparingly(folder, "bench", "spell", "--quick", *files)
    assert done.returncode == 0, done.stderr
    document = json.loads((folder / "out.json").read_text())
    return folder, document, (folder / "out.html").read_text(), done.stdout


def test_the_document_has_the_fixed_keys(run):
    document = run[1]
    assert document["schema"] == 1 and document["machine"] and document["versions"]
    entry = document["workloads"]["spell"]
    assert entry["num_classes"] == 20_000
    for name in ("selective", "exact_same_weights", "dense_equal_cpu"):
        figure = entry["quality"][name]
        assert 0 < figure["lo"] < figure["value"] < figure["hi"] < 1
    assert entry["quality"]["incumbents"]["symspellpy"]["value"] > 0.5
    for mode in ("batch_1", "best_batch"):
        for saving in ("saving", "saving_int8"):
            figures = entry["inference"][mode][saving]
            assert figures["cpu_s"]["lo"] <= figures["cpu_s"]["value"] <= figures["cpu_s"]["hi"]
            assert figures["macs"] > 0 and figures["bytes"] > 0
    assert entry["training"]["saving"]["cpu_s"]["value"] > 0
    assert {record["class"] for record in entry["energy"]} <= {"measured", "modelled", "estimated", "unavailable"}


def test_selective_training_beats_dense_at_the_same_time_and_loses_nothing_to_the_exact_answer(run):
    quality = run[1]["workloads"]["spell"]["quality"]
    assert quality["selective"]["lo"] > quality["dense_equal_cpu"]["hi"]
    assert abs(quality["difference_to_exact"]["value"]) < 0.01
    assert run[1]["workloads"]["spell"]["agreement"]["value"] > 0.985


def test_macs_are_saved(run):
    entry = run[1]["workloads"]["spell"]
    assert entry["inference"]["batch_1"]["saving"]["macs"] > 15
    assert entry["training"]["saving"]["macs"] > 10


def test_the_page_stands_alone(run):
    page = run[2]
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert not re.search(r"(src|href)\s*=\s*[\"']https?:", page)
    assert "accommodate" in page


def test_a_second_run_redoes_nothing(run):
    folder = run[0]
    model = folder / "sparingly" / "spell-quick" / "model.safetensors"
    before = model.stat().st_mtime_ns
    done = sparingly(folder, "bench", "spell", "--quick", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["workloads"] == run[1]["workloads"]
    assert model.stat().st_mtime_ns == before


def test_predict_answers(run):
    done = sparingly(run[0], "predict", "spell", "recieve", "acomodate")
    assert done.returncode == 0, done.stderr
    assert "receive" in done.stdout and "of 20,000" in done.stdout


def test_predict_without_a_network_says_what_to_do(tmp_path):
    done = sparingly(tmp_path, "predict", "spell", "recieve")
    assert done.returncode == 2 and "sparingly bench spell" in done.stderr


def test_bench_refuses_what_it_does_not_have(tmp_path):
    refused = sparingly(tmp_path, "bench", "spell", "chess")
    assert refused.returncode == 2 and all(word in refused.stderr for word in ("'chess'", *cli.WORKLOADS))
    assert sparingly(tmp_path, "bench", "--quick", "--full").returncode == 2


def test_parts_are_kept_whole_or_not_at_all(tmp_path):
    parts = Parts(tmp_path / "x", "one")
    with pytest.raises(KeyboardInterrupt):
        parts.run("a", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert parts.run("a", lambda: [1, 2]) == [1, 2]
    assert Parts(tmp_path / "x", "one").run("a", lambda: [3]) == [1, 2]
    assert Parts(tmp_path / "x", "two").run("a", lambda: [3]) == [3]


def test_a_misspelling_is_not_its_own_correction():
    vocabulary = Vocabulary(3_000)
    classes = np.array([[5, 9], [5, 9]])
    own = vocabulary.words[5]
    assert other_than_typed(classes, [own, "zzz"], vocabulary).tolist() == [9, 5]


def test_wilson_interval():
    figure = spell.share(np.array([True] * 90 + [False] * 10))
    assert figure["value"] == pytest.approx(0.9)
    assert figure["lo"] == pytest.approx(0.8256, abs=1e-3) and figure["hi"] == pytest.approx(0.9448, abs=1e-3)


def test_paired_difference():
    a, b = np.array([1, 1, 0, 1], bool), np.array([1, 0, 0, 1], bool)
    figure = spell.difference(a, b)
    assert figure["value"] == 0.25 and figure["lo"] < 0 < figure["hi"]


def test_a_few_dense_and_selective_steps_learn():
    vocabulary = Vocabulary(1_000)
    dev, _ = misspellings(vocabulary)
    pairs = Pairs(dev.typed[:400], dev.classes[:400])

    def right(speller):
        best = exact_best(speller.eval(), speller.states(pairs.typed))
        return (other_than_typed(best, pairs.typed, vocabulary) == pairs.classes).mean()

    for train in ("dense", "selective"):
        speller = Speller(vocabulary, negatives=128)
        speller.name_classes()
        before = right(speller)
        if train == "dense":
            list(train_dense(speller, Recipe(20_000, batch=256), float("inf")))
        else:
            list(train_selective(speller, Recipe(20_000, batch=256)))
        assert right(speller) > before + 0.02
