"""Two methods on the same work: paired, randomised timing, and the three rulers side by side.

A and B alternate in random order within pairs, on processor time; the figure is the median of log-ratios with a
bootstrap 95 % interval (Efron, Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13). Alternating
cancels what drifts more slowly than a pair (clock speed, neighbours on a shared machine), which two blocks do not.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparingly.energy.ledger import MIN_COVERAGE, Ledger, count
from sparingly.energy.measurement import measure
from sparingly.energy.meters import Meter, default_meters
from sparingly.energy.prices import modelled_ratio
from sparingly.energy.records import Record

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "Paired", "Ruler", "compare", "null_test", "paired"]

MIN_CLAIM = 1.05
"""On a shared machine no difference under 5 % is claimed (ENERGY.md)."""

_RESAMPLES = 4000
Work = Callable[[], Any]


@dataclass(frozen=True)
class Paired:
    """Time of A ÷ time of B: median of per-pair ratios with its bootstrap interval (95 % unless asked otherwise).

    ``a_s``, ``b_s``: median processor-seconds per call; ``n``: pairs over all ``processes``; ``threads``: PyTorch
    threads that were used. ``log_ratios``: one row of ln(a ÷ b) per process.
    """

    value: float
    lo: float
    hi: float
    n: int
    a_s: float
    b_s: float
    threads: int
    processes: int
    log_ratios: tuple[tuple[float, ...], ...] = field(repr=False)

    @property
    def differs(self) -> bool:
        """True if a difference may be claimed: the interval leaves out 1 and the ratio is 5 % or more."""
        return not (self.lo <= 1 <= self.hi) and max(self.value, 1 / self.value) >= MIN_CLAIM

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form without the single ratios."""
        names = ("value", "lo", "hi", "n", "a_s", "b_s", "threads", "processes", "differs")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        verdict = "" if self.differs else ", no difference claimed"
        return f"{self.value:.3g} [{self.lo:.3g}, {self.hi:.3g}], n = {self.n}{verdict}"


@dataclass(frozen=True)
class _Plan:
    pairs: int
    warmup: int
    seed: int
    threads: int
    min_sample_s: float
    clock: Callable[[], int]


@contextmanager
def _steady(threads: int) -> Iterator[None]:
    """Fixed PyTorch thread count and no garbage collection inside samples; both are put back."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def _sample_ns(work: Work, repeats: int, clock: Callable[[], int]) -> int:
    start = clock()
    for _ in range(repeats):
        work()
    return clock() - start


def _repeats(work: Work, plan: _Plan) -> int:
    """Calls per sample, so that one lasts ``min_sample_s``: doubled until it does."""
    repeats = 1
    while _sample_ns(work, repeats, plan.clock) < plan.min_sample_s * 1e9:
        if repeats >= 1 << 20:
            raise ValueError("work takes no processor time on this clock: 1,048,576 calls were too short to time")
        repeats *= 2
    return repeats


def _run_pairs(a: Work, b: Work, plan: _Plan) -> tuple[list[float], list[float]]:
    """Seconds per call of A and of B, pair by pair."""
    with _steady(plan.threads):
        for _ in range(plan.warmup):
            a()
            b()
        works = ((a, _repeats(a, plan)), (b, _repeats(b, plan)))
        times: tuple[list[float], list[float]] = ([], [])
        for swap in np.random.default_rng(plan.seed).integers(0, 2, plan.pairs):
            for side in (1, 0) if swap else (0, 1):
                work, repeats = works[side]
                # A clock too coarse for a sample would give a zero, whose logarithm is no figure.
                times[side].append(max(1, _sample_ns(work, repeats, plan.clock)) / repeats * 1e-9)
    return times


def _interval(groups: Sequence[np.ndarray], confidence: float, seed: int) -> tuple[float, float]:
    """Percentile interval of the median; processes are resampled first, then the pairs of each."""
    rng = np.random.default_rng([seed, 1])
    rows, pairs = np.stack(groups), len(groups[0])
    chosen = rng.integers(0, len(rows), (_RESAMPLES, len(rows), 1))
    resampled = rows[chosen, rng.integers(0, pairs, (_RESAMPLES, len(rows), pairs))]
    medians = np.median(resampled.reshape(_RESAMPLES, -1), axis=1)
    lo, hi = np.quantile(medians, ((1 - confidence) / 2, (1 + confidence) / 2))
    return math.exp(lo), math.exp(hi)


def paired(
    a: Work,
    b: Work,
    *,
    pairs: int = 30,
    warmup: int = 3,
    seed: int = 0,
    threads: int | None = None,
    processes: int = 1,
    confidence: float = 0.95,
    min_sample_s: float = 0.005,
    clock: Callable[[], int] = time.process_time_ns,
) -> Paired:
    """Processor time of ``a()`` ÷ that of ``b()``; above 1 means that B costs less.

    Each sample repeats its work until it lasts ``min_sample_s``. ``threads``: PyTorch threads, default as now.
    With ``processes`` above 1 the whole is repeated in that many fresh processes (memory layout and the like differ
    between them) and resampled by process; ``a`` and ``b`` must then be picklable (functions of a module,
    ``functools.partial``, ``torch.nn.Module``), and the calling script needs its ``__main__`` guard. ``clock``:
    nanoseconds; the default counts user and system time of all threads, so neither waiting nor other programs.
    Raises ValueError for fewer than 5 pairs, a negative warm-up, no thread or process, or a confidence outside 0..1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if pairs < 5 or warmup < 0 or processes < 1 or (threads is not None and threads < 1):
        got = f"pairs={pairs}, warmup={warmup}, processes={processes}, threads={threads}"
        raise ValueError(f"needs pairs >= 5, warmup >= 0, processes >= 1 and threads >= 1, got {got}")
    used = threads or torch.get_num_threads()
    plans = [_Plan(pairs, warmup, seed + i, used, min_sample_s, clock) for i in range(processes)]
    runs = [_run_pairs(a, b, plans[0])] if processes == 1 else [_in_new_process(a, b, plan) for plan in plans]
    ratios = [np.log(np.asarray(a_s) / np.asarray(b_s)) for a_s, b_s in runs]
    lo, hi = _interval(ratios, confidence, seed)
    value = math.exp(float(np.median(np.concatenate(ratios))))
    return Paired(
        value=value,
        lo=min(lo, value),
        hi=max(hi, value),
        n=pairs * processes,
        a_s=float(np.median([s for a_s, _ in runs for s in a_s])),
        b_s=float(np.median([s for _, b_s in runs for s in b_s])),
        threads=used,
        processes=processes,
        log_ratios=tuple(tuple(group.tolist()) for group in ratios),
    )


