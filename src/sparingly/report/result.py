"""A result file as `sparingly bench --json` writes it, read into a few plain types that every view shares.

Fixed keys are those of schema 1 (docs/benchmark.md lists them). A part that is absent shows as absent, never as zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

SCHEMA = 1
RULERS = {"cpu_s": "processor time", "macs": "MACs", "bytes": "bytes", "energy_j": "joules"}
JOBS = {"training": "training", "batch_1": "one input at a time", "best_batch": "each at its best batch"}
PRECISIONS = {"saving": "fp32", "saving_int8": "int8"}


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; `lo` and `hi` are None for a count that has none."""

    value: float
    lo: float | None = None
    hi: float | None = None

    @classmethod
    def of(cls, raw: Any) -> Interval | None:
        """`raw` a number, {"value", "lo", "hi"} or None -> Interval, or None where there is no finite value."""
        entry = raw if isinstance(raw, Mapping) else {"value": raw}
        value, lo, hi = (number(entry.get(key)) for key in ("value", "lo", "hi"))
        return None if value is None else cls(value, lo, hi)

    @property
    def bounds(self) -> tuple[float, float]:
        """(lo, hi), the value itself standing in for a bound that is missing."""
        return (self.value if self.lo is None else self.lo, self.value if self.hi is None else self.hi)


@dataclass(frozen=True)
class Saving:
    """Dense cost / selective cost for one job at one precision, by ruler; keys of `rulers` are those of RULERS."""

    job: str
    precision: str
    rulers: dict[str, Interval]
    engine: str | None = None

    @property
    def smallest(self) -> tuple[str, Interval]:
        """The ruler that saves least, and its figure: what may be a headline."""
        return min(self.rulers.items(), key=lambda item: item[1].value)

    @property
    def name(self) -> str:
        """For a sentence: `training, fp32 both`."""
        return f"{JOBS[self.job]}, {self.precision} both"


@dataclass(frozen=True)
class Method:
    """One method's quality, and where known what an answer at batch 1 and its training cost."""

    name: str
    kind: str  # "selective" | "exact" | "dense" | "incumbent"
    quality: Interval
    answer_cpu_s: float | None = None
    training_cpu_s: float | None = None
    answer_energy_j: Interval | None = None


@dataclass(frozen=True)
class Workload:
    """One entry of `workloads`; `raw` keeps the parts that only one view reads."""

    name: str
    num_classes: int | None
    metric: str
    unit: str | None  # None: a share
    lower_is_better: bool
    num_tested: int | None
    methods: list[Method]
    converged: list[Method]
    agreement: Interval | None
    savings: list[Saving]
    null_test: Interval | None
    raw: Mapping[str, Any] = field(repr=False)

    def method(self, kind: str) -> Method | None:
        """The first method of `kind`, or None."""
        return next((method for method in self.methods if method.kind == kind), None)

    @property
    def smallest(self) -> Saving | None:
        """The saving that is smallest over every job, precision and ruler, or None where none was measured."""
        return min(self.savings, key=lambda saving: saving.smallest[1].value, default=None)

    @property
    def is_cascade(self) -> bool:
        """True where cheap stages or a gate stand before a large network."""
        return _is_cascade(self.raw)

    @property
    def other(self) -> str:
        """What the costs are divided by."""
        return "large network" if self.is_cascade else "dense twin"

    @property
    def own(self) -> str:
        """What they are divided of."""
        return "cascade" if self.is_cascade else "selective model"

    @property
    def title(self) -> str:
        """What the workload calls itself, else its name."""
        return str(self.raw.get("title") or self.name)


@dataclass(frozen=True)
class Report:
    """A whole result file."""

    workloads: list[Workload]
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def failures(self) -> dict[str, str]:
        """Workloads that gave no result -> why."""
        return dict(self.raw.get("failures") or {})


def load(path: str | PathLike[str]) -> Report:
    """Read a result file. Raises ValueError if it is not one, or is of a schema that this version cannot read."""
    return parse(json.loads(Path(path).read_text(encoding="utf-8")))


