"""Modelled energy: the ledger's counts times published energy per operation.

Arithmetic-unit and memory-array costs, not system costs (a CPU spends some 30 times more per fp32 MAC), so
every figure comes as two bounds: all bytes from SRAM, all bytes from DRAM.

Source: N. P. Jouppi et al., "Ten Lessons From Three Generations Shaped Google's TPUv4i", ISCA 2021, table 2,
which updates M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014.

    @inproceedings{jouppi2021ten, title={Ten Lessons From Three Generations Shaped {Google}'s {TPUv4i}},
      author={Jouppi, Norman P. and others}, booktitle={ISCA}, year={2021}, doi={10.1109/ISCA52012.2021.00010}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparingly.energy.ledger import MIN_COVERAGE, Entry, Ledger
from sparingly.energy.records import Record, unavailable

__all__ = ["TABLE_VERSION", "Ratio", "modelled", "modelled_ratio"]

TABLE_VERSION = "jouppi-isca-2021-table-2/1"
Node = Literal["7nm", "45nm"]
Device = Literal["cpu", "accelerator"]

ADD_PJ: dict[str, dict[str, float]] = {
    "45nm": {"int8": 0.03, "int32": 0.1, "float16": 0.4, "float32": 0.9},
    "7nm": {"int8": 0.007, "int32": 0.03, "bfloat16": 0.11, "float16": 0.16, "float32": 0.38},
}
"""pJ per addition."""

MULTIPLY_PJ: dict[str, dict[str, float]] = {
    "45nm": {"int8": 0.2, "int32": 3.1, "float16": 1.1, "float32": 3.7},
    "7nm": {"int8": 0.07, "int32": 1.48, "bfloat16": 0.21, "float16": 0.34, "float32": 1.31},
}
"""pJ per multiplication."""

SRAM_PJ_PER_BYTE: dict[str, dict[str, float]] = {
    "45nm": {"8KB": 1.25, "32KB": 2.5, "1MB": 12.5},
    "7nm": {"8KB": 0.94, "32KB": 1.06, "1MB": 1.75},
}

DRAM_PJ_PER_BYTE = {"ddr4": 162.5, "hbm2": 43.5, "lpddr4": 64.0}
"""HBM2 is given as 31-56: the middle stands here, its spread is far inside the uncertainty."""

# Accumulators are wider than the operands: int8 products add up in int32, 16-bit floats in fp32.
_ACCUMULATOR = {"int8": "int32", "float16": "float32", "bfloat16": "float32"}
# The widest integer in the table stands for all others; booleans are bytes.
_PRICED_AS = {"uint8": "int8", "bool": "int8", "qint8": "int8", "quint8": "int8", "int16": "int32", "int64": "int32"}
_UNCERTAINTY: dict[str, float] = {"cpu": 30.0, "accelerator": 5.0}
_RATIO_UNCERTAINTY = 0.25


def _arithmetic_pj(entry: Entry, dtype: str, node: Node) -> float | None:
    """pJ of an entry's arithmetic, None if the table has no price for its dtype."""
    name = _PRICED_AS.get(dtype, dtype)
    add, multiply = ADD_PJ[node], MULTIPLY_PJ[node]
    if not entry.macs and not entry.other:
        return 0.0
    if name not in add:
        return None
    return entry.macs * (multiply[name] + add[_ACCUMULATOR.get(name, name)]) + entry.other * add[name]


