"""Joules as grams of CO2-equivalent and as money. No network call, ever.

Grid intensities: Ember, Yearly Electricity Data (life-cycle emissions per kWh generated), year 2024, as published
by August 2025, https://ember-energy.org/data/yearly-electricity-data/, CC BY 4.0. Yearly averages of production:
they say nothing about the hour of a run or about a contract; pass a number where a better one is known.
"""

from __future__ import annotations

import math

from sparingly.energy.records import Record

__all__ = ["GRID_G_PER_KWH", "GRID_SOURCE", "carbon", "money"]

GRID_YEAR = 2024
GRID_SOURCE = f"Ember Yearly Electricity Data {GRID_YEAR} (CC BY 4.0)"

GRID_G_PER_KWH: dict[str, float] = {
    "WORLD": 472.94,
    "EU": 213.02,
    "ARG": 344.83,
    "AUS": 553.76,
    "AUT": 102.62,
    "BEL": 117.58,
    "BRA": 106.06,
    "CAN": 184.99,
    "CHE": 36.72,
    "CHL": 265.52,
    "CHN": 557.5,
    "CZE": 413.86,
    "DEU": 342.06,
    "DNK": 143.3,
    "ESP": 146.15,
    "EST": 341.02,
    "FIN": 72.25,
    "FRA": 44.18,
    "GBR": 215.79,
    "GRC": 319.76,
    "HUN": 182.82,
    "IND": 708.96,
    "IRL": 279.79,
    "ITA": 287.75,
    "JPN": 483.73,
    "KOR": 415.65,
    "LUX": 134.62,
    "MEX": 483.14,
    "NLD": 252.7,
    "NOR": 30.75,
    "NZL": 120.11,
    "POL": 614.98,
    "PRT": 111.8,
    "ROU": 245.55,
    "SGP": 498.74,
    "SVK": 96.49,
    "SWE": 35.89,
    "TUR": 469.7,
    "TWN": 635.15,
    "USA": 383.55,
    "ZAF": 713.9,
}
"""gCO2e per kWh in 2024 by ISO 3166 alpha-3 code, EU and WORLD."""

_J_PER_KWH = 3.6e6


def _at_least(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name} must be finite and >= {least:g}, got {value}")


def carbon(energy: Record, where: str | float, *, pue: float = 1.0) -> Record:
    """Grams of CO2-equivalent of ``energy`` (joules), in the same class and with its relative interval.

    ``where``: a key of :data:`GRID_G_PER_KWH` (yearly average) or your own gCO2e per kWh. ``pue``: facility energy
    per unit of IT energy, 1.0 unless you know it. The grid figure's own error is not in the interval.
    Raises ValueError for an unknown region, a negative intensity, a PUE under 1 or a record not in joules.
    """
    if isinstance(where, str):
        if where.upper() not in GRID_G_PER_KWH:
            known = ", ".join(GRID_G_PER_KWH)
            raise ValueError(f"no grid intensity for {where!r}; known: {known}; or pass gCO2e per kWh as a number")
        intensity, source = GRID_G_PER_KWH[where.upper()], f"{where.upper()} {GRID_SOURCE}"
    else:
        _at_least("gCO2e per kWh", where, 0)
        intensity, source = float(where), f"{where:g} g/kWh given"
    _at_least("pue", pue, 1)
    scope = f"{energy.scope}; {source}, PUE {pue:g}"
    return _joules(energy).times(intensity * pue / _J_PER_KWH, unit="gCO2e", scope=scope)


def money(energy: Record, price_per_kwh: float, currency: str, *, pue: float = 1.0) -> Record:
    """Cost of ``energy`` (joules) at a stated price per kWh. Raises ValueError for a price under 0 or a PUE under 1."""
    _at_least("price_per_kwh", price_per_kwh, 0)
    _at_least("pue", pue, 1)
    scope = f"{energy.scope}; {price_per_kwh:g} {currency}/kWh, PUE {pue:g}"
    return _joules(energy).times(price_per_kwh * pue / _J_PER_KWH, unit=currency, scope=scope)


def _joules(energy: Record) -> Record:
    if energy.unit != "J":
        raise ValueError(f"needs a record in J, got {energy.unit!r}; convert before dividing by items")
    return energy