def parse(raw: Any) -> Report:
    """The decoded JSON -> Report. Raises ValueError for anything but an object with `schema` 1 and `workloads`."""
    schema = raw.get("schema") if isinstance(raw, Mapping) else None
    if schema != SCHEMA:
        raise ValueError(f"result file must be an object with schema {SCHEMA}, got {schema!r}; run the benchmark")
    workloads = raw.get("workloads")
    if not isinstance(workloads, Mapping):
        raise ValueError(f"result file must map names to workloads, got {type(workloads).__name__}")
    return Report(
        workloads=[_workload(name, entry) for name, entry in workloads.items()],
        machine=raw.get("machine") or {},
        versions=raw.get("versions") or {},
        raw=raw,
    )


def _workload(name: str, raw: Mapping[str, Any]) -> Workload:
    quality = raw.get("quality") or {}
    return Workload(
        name=name,
        num_classes=raw.get("num_classes"),
        metric=quality.get("metric", "quality"),
        unit=quality.get("unit"),
        lower_is_better=bool(quality.get("lower_is_better", False)),
        num_tested=quality.get("n"),
        methods=list(_methods(raw)),
        converged=list(_converged(raw.get("converged_20k") or {})),
        agreement=Interval.of(raw.get("agreement")),
        savings=list(_savings(raw)),
        null_test=Interval.of(raw.get("null_test")),
        raw=raw,
    )


def _is_cascade(raw: Mapping[str, Any]) -> bool:
    return "contract" in raw and ("stages" in raw or "duties" in raw)


_OWN = (
    ("selective", "selective", "selective", "selective"),
    ("same weights, every class", "exact", "exact_same_weights", "dense"),
    ("dense, equal training time", "dense", "dense_equal_cpu", "dense"),
    ("dense, same capacity", "dense", "dense_same_capacity", "dense"),
    ("dense, equal running cost", "dense", "dense_equal_cost", "none"),
    ("large network", "dense", "large", "dense"),
)
"""Name, kind, key in ``quality``, and whose cost of an answer it has where it does not say its own."""


_IN_A_CASCADE = {"selective": "cascade", "dense_same_capacity": "large network"}


def _methods(raw: Mapping[str, Any]) -> Iterator[Method]:
    quality, inference = raw.get("quality") or {}, raw.get("inference") or {}
    cost = inference.get("batch_1") or {}
    trained_s = number((raw.get("training") or {}).get("selective_cpu_s"))
    for name, kind, key, side in _OWN:
        value = Interval.of(quality.get(key))
        if value is not None:
            own = quality[key] if isinstance(quality[key], Mapping) and "training_cpu_s" in quality[key] else {}
            answer_s = number(own.get("cpu_s")) or number(cost.get(f"{side}_cpu_s"))
            spent_s = number(own.get("training_cpu_s")) or trained_s
            shown = _IN_A_CASCADE.get(key, name) if _is_cascade(raw) else name
            yield Method(shown, kind, value, answer_s, spent_s, Interval.of(cost.get(f"{side}_energy_j")))
    for name, entry in (quality.get("incumbents") or {}).items():
        value = Interval.of(entry)
        if value is not None:
            entry = entry if isinstance(entry, Mapping) else {}
            energy_j = Interval.of(entry.get("energy_j"))
            yield Method(name, "incumbent", value, number(entry.get("cpu_s")), answer_energy_j=energy_j)


def _converged(raw: Mapping[str, Any]) -> Iterator[Method]:
    for kind in ("dense", "selective"):
        entry = raw.get(kind)
        value = Interval.of(entry)
        if value is not None:
            trained_s = entry.get("cpu_s") if isinstance(entry, Mapping) else None
            yield Method(kind, kind, value, training_cpu_s=number(trained_s))


def _savings(raw: Mapping[str, Any]) -> Iterator[Saving]:
    inference = raw.get("inference") or {}
    jobs = {"training": raw.get("training"), **{job: inference.get(job) for job in ("batch_1", "best_batch")}}
    for job, entry in jobs.items():
        for key, precision in PRECISIONS.items():
            saving = (entry or {}).get(key) or {}
            rulers = {ruler: Interval.of(saving.get(ruler)) for ruler in RULERS}
            present = {ruler: value for ruler, value in rulers.items() if value is not None}
            if present:
                own = "engine_int8" if key == "saving_int8" else "engine"
                yield Saving(job, precision, present, (entry or {}).get(own) or (entry or {}).get("engine"))


def number(raw: Any) -> float | None:
    """A finite number, or None: NaN and infinity in a result are missing figures."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or not math.isfinite(raw):
        return None
    return float(raw)
