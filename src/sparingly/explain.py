"""What each selective layer of a model does: how it chooses, how much of it ran, with which kernel, and why not."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from sparingly.contract import Contract
from sparingly.convert import CONTRACT
from sparingly.nn.bag import SelectiveBag
from sparingly.nn.cascade import NEVER, Staged
from sparingly.nn.decoding import compiled_steps
from sparingly.nn.ffn import SelectiveFFN
from sparingly.nn.gate import ALWAYS, Counts, Gate
from sparingly.nn.selective import Selective, needed
from sparingly.ops import fallbacks, registered

if TYPE_CHECKING:
    from rich.table import Table


EXAMPLES = 3
"""So many inputs are named that left at a stage."""


@dataclass(frozen=True)
class Layer:
    """One selective layer.

    ``share_run``: share of its units that ran, 0..1, None before the first token; ``tokens``: how many came,
    ``dense_tokens``: of these, how many took one dense product; ``why_dense``: reason -> tokens.
    ``rows``: what selected units run from, "int8", or None for the weights as they are.
    ``share_used``: of a layer that is trained selectively, the share of its units that have run in training; units that
    never run learn nothing (``layer.revive()``). None for converted layers.
    ``size_bytes``: weights read per token so far, None before the first; ``dense_bytes``: when every unit runs from the
    weights as they are. The pixels of an image read the rows of a convolution
    together: there it is all of them for the image.
    """

    name: str
    kind: str
    selector: str
    setting: int
    units: int
    rows: str | None
    tokens: int
    dense_tokens: int
    share_run: float | None
    size_bytes: float | None
    dense_bytes: int
    kernel: str
    why_dense: dict[str, int]
    share_used: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Every selective layer, and the contract under which their settings were chosen; None before calibration.

    ``decoding``: how a decoder of transformers took its last token; None for other models. ``converted``: some layer
    was made selective after training, so that its setting wants a contract.
    """

    layers: tuple[Layer, ...]
    contract: Contract | None
    decoding: str | None = None
    converted: bool = True

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "contract": None if self.contract is None else self.contract.as_dict(),
            "decoding": self.decoding,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(
            "layer", "selector", "setting", "units", "rows", "ran", "kernel", "dense because", show_edge=False
        )
        for layer in self.layers:
            ran = "-" if layer.share_run is None else _percent(layer.share_run)
            if layer.share_used is not None and layer.share_used > 0:
                ran += f" ({_percent(layer.share_used)} ever)"
            reasons = "; ".join(f"{reason} ({count:,} tokens)" for reason, count in layer.why_dense.items())
            chosen = (layer.name, layer.selector, str(layer.setting), f"{layer.units:,}", layer.rows or "as weights")
            table.add_row(*chosen, ran, layer.kernel, reasons)
        told = [self.decoding] if self.decoding else []
        if self.contract is not None:
            told.insert(0, str(self.contract))
        elif self.converted:
            told.insert(0, "not calibrated: no contract")
        table.caption = "\n".join(told)
        return table

    def __str__(self) -> str:
        return _printed(self)


@dataclass(frozen=True)
class Stage:
    """One stage of a cascade: its ``threshold`` (None: nothing leaves there before the last), how many inputs ``left``
    there and which ``share`` of all that is, 0..1, the first few of the last call that did (``examples``), and for how
    many it ``failed``, with the last reason."""

    name: str
    threshold: float | None
    left: int
    share: float
    examples: tuple[int, ...]
    failed: int
    why_failed: str | None


@dataclass(frozen=True)
class Exits:
    """What has left a cascade where, and the contract that its thresholds keep; None before calibration."""

    stages: tuple[Stage, ...]
    contract: Contract | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        contract = None if self.contract is None else self.contract.as_dict()
        return {"contract": contract, "stages": [asdict(stage) for stage in self.stages]}

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table("stage", "leaves from", "left", "share", "such as inputs", "failed", show_edge=False)
        for place, stage in enumerate(self.stages):
            last = place == len(self.stages) - 1
            at = "all" if last else "never" if stage.threshold is None else f"{stage.threshold:.4g}"
            failed = f"{stage.failed:,}: {stage.why_failed}" if stage.failed else ""
            some = ", ".join(map(str, stage.examples))
            table.add_row(stage.name, at, f"{stage.left:,}", _percent(stage.share), some, failed)
        table.caption = "not calibrated: no contract" if self.contract is None else str(self.contract)
        return table

    def __str__(self) -> str:
        return _printed(self)


