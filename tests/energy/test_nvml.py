"""NVML against a fake library."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from sparingly.energy.meters.base import Reading
from sparingly.energy.meters.nvml import Nvml


class NVMLError(Exception):
    pass


class FakeLibrary:
    """pynvml's functions over a list of energy counters in millijoules; None is a card without a counter."""

    NVMLError = NVMLError

    def __init__(self, *counters: int | None, mig: bool = False, processes: int = 0, driver: bool = True):
        self.counters: Sequence[int | None] = counters
        self.mig, self.processes, self.driver = mig, processes, driver

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.counters)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"Fake H100"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        counter = self.counters[handle]
        if counter is None:
            raise NVMLError("Not Supported")
        return counter

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        if not self.mig:
            raise NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[int]:
        return list(range(self.processes))


def meter(library: FakeLibrary, synchronized: list[bool] | None = None) -> Nvml:
    return Nvml(library, lambda: None if synchronized is None else synchronized.append(True))


def over(library: FakeLibrary, seconds: float, *after: int):
    nvml = meter(library)
    start = nvml.read()
    library.counters = after
    end = nvml.read()
    return nvml.records(Reading(0.0, start.counters), Reading(seconds, end.counters))


def test_millijoules_become_joules_with_the_update_error():
    (record,) = over(FakeLibrary(1_000_000), 20.0, 3_000_000)
    assert record.value == pytest.approx(2000)
    error = 0.05 + 0.1 / 20
    assert (record.lo, record.hi) == pytest.approx((2000 * (1 - error), 2000 * (1 + error)))
    assert (record.kind, record.scope) == ("measured", "gpu0 Fake H100")


def test_windows_under_ten_seconds_are_refused():
    (short,) = over(FakeLibrary(0), 9.9, 1_000_000)
    assert short.value is None
    assert "under 10 s" in str(short.reason)
    (enough,) = over(FakeLibrary(0), 10.0, 1_000_000)
    assert enough.value == pytest.approx(1000)


def test_each_gpu_has_its_record():
    records = over(FakeLibrary(0, 0), 10.0, 1_000, 2_000)
    assert [record.value for record in records] == pytest.approx([1, 2])
    assert len({record.scope for record in records}) == 2


def test_a_card_without_a_counter_is_missing_and_the_other_counted():
    library = FakeLibrary(0, None)
    nvml = meter(library)
    start = nvml.read()
    library.counters = (5_000, None)
    records = nvml.records(Reading(0.0, start.counters), Reading(10.0, nvml.read().counters))
    assert [record.value for record in records] == [5.0, None]
    assert "no energy counter" in str(records[1].reason)


def test_the_device_is_synchronised_before_each_reading():
    calls: list[bool] = []
    nvml = meter(FakeLibrary(0), calls)
    nvml.read()
    nvml.read()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "library, word",
    [
        (FakeLibrary(0, driver=False), "Driver Not Loaded"),
        (FakeLibrary(), "no NVIDIA GPU"),
        (FakeLibrary(None), "no energy counter"),
        (FakeLibrary(0, mig=True), "MIG"),
        (FakeLibrary(0, processes=2), "2 processes share"),
    ],
)
def test_what_cannot_be_measured_says_why(library: FakeLibrary, word: str):
    assert word in str(meter(library).unavailable())


def test_one_own_process_is_no_sharing():
    assert meter(FakeLibrary(0, processes=1)).unavailable() is None


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "sparingly[energy]" in str(Nvml().unavailable())


def test_a_counter_that_goes_backwards_is_refused():
    (record,) = over(FakeLibrary(5_000), 10.0, 1_000)
    assert record.value is None
    assert "backwards" in str(record.reason)
