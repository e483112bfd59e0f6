"""Meters read hardware energy counters; one file per kind of counter."""

from sparingly.energy.meters.base import Meter, Reading
from sparingly.energy.meters.nvml import Nvml
from sparingly.energy.meters.rapl import Rapl

__all__ = ["Meter", "Nvml", "Rapl", "Reading", "default_meters"]


def default_meters() -> list[Meter]:
    """One meter per kind that Sparingly knows; each says for itself what it cannot measure here."""
    return [Rapl(), Nvml()]
