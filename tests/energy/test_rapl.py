"""RAPL against counter traces in fake powercap trees laid out as Linux lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from sparingly.energy.meters.base import Reading
from sparingly.energy.meters.rapl import Rapl
from sparingly.energy.records import Record

RANGE = 262_143_328_850  # microjoules, as most Intel packages state


class Tree:
    """A powercap folder whose counters a trace moves: ``tree.set({"intel-rapl:0": 5_000_000})``."""

    def __init__(self, root: Path, zones: dict[str, str], *, range_uj: int = RANGE, vendor: str = "GenuineIntel"):
        self.root = root / "powercap"
        for key, name in zones.items():
            folder = self.root / key
            folder.mkdir(parents=True)
            (folder / "name").write_text(name + "\n")
            (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
        (self.root / "intel-rapl").mkdir(exist_ok=True)
        self.cpuinfo = root / "cpuinfo"
        self.cpuinfo.write_text(f"vendor_id\t: {vendor}\n")
        self.set(dict.fromkeys(zones, 0))

    def set(self, counters: Mapping[str, int]) -> None:
        for key, value in counters.items():
            (self.root / key / "energy_uj").write_text(f"{value}\n")

    def meter(self) -> Rapl:
        return Rapl(self.root, self.cpuinfo)

    def over(self, seconds: float, before: Mapping[str, int], after: Mapping[str, int]) -> Record:
        """The one record of a window of ``seconds`` between two states of the counters."""
        meter = self.meter()
        self.set(before)
        start = meter.read()
        self.set(after)
        end = meter.read()
        (record,) = meter.records(Reading(0.0, start.counters), Reading(seconds, end.counters))
        return record


LAPTOP = {
    "intel-rapl:0": "package-0",
    "intel-rapl:0:0": "core",
    "intel-rapl:0:1": "uncore",
    "intel-rapl:0:2": "dram",
    "intel-rapl:1": "psys",
    "intel-rapl-mmio:0": "package-0",
}


def test_package_and_dram_are_added_and_core_psys_and_mmio_left_out(tmp_path: Path):
    tree = Tree(tmp_path, LAPTOP)
    spent = dict(zip(LAPTOP, (100, 60, 20, 7, 400, 100), strict=True))
    after = {key: 50_000_000 + joules * 1_000_000 for key, joules in spent.items()}
    record = tree.over(10.0, dict.fromkeys(LAPTOP, 50_000_000), after)
    assert record.value == pytest.approx(107)
    assert (record.lo, record.hi) == pytest.approx((107 * 0.95, 107 * 1.05))
    assert (record.kind, record.source, record.scope) == ("measured", "rapl", "cpu packages + dram")
    assert (record.window_s, record.idle_policy) == (10.0, "gross")


def test_sockets_are_added(tmp_path: Path):
    tree = Tree(tmp_path, {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1"})
    before = {"intel-rapl:0": 9_000_000, "intel-rapl:1": 8_000_000_000}
    record = tree.over(10.0, before, {"intel-rapl:0": 99_000_000, "intel-rapl:1": 8_110_000_000})
    assert record.value == pytest.approx(90 + 110)
    assert record.scope == "cpu packages"


def test_two_sockets_with_near_counters_are_not_mirrors(tmp_path: Path):
    tree = Tree(tmp_path, {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1"})
    record = tree.over(10.0, dict.fromkeys(tree_keys(2), 0), dict.fromkeys(tree_keys(2), 100_000_000))
    assert record.value == pytest.approx(200)


def tree_keys(count: int) -> list[str]:
    return [f"intel-rapl:{i}" for i in range(count)]


def test_dies_that_mirror_a_counter_are_counted_once(tmp_path: Path):
    zones = {
        "intel-rapl:0": "package-0-die-0",
        "intel-rapl:0:0": "dram",
        "intel-rapl:1": "package-0-die-1",
        "intel-rapl:1:0": "dram",
    }
    tree = Tree(tmp_path, zones)
    before = dict(zip(zones, (70_000_000_000, 30_000_000_000, 70_000_003_000, 30_000_001_000), strict=True))
    after = dict(zip(zones, (70_500_000_000, 30_040_000_000, 70_500_004_000, 30_040_000_500), strict=True))
    assert tree.over(10.0, before, after).value == pytest.approx(540)


def test_dies_with_counters_of_their_own_are_added(tmp_path: Path):
    zones = {"intel-rapl:0": "package-0-die-0", "intel-rapl:1": "package-0-die-1"}
    tree = Tree(tmp_path, zones)
    before = {"intel-rapl:0": 70_000_000_000, "intel-rapl:1": 12_000_000_000}
    assert tree.over(10.0, before, {k: v + 500_000_000 for k, v in before.items()}).value == pytest.approx(1000)


def test_one_wrap_around_is_corrected(tmp_path: Path):
    tree = Tree(tmp_path, {"intel-rapl:0": "package-0"})
    record = tree.over(10.0, {"intel-rapl:0": RANGE - 40_000_000}, {"intel-rapl:0": 60_000_000})
    assert record.value == pytest.approx(100)


def test_a_window_that_could_wrap_twice_is_refused(tmp_path: Path):
    tree = Tree(tmp_path, {"intel-rapl:0": "package-0"}, range_uj=65_532_610_987)
    ends = ({"intel-rapl:0": 1_000_000}, {"intel-rapl:0": 101_000_000})
    refused = tree.over(120.0, *ends)
    assert refused.value is None
    assert "wrapped once more" in str(refused.reason)
    assert tree.over(60.0, *ends).value == pytest.approx(100)


def test_a_stated_power_limit_allows_longer_windows(tmp_path: Path):
    tree = Tree(tmp_path, {"intel-rapl:0": "package-0"}, range_uj=65_532_610_987)
    (tree.root / "intel-rapl:0" / "constraint_0_max_power_uw").write_text("45000000\n")
    ends = ({"intel-rapl:0": 1_000_000}, {"intel-rapl:0": 101_000_000})
    assert tree.over(120.0, *ends).value == pytest.approx(100)
    assert tree.over(1200.0, *ends).value is None


def test_short_windows_are_refused(tmp_path: Path):
    tree = Tree(tmp_path, {"intel-rapl:0": "package-0"})
    record = tree.over(0.5, {"intel-rapl:0": 0}, {"intel-rapl:0": 50_000_000})
    assert record.value is None
    assert "under 1 s" in str(record.reason)


def test_amd_is_less_certain(tmp_path: Path):
    tree = Tree(tmp_path, {"intel-rapl:0": "package-0"}, vendor="AuthenticAMD")
    record = tree.over(10.0, {"intel-rapl:0": 0}, {"intel-rapl:0": 100_000_000})
    assert (record.lo, record.hi) == pytest.approx((85, 115))


def test_permission_denied_is_unavailable_with_that_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree = Tree(tmp_path, {"intel-rapl:0": "package-0"})
    assert tree.meter().unavailable() is None
    read_text = Path.read_text

    # Not by file mode: root reads what nobody may.
    def guarded(self: Path, *args, **kwargs) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    reason = str(tree.meter().unavailable())
    assert "needs root" in reason
    assert "CVE-2020-8694" in reason
    assert "permission denied" in reason


def test_a_machine_without_powercap_or_packages_says_so(tmp_path: Path):
    assert "no powercap" in str(Rapl(tmp_path / "nowhere").unavailable())
    assert "no package zone" in str(Tree(tmp_path, {"dtpm:0": "dtpm"}).meter().unavailable())


def test_a_zone_that_disappears_is_no_zero(tmp_path: Path):
    tree = Tree(tmp_path, {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1"})
    meter = tree.meter()
    (record,) = meter.records(Reading(0.0, {"intel-rapl:0": 0, "intel-rapl:1": 0}), Reading(10.0, {"intel-rapl:0": 5}))
    assert record.value is None
    assert "came or went" in str(record.reason)