def _in_new_process(a: Work, b: Work, plan: _Plan) -> tuple[list[float], list[float]]:
    import multiprocessing

    # One after the other: side by side they would disturb each other. Spawned: torch's threads do not survive a fork.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run_pairs, a, b, plan).result()


def null_test(work: Work, **options: Any) -> Paired:
    """A against A, with :func:`paired`'s options: if the interval leaves out 1, the rig is broken."""
    return paired(work, work, **options)


@dataclass(frozen=True)
class Ruler:
    """One saving, dense ÷ selective, or None with the ``reason``; ``unit`` of ``dense`` and ``selective`` per call."""

    name: str
    unit: str
    dense: float | None
    selective: float | None
    value: float | None
    lo: float | None = None
    hi: float | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Comparison:
    """Dense beside selective on the same inputs: ledger, processor-seconds, joules, and quality if it was given.

    ``rulers``: MACs, bytes, processor-seconds, and joules per scope. ``modelled``: modelled energy ratios, shown,
    never the headline. ``energy``: joules per call by side, measured or with the reason why not.
    """

    rulers: tuple[Ruler, ...]
    modelled: tuple[Ruler, ...]
    cpu: Paired
    ledgers: dict[str, Ledger] = field(repr=False)
    energy: dict[str, list[Record]] = field(repr=False)
    quality: Mapping[str, Any] | None = None

    @property
    def headline(self) -> Ruler:
        """The smallest saving of the rulers that have one."""
        return min((r for r in self.rulers if r.value is not None), key=lambda r: float(r.value or 0.0))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "headline": self.headline.as_dict(),
            "rulers": [ruler.as_dict() for ruler in self.rulers],
            "modelled": [ruler.as_dict() for ruler in self.modelled],
            "cpu_s": self.cpu.as_dict(),
            "ledger": {side: ledger.as_dict() for side, ledger in self.ledgers.items()},
            "energy": {side: [record.as_dict() for record in records] for side, records in self.energy.items()},
            "quality": None if self.quality is None else dict(self.quality),
        }

    def summary(self) -> str:
        """The headline in one line, with what may not be claimed."""
        top = self.headline
        saving = float(top.value or 0.0)
        unclear = top.lo is not None and top.hi is not None and top.lo <= 1 <= top.hi
        if unclear or max(saving, 1 / saving) < MIN_CLAIM:
            text = f"no difference claimed ({top.name}: {saving:.3g} times, under 5 % or not told from noise)"
        elif saving < 1:
            text = f"no saving: the selective side costs {1 / saving:.3g} times as much ({top.name})"
        else:
            text = f"at least {saving:.3g} times less on every ruler that could be read (smallest: {top.name})"
        quality = "quality not given" if self.quality is None else f"quality: {dict(self.quality)}"
        return f"{text}; {quality}"

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table("ruler", "dense", "selective", "saving", "95 % interval", title=self.summary())
        for ruler in (*self.rulers, *self.modelled):
            between = "" if ruler.lo is None or ruler.hi is None else f"{ruler.lo:.3g}-{ruler.hi:.3g}"
            amounts = [_amount(side, ruler.unit) for side in (ruler.dense, ruler.selective)]
            table.add_row(ruler.name, *amounts, ruler.reason or f"{ruler.value:.3g}x", between)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    text = f"{value:,.0f}" if unit in ("MACs", "bytes") else f"{value:.4g}"
    return f"{text} {unit}"


