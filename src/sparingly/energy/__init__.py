"""Counting and measuring: the ledger (MACs and bytes that really ran), prices, meters (joules from counters).

Nothing here is touched on import: counters are looked for when something is measured.
"""

from sparingly.energy.grid import carbon, money
from sparingly.energy.ledger import Entry, Ledger, active, count, record
from sparingly.energy.machine import commit, machine_info, versions
from sparingly.energy.measurement import Measurement, measure, measure_command
from sparingly.energy.prices import modelled, modelled_ratio
from sparingly.energy.records import Record, unavailable

__all__ = [
    "Entry",
    "Ledger",
    "Measurement",
    "Record",
    "active",
    "carbon",
    "commit",
    "count",
    "machine_info",
    "measure",
    "measure_command",
    "modelled",
    "modelled_ratio",
    "money",
    "record",
    "unavailable",
    "versions",
]
