"""Records keep their class; modelled energy follows the published table or refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparingly.energy.grid import GRID_G_PER_KWH, carbon, money
from sparingly.energy.ledger import Entry, Ledger
from sparingly.energy.prices import modelled, modelled_ratio
from sparingly.energy.records import Record, ResultClass, unavailable

KINDS: tuple[ResultClass, ...] = ("measured", "modelled", "estimated", "unavailable")


def make(kind: ResultClass, value: float = 2.0, **more) -> Record:
    if kind == "unavailable":
        return unavailable("test", "cpu", "no counter", **more)
    return Record(value, value / 2, value * 2, kind, "test", more.pop("scope", "cpu"), **more)


def book(op: str = "sparingly::gather_dot", dtype: str = "float32", **counts: int) -> Ledger:
    ledger = Ledger()
    ledger.add(op, dtype, Entry(**{"calls": 1, **counts}))
    return ledger


@pytest.mark.parametrize("a", KINDS)
@pytest.mark.parametrize("b", KINDS)
def test_classes_are_never_added(a: ResultClass, b: ResultClass):
    if a == b:
        assert (make(a) + make(b)).kind == a
    else:
        with pytest.raises(TypeError, match="never added"):
            _ = make(a) + make(b)


def test_sum_is_no_way_round():
    with pytest.raises(TypeError):
        sum([make("measured"), make("modelled")])  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_adding_scopes_keeps_the_window_and_adding_windows_adds_it():
    cpu, gpu = make("measured", window_s=10.0, n=1), make("measured", scope="gpu0", window_s=10.0, n=1)
    both = cpu + gpu
    assert (both.value, both.lo, both.hi, both.window_s, both.n, both.scope) == (4.0, 2.0, 8.0, 10.0, 1, "cpu + gpu0")
    assert (cpu + cpu).window_s == 20.0


@pytest.mark.parametrize("field, other", [("unit", "gCO2e"), ("idle_policy", "net"), ("table_version", "other")])
def test_unlike_records_of_one_class_are_refused(field: str, other: str):
    with pytest.raises(ValueError, match=field):
        _ = make("modelled") + replace(make("modelled"), **{field: other})


def test_missing_is_none_never_zero():
    record = unavailable("rapl", "cpu", "needs root")
    assert (record.value, record.lo, record.hi) == (None, None, None)
    assert record.as_dict()["class"] == "unavailable"
    assert record.times(3).value is None
    with pytest.raises(ValueError, match="reason"):
        Record(0.0, 0.0, 0.0, "unavailable", "rapl", "cpu", reason="needs root")
    with pytest.raises(ValueError, match="reason"):
        Record(None, None, None, "unavailable", "rapl", "cpu")


@pytest.mark.parametrize("figures", [(None, None, None), (float("nan"), 0, 1), (2.0, 3.0, 4.0), (2.0, 1.0, None)])
def test_records_without_a_sound_figure_are_refused(figures):
    with pytest.raises(ValueError, match="needs"):
        value, lo, hi = figures
        Record(value, lo, hi, "measured", "rapl", "cpu")


def test_json_has_the_keys_of_the_specification():
    keys = {"value", "lo", "hi", "class", "source", "scope", "window_s", "n", "idle_policy", "coverage"}
    keys |= {"table_version", "reason"}
    assert keys <= make("measured").as_dict().keys()


def test_modelled_energy_of_fp32_macs_by_hand():
    sram, dram = modelled(book(macs=1000, other=10, bytes_read=300, bytes_written=100))
    arithmetic = 1000 * (1.31 + 0.38) + 10 * 0.38
    assert sram.value == pytest.approx((arithmetic + 400 * 1.75) * 1e-12)
    assert dram.value == pytest.approx((arithmetic + 400 * 162.5) * 1e-12)
    assert dram.value is not None
    assert (dram.lo, dram.hi) == pytest.approx((dram.value / 30, dram.value * 30))
    assert (sram.kind, sram.coverage) == ("modelled", 1.0)
    assert sram.table_version


def test_int8_products_add_up_in_int32_and_bf16_in_fp32():
    assert modelled(book(dtype="int8", macs=1))[0].value == pytest.approx((0.07 + 0.03) * 1e-12)
    assert modelled(book(dtype="bfloat16", macs=1))[0].value == pytest.approx((0.21 + 0.38) * 1e-12)
    assert modelled(book(dtype="int8", macs=1), node="45nm")[0].value == pytest.approx((0.2 + 0.1) * 1e-12)


def test_an_accelerator_is_less_uncertain_and_reads_hbm():
    _, dram = modelled(book(bytes_read=1000), device="accelerator")
    assert dram.value is not None
    assert 31e-9 <= dram.value <= 56e-9
    assert dram.hi == pytest.approx(5 * dram.value)


def test_coverage_under_95_percent_refuses_joules_and_names_the_operation():
    ledger = book(macs=10, bytes_read=94)
    ledger.add("other::mystery", "float32", Entry(bytes_read=6, calls=0), known=False)
    for record in modelled(ledger):
        assert record.value is None
        assert "94.0%" in str(record.reason)
        assert "mystery" in str(record.reason)
    ledger.add("aten::mm", "float32", Entry(bytes_read=100, calls=100))
    assert modelled(ledger)[0].value is not None


def test_dtypes_without_a_price_refuse_too():
    assert "float64" in str(modelled(book(dtype="float64", macs=10))[0].reason)
    assert "bfloat16" in str(modelled(book(dtype="bfloat16", macs=10), node="45nm")[0].reason)
    assert modelled(book(dtype="float64", bytes_read=10))[0].value is not None


def test_an_empty_ledger_has_no_energy():
    assert modelled(Ledger())[0].value is None


def test_unknown_names_are_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="45nm"):
        modelled(book(macs=1), node="3nm")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="accelerator"):
        modelled(book(macs=1), device="tpu")  # pyright: ignore[reportArgumentType]


def test_modelled_ratio_has_a_quarter_of_uncertainty_and_needs_both_sides():
    sram, dram = modelled_ratio(book(bytes_read=1000), book(bytes_read=10))
    assert (dram.value, dram.lo, dram.hi) == pytest.approx((100, 75, 125))
    assert sram.value == pytest.approx(100)
    low = Ledger()
    low.add("other::mystery", "float32", Entry(bytes_read=6, calls=1), known=False)
    assert modelled_ratio(book(bytes_read=1000), low)[0].value is None


def test_carbon_by_region_by_number_and_with_pue():
    energy = make("modelled", 3.6e6)
    world = carbon(energy, "WORLD")
    assert world.value == pytest.approx(GRID_G_PER_KWH["WORLD"])
    assert "2024" in world.scope
    assert (world.kind, world.unit) == ("modelled", "gCO2e")
    assert carbon(energy, 100.0, pue=1.5).value == pytest.approx(150)
    assert carbon(unavailable("rapl", "cpu", "needs root"), "DEU").value is None


def test_money_at_a_stated_price():
    assert money(make("measured", 7.2e6), 0.3, "EUR").value == pytest.approx(0.6)


@pytest.mark.parametrize("where, pue, word", [("ATLANTIS", 1.0, "known: WORLD"), (-1, 1.0, ">= 0"), (1, 0.9, ">= 1")])
def test_bad_grids_are_refused(where: str | float, pue: float, word: str):
    with pytest.raises(ValueError, match=word):
        carbon(make("measured"), where, pue=pue)


def test_carbon_of_carbon_is_refused():
    with pytest.raises(ValueError, match="needs a record in J"):
        carbon(carbon(make("measured"), "EU"), "EU")


def test_per_item():
    record = make("measured", 50.0).per(100, "query")
    assert (record.value, record.unit, record.n) == (0.5, "J/query", 100)
    with pytest.raises(ValueError, match="at least 1"):
        make("measured").per(0, "query")