def _ledger_rulers(dense: Ledger, selective: Ledger) -> list[Ruler]:
    # `not >=` also catches the NaN of an empty ledger.
    low = [name for name, side in (("dense", dense), ("selective", selective)) if not side.coverage >= MIN_COVERAGE]
    rulers = []
    for name in ("macs", "bytes"):
        unit = "MACs" if name == "macs" else "bytes"
        top, bottom = getattr(dense, name), getattr(selective, name)
        reason = f"ledger of {' and '.join(low)} covers under {MIN_COVERAGE:.0%}" if low else None
        reason = reason or (None if bottom else f"the selective side counted no {unit}")
        rulers.append(Ruler(unit, unit, top, bottom, None if reason else top / bottom, reason=reason))
    return rulers


def _joules(works: Mapping[str, Work], meters: Sequence[Meter], window_s: float) -> dict[str, list[Record]]:
    """Joules per call of each side over one window each; the reasons, and no waiting, where no meter works."""
    usable = any(meter.unavailable() is None for meter in meters)
    records = {}
    for side, work in works.items():
        calls = 0
        with measure(meters) as result:
            end = time.monotonic() + window_s
            while usable and (calls == 0 or time.monotonic() < end):
                work()
                calls += 1
            if calls and torch.cuda.is_initialized():
                torch.cuda.synchronize()
        records[side] = [r if r.value is None else r.per(calls, "call") for r in result.gross]
    return records


def _joule_rulers(energy: Mapping[str, list[Record]]) -> list[Ruler]:
    rulers = []
    selective = {record.scope: record for record in energy["selective"]}
    for dense in energy["dense"]:
        other = selective.get(dense.scope, dense)
        name, unit = f"joules, {dense.scope}", "J/call"
        if not dense.value or not dense.lo or not dense.hi or not other.value or not other.lo or not other.hi:
            reason = dense.reason or other.reason or "no joules counted on one side"
            rulers.append(Ruler(name, unit, dense.value, other.value, None, reason=f"unavailable: {reason}"))
        else:
            lo, hi = dense.lo / other.hi, dense.hi / other.lo
            rulers.append(Ruler(name, unit, dense.value, other.value, dense.value / other.value, lo, hi))
    return rulers


def compare(
    dense: Callable[..., Any],
    selective: Any,
    inputs: Any = None,
    *,
    metric: Any = None,
    quality: Mapping[str, Any] | None = None,
    pairs: int = 30,
    meters: Sequence[Meter] | None = None,
    energy_s: float = 10.0,
) -> Comparison:
    """Two methods on the same work, on the three rulers: ``compare(dense, selective, inputs)``, any two callables, or
    ``compare(model, held_out)``, a converted model against the restored one.

    Of callables both run on the same ``inputs`` (a tuple is unpacked). Of a converted model the work is its answer at
    batch 1 to the first example (for a decoder one more token after it), and quality is ``metric`` on all of held_out,
    that of the model's contract unless given.

    Counts one call of each on a ledger, times ``pairs`` pairs on processor time, and where a meter works runs each
    side for ``energy_s`` seconds. ``quality``: what you measured elsewhere, shown beside the saving. Covers one call:
    training, calibration and index building are yours to count. Raises what the callables raise, and ValueError for a
    model without selective layers.
    """
    if inputs is None:
        from sparingly._twin import dense_twin, qualities, work

        twin = dense_twin(dense)  # pyright: ignore[reportArgumentType]
        quality = qualities(dense, twin, selective, metric) if quality is None else quality  # pyright: ignore
        works = {"dense": work(twin, selective), "selective": work(dense, selective)}  # pyright: ignore
        return _compare(works, quality, pairs, meters, energy_s)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    works = {"dense": lambda: dense(*arguments), "selective": lambda: selective(*arguments)}
    return _compare(works, quality, pairs, meters, energy_s)


def _compare(
    works: dict[str, Work],
    quality: Mapping[str, Any] | None,
    pairs: int,
    meters: Sequence[Meter] | None,
    energy_s: float,
) -> Comparison:
    ledgers = {}
    for side, work in works.items():
        work()  # Kernels are compiled and caches filled by the first call.
        with count() as ledgers[side]:
            work()
    cpu = paired(works["dense"], works["selective"], pairs=pairs)
    energy = _joules(works, default_meters() if meters is None else meters, energy_s)
    time_ruler = Ruler("processor time", "s", cpu.a_s, cpu.b_s, cpu.value, cpu.lo, cpu.hi)
    ratios = modelled_ratio(ledgers["dense"], ledgers["selective"])
    return Comparison(
        rulers=(*_ledger_rulers(ledgers["dense"], ledgers["selective"]), time_ruler, *_joule_rulers(energy)),
        modelled=tuple(
            Ruler(f"modelled energy, {r.scope}", "J", None, None, r.value, r.lo, r.hi, r.reason) for r in ratios
        ),
        cpu=cpu,
        ledgers=ledgers,
        energy=energy,
        quality=quality,
    )