@dataclass(frozen=True)
class Watched:
    """What a gate has done: its ``threshold`` (None: the network is always awake), what came since calibration
    (``live``) and then (``expected``), why its scout ``failed`` last, and its contract; None before calibration."""

    threshold: float | None
    live: Counts
    expected: Counts
    why_failed: str | None
    contract: Contract | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        contract = None if self.contract is None else self.contract.as_dict()
        live, expected = self.live._asdict(), self.expected._asdict()
        return {"contract": contract, "threshold": self.threshold, "live": live, "expected": expected,
                "why_failed": self.why_failed}  # fmt: skip

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table("", "items", "awake", "wakes", "net ran on", "scout failed", show_edge=False)
        for name, counts in (("since calibration", self.live), ("in calibration", self.expected)):
            why = f": {self.why_failed}" if counts is self.live and counts.failed else ""
            numbers = (f"{counts.wakes:,}", f"{counts.ran:,}", f"{counts.failed:,}{why}")
            table.add_row(name, f"{counts.items:,}", _percent(counts.share_awake), *numbers)
        at = "always awake" if self.threshold is None else f"awake from a score of {self.threshold:.4g}"
        table.caption = f"{at}\n{'not calibrated: no contract' if self.contract is None else self.contract}"
        return table

    def __str__(self) -> str:
        return _printed(self)


def _exits(model: Staged) -> Exits:
    thresholds: list[float | None] = [None if value == NEVER else value for value in model.thresholds.tolist()]
    stages = []
    for place, name in enumerate(model.names):
        examples = (model.exits == place).nonzero().flatten()[:EXAMPLES].tolist()
        stages.append(
            Stage(
                name=name,
                threshold=None if place == len(thresholds) else thresholds[place],
                left=int(model.left[place]),
                share=model.share_left()[place],
                examples=tuple(examples),
                failed=int(model.failed[place]),
                why_failed=model.why_failed.get(place),
            )
        )
    return Exits(tuple(stages), getattr(model, CONTRACT, None))


@overload
def explain(model: Staged) -> Exits: ...  # pyright: ignore[reportOverlappingOverload]
@overload
def explain(model: Gate) -> Watched: ...  # pyright: ignore[reportOverlappingOverload]
@overload
def explain(model: nn.Module) -> Explanation: ...
def explain(model: nn.Module) -> Explanation | Exits | Watched:
    """What the selective layers of ``model`` have done since they were made, calibrated or reset; of a cascade, what
    has left where; of a gate, how much of the stream woke its network.

    Raises ValueError if there are none.
    """
    if isinstance(model, Staged):
        return _exits(model)
    if isinstance(model, Gate):
        at = None if model.threshold == ALWAYS else model.threshold
        return Watched(at, model.counts, model.expected, model.why_failed, model.sparingly_contract)
    layers = needed(_selective(model))
    rows = []
    known = {(name, where): (available, reason) for name, where, available, reason in registered()}
    for (name, device), fallback in fallbacks().items():
        if known.get((name, device), (False, None))[0]:
            known[name, device] = (False, fallback.reason)
    for name, layer in layers.items():
        selector = layer.selector
        assert selector is not None
        tokens, units, dense, passed = layer.ran.tolist()
        share = layer.share_run()
        whole = layer.dense_bytes()
        alone = layer.bytes_read(units / tokens, passed / tokens) if tokens and not layer.reads_together else whole
        read = None if share is None else (tokens * alone + dense * whole) / (tokens + dense)
        rows.append(
            Layer(
                name=name,
                kind=type(layer).__name__,
                selector=type(selector).__name__,
                setting=selector.setting,
                units=layer.num_units,
                rows=layer.rows,
                tokens=tokens + dense,
                dense_tokens=dense,
                share_run=share,
                size_bytes=read,
                dense_bytes=whole,
                kernel=_kernel(known, layer.ran.device.type, layer.operators()),
                why_dense=dict(layer.why_dense),
                share_used=layer.share_used if isinstance(layer, SelectiveFFN) else None,
            )
        )
    converted = any(isinstance(layer, Selective) for layer in layers.values())
    return Explanation(tuple(rows), getattr(model, CONTRACT, None), _decoding(model), converted)


def _selective(model: nn.Module) -> dict[str, Selective | SelectiveFFN | SelectiveBag]:
    """Layers that have something to tell; a bag that is given its ids chooses nothing."""
    kinds = (Selective, SelectiveFFN, SelectiveBag)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: layer for name, layer in layers.items() if layer.selector is not None}


def _printed(table: Any) -> str:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.export_text()


def _percent(share: float) -> str:
    """Two digits where it is small: a layer of which a thousandth runs does not run 0 % of its units."""
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share * 100:.2g}%"


def _decoding(model: nn.Module) -> str | None:
    steps = compiled_steps(model)
    if not steps:
        return None
    reasons = "; ".join(dict.fromkeys(one.why_modules for one in steps if one.why_modules is not None))
    return f"the last token ran module by module: {reasons}" if reasons else "the last token was one compiled call"


def _kernel(known: Mapping[tuple[str, str], tuple[bool, str | None]], device: str, operators: tuple[str, ...]) -> str:
    """Which kernels serve these operators on the device, with the reason where it is the reference.

    known: (operator, device) -> whether its kernel runs, and why not.
    """
    if not operators:
        return f"compiled ({device})" if device == "cpu" else f"PyTorch ({device})"
    parts = []
    for name in operators:
        available, reason = known.get((name, device), (False, f"no kernel for {device}"))
        parts.append(f"{name} ({device})" if available else f"{name} (reference: {reason})")
    return ", ".join(parts)
