"""Reading a result file: what is there, what is missing, what is refused."""

import json
from pathlib import Path

import pytest

from sparingly.report import findings, result
from sparingly.report.result import Interval
from sparingly.report.text import figure, percent_interval, seconds, times_interval

SAMPLE = Path(__file__).with_name("sample.json")


@pytest.fixture
def raw() -> dict:
    return json.loads(SAMPLE.read_text(encoding="utf-8"))


def spell(raw: dict) -> result.Workload:
    return result.parse(raw).workloads[0]


def test_headline_is_the_smallest_over_jobs_precisions_and_rulers(raw):
    workload = spell(raw)
    assert workload.smallest is not None
    assert (workload.smallest.job, workload.smallest.precision) == ("best_batch", "int8")
    assert workload.smallest.smallest == ("cpu_s", Interval(7.2, 6.7, 7.8))
    raw["workloads"]["spell"]["training"]["saving"]["bytes"] = 3.5
    assert findings.headline(spell(raw)) == "3.5× is the smallest saving (training, fp32 both, bytes)"


@pytest.mark.parametrize("schema", [None, 0, 2, "1"])
def test_another_schema_is_refused(raw, schema):
    with pytest.raises(ValueError, match=r"schema 1, got"):
        result.parse({**raw, "schema": schema})


@pytest.mark.parametrize("raw_file", [[], "x", None, {"schema": 1}, {"schema": 1, "workloads": []}])
def test_what_is_no_result_is_refused(raw_file):
    with pytest.raises(ValueError, match="result file must"):
        result.parse(raw_file)


@pytest.mark.parametrize(
    "missing", [None, float("nan"), float("inf"), "12", True, {}, {"value": None, "lo": 0, "hi": 1}]
)
def test_a_missing_figure_is_none_and_never_zero(missing):
    assert Interval.of(missing) is None


def test_a_zero_is_a_figure():
    assert Interval.of(0) == Interval(0.0)


def test_a_workload_with_nothing_in_it_has_no_figures_and_says_what_was_not_measured():
    workload = spell({"schema": 1, "workloads": {"spell": {}}})
    assert workload.methods == [] and workload.savings == [] and workload.smallest is None
    assert findings.headline(workload) == "No saving was measured."
    assert findings.quiet_jobs(workload) == ["training", "one input at a time", "each at its best batch"]


def test_the_sample_has_no_loss(raw):
    assert findings.losses(spell(raw)) == []


def _dearer_than_dense(entry):
    entry["inference"]["best_batch"]["saving_int8"]["cpu_s"] = {"value": 0.8, "lo": 0.7, "hi": 0.9}


def _unsure(entry):
    entry["inference"]["best_batch"]["saving_int8"]["cpu_s"] = {"value": 1.2, "lo": 0.9, "hi": 1.5}


def _worse_than_incumbent(entry):
    entry["quality"]["incumbents"]["symspellpy"].update(value=0.9, lo=0.89, hi=0.91)


def _slower_than_incumbent(entry):
    entry["quality"]["incumbents"]["symspellpy"]["cpu_s"] = 1e-5


def _worse_at_convergence(entry):
    entry["converged_20k"]["dense"].update(value=0.95, lo=0.945, hi=0.955)


def _broken_rig(entry):
    entry["null_test"] = {"value": 1.05, "lo": 1.02, "hi": 1.08}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_dearer_than_dense, "each at its best batch, int8 both: processor time 0.80×"),
        (_unsure, "not shown to be a saving"),
        (_worse_than_incumbent, "−5.9 points against symspellpy"),
        (_slower_than_incumbent, "12× the processor time of symspellpy"),
        (_worse_at_convergence, "−2.1 points against dense at 20,000 classes"),
        (_broken_rig, "null test leaves out 1"),
    ],
)
def test_each_kind_of_loss_is_found(raw, spoil, words):
    spoil(raw["workloads"]["spell"])
    found = findings.losses(spell(raw))
    assert len(found) == 1 and words in found[0]


def test_growth_is_over_the_last_tenfold(raw):
    assert findings.growth(spell(raw)) == "300,000 to 3,000,000 classes: selective cost grows 1.4×, dense 10×"


@pytest.mark.parametrize(
    ("value", "words"), [(0.834, "0.83"), (2.14, "2.1"), (31.4, "31"), (212.4, "212"), (4120.6, "4,121"), (9.97, "10")]
)
def test_figures_keep_the_digits_that_mean_something(value, words):
    assert figure(value) == words


@pytest.mark.parametrize(
    ("time_s", "words"), [(459.0, "459 s"), (1.0, "1 s"), (0.0256, "26 ms"), (1.2e-4, "120 µs"), (3e-9, "3 ns")]
)
def test_seconds_take_the_unit_that_fits(time_s, words):
    assert seconds(time_s) == words


def test_an_interval_stands_beside_its_value_only_where_there_is_one():
    assert times_interval(Interval(212, 197, 229)) == "212× [197, 229]"
    assert times_interval(Interval(840)) == "840×"
    assert percent_interval(Interval(0.784, 0.78, 0.788)) == "78.4 % [78.0, 78.8]"