def _check(ledger: Ledger, node: Node) -> tuple[float, float, str | None]:
    """(pJ of priced arithmetic, coverage in 0..1, reason why no figure may be given or None)."""
    pj, priced, arithmetic = 0.0, 0, 0
    without = set()
    for (_, dtype), entry in ledger.entries.items():
        cost = _arithmetic_pj(entry, dtype, node)
        arithmetic += entry.macs + entry.other
        if cost is None:
            without.add(dtype)
        else:
            pj += cost
            priced += entry.macs + entry.other
    if not ledger.entries and not ledger.unknown:
        return 0.0, 0.0, "the ledger is empty"
    coverage = ledger.coverage * (priced / arithmetic if arithmetic else 1.0)
    if coverage >= MIN_COVERAGE:
        return pj, coverage, None
    causes = [f"unknown operations {sorted({op for op, _ in ledger.unknown})}"] if ledger.unknown else []
    causes += [f"no {node} price for {sorted(without)}"] if without else []
    return (
        pj,
        coverage,
        f"the ledger covers {coverage:.1%} of the work, {MIN_COVERAGE:.0%} is needed: {', '.join(causes)}",
    )


def _bounds_pj(ledger: Ledger, pj: float, node: Node, device: Device) -> dict[str, float]:
    """pJ with every byte from SRAM and with every byte from DRAM, by scope name."""
    dram = "ddr4" if device == "cpu" else "hbm2"
    size = ledger.bytes
    return {
        "all bytes from SRAM (1 MB)": pj + size * SRAM_PJ_PER_BYTE[node]["1MB"],
        f"all bytes from DRAM ({dram})": pj + size * DRAM_PJ_PER_BYTE[dram],
    }


def _check_names(node: str, device: str) -> None:
    if node not in ADD_PJ:
        raise ValueError(f"node must be one of {sorted(ADD_PJ)}, got {node!r}")
    if device not in _UNCERTAINTY:
        raise ValueError(f"device must be one of {sorted(_UNCERTAINTY)}, got {device!r}")


def modelled(ledger: Ledger, *, node: Node = "7nm", device: Device = "cpu") -> tuple[Record, Record]:
    """Modelled joules of what the ledger counted: (all bytes from SRAM, all bytes from DRAM).

    ``lo`` and ``hi`` are the value ÷ and × 30 on a CPU (DDR4) or 5 on an accelerator (HBM2). Under 95 % coverage,
    or where arithmetic in unpriced dtypes (float64) takes coverage below that, both are unavailable and say why.
    Raises ValueError for an unknown node or device.
    """
    _check_names(node, device)
    pj, coverage, reason = _check(ledger, node)
    factor = _UNCERTAINTY[device]
    records = []
    for scope, bound in _bounds_pj(ledger, pj, node, device).items():
        source = f"ledger x price table, {node}"
        more = {"coverage": coverage, "table_version": TABLE_VERSION}
        if reason:
            records.append(unavailable(source, scope, reason, **more))
        else:
            value = bound * 1e-12
            records.append(Record(value, value / factor, value * factor, "modelled", source, scope, n=1, **more))
    return records[0], records[1]


@dataclass(frozen=True)
class Ratio:
    """A saving as a ratio, dense ÷ selective; None with a ``reason`` where it cannot be said."""

    value: float | None
    lo: float | None
    hi: float | None
    scope: str
    reason: str | None = None


def modelled_ratio(
    dense: Ledger, selective: Ledger, *, node: Node = "7nm", device: Device = "cpu"
) -> tuple[Ratio, ...]:
    """Modelled energy of ``dense`` ÷ ``selective`` for both bounds, ±25 % while operands stay in one memory level."""
    _check_names(node, device)
    checks = [_check(side, node) for side in (dense, selective)]
    bounds = [_bounds_pj(side, pj, node, device) for side, (pj, _, _) in zip((dense, selective), checks, strict=True)]
    reason = checks[0][2] or checks[1][2]
    ratios = []
    for scope, top in bounds[0].items():
        bottom = bounds[1][scope]
        why = reason or (None if bottom else "the selective side did no priced work")
        value = None if why else top / bottom
        lo, hi = (None, None) if value is None else (value * (1 - _RATIO_UNCERTAINTY), value * (1 + _RATIO_UNCERTAINTY))
        ratios.append(Ratio(value, lo, hi, scope, why))
    return tuple(ratios)
