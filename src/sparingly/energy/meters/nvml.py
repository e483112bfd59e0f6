"""GPU energy through NVML's total energy counter (Volta and later), with ``nvidia-ml-py``.

The counter is updated about every 100 ms, so a window of T seconds is off by up to 0.1/T beside the sensor's own
5 %: windows under 10 s are refused (on what NVML samples: Yang, Adamek, Armour, "Part-time Power Measurements:
nvidia-smi's Lack of Attention", arXiv 2312.02741). The figure is the whole card's: partitioned (MIG) and shared
cards are refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sparingly.energy.meters.base import Meter, Reading
from sparingly.energy.records import Record, unavailable

__all__ = ["Nvml"]

_SENSOR_ERROR = 0.05
_UPDATE_S = 0.1


def _synchronize() -> None:
    """Wait for queued work; a process that never used the GPU is not made to."""
    import torch

    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)


class Nvml(Meter):
    """Joules per NVIDIA GPU of the machine. ``library`` is a module with pynvml's functions, imported when None."""

    source = "nvml"
    min_window_s = 10.0

    def __init__(self, library: Any = None, synchronize: Callable[[], None] = _synchronize):
        self._library = library
        self._synchronize = synchronize
        self._ready = False

    def _open(self) -> tuple[Any, str | None]:
        """(library, None) once it is initialised, else (None, reason)."""
        if self._library is None:
            try:
                import pynvml
            except ImportError:
                return None, 'nvidia-ml-py is not installed: pip install "sparingly[energy]"'
            self._library = pynvml
        if not self._ready:
            try:
                self._library.nvmlInit()
            except self._library.NVMLError as error:
                return None, f"NVML does not start: {error}"
            self._ready = True
        return self._library, None

    def _gpus(self, library: Any) -> list[tuple[str, Any]]:
        handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
        return [(f"gpu{i} {_name(library, handle)}", handle) for i, handle in enumerate(handles)]

    def unavailable(self) -> str | None:
        """Why no GPU can be measured: no library, no driver, no GPU, or no counter on any."""
        library, reason = self._open()
        if reason:
            return reason
        reasons = [_refusal(library, handle) for _, handle in self._gpus(library)]
        if not reasons:
            return "no NVIDIA GPU"
        return None if None in reasons else str(reasons[0])

    def scopes(self) -> list[str]:
        """``gpu<i> <name>`` for each GPU, ``["gpu"]`` where there is none."""
        library, reason = self._open()
        return ["gpu"] if reason else [name for name, _ in self._gpus(library)] or ["gpu"]

    def read(self) -> Reading:
        """Millijoules per GPU that has a counter."""
        library, reason = self._open()
        if reason:
            raise OSError(reason)
        self._synchronize()
        at_s = time.monotonic()
        usable = [(name, handle) for name, handle in self._gpus(library) if _refusal(library, handle) is None]
        return Reading(at_s, {name: library.nvmlDeviceGetTotalEnergyConsumption(handle) for name, handle in usable})

    def records(self, start: Reading, end: Reading) -> list[Record]:
        """One record per GPU of the machine."""
        library, reason = self._open()
        window_s = end.at_s - start.at_s
        more = {"window_s": window_s, "idle_policy": "gross"}
        if reason:
            return [unavailable(self.source, "gpu", reason, **more)]
        found = []
        for name, handle in self._gpus(library):
            why = _refusal(library, handle)
            if why is None and window_s < self.min_window_s:
                why = f"window of {window_s:.3g} s is under {self.min_window_s:g} s (the counter moves every 0.1 s)"
            if why is None and not (name in start.counters and name in end.counters):
                why = "no counter at one end of the window (shared, partitioned or lost meanwhile)"
            if why is None and end.counters[name] < start.counters[name]:
                why = "the counter went backwards (driver reloaded)"
            if why:
                found.append(unavailable(self.source, name, why, **more))
                continue
            value = (end.counters[name] - start.counters[name]) / 1000
            error = min(1.0, _SENSOR_ERROR + _UPDATE_S / window_s)
            bounds = (value * (1 - error), value * (1 + error))
            found.append(Record(value, *bounds, "measured", self.source, name, n=1, **more))
        return found


def _name(library: Any, handle: Any) -> str:
    name = library.nvmlDeviceGetName(handle)
    return name.decode() if isinstance(name, bytes) else str(name)


def _refusal(library: Any, handle: Any) -> str | None:
    """Why this GPU's counter cannot be used, or None."""
    try:
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except library.NVMLError as error:
        return f"no energy counter: {error}"
    try:
        if library.nvmlDeviceGetMigMode(handle)[0]:
            return "MIG is on: the counter is the whole card's"
    except (library.NVMLError, AttributeError):
        pass  # Cards without MIG answer "not supported".
    try:
        processes = len(library.nvmlDeviceGetComputeRunningProcesses(handle))
    except (library.NVMLError, AttributeError):
        processes = 0
    # Process ids do not match across containers, so only their number is judged.
    return f"{processes} processes share this GPU" if processes > 1 else None
