"""Replace modules by selective ones, on the user's own instance, and put them back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparingly.convert._find import find
from sparingly.convert._place import Place, Skipped
from sparingly.nn._int8 import check_kind
from sparingly.nn.conv import SelectiveConv
from sparingly.nn.decoding import compile_steps_, drop_steps_
from sparingly.nn.experts import SelectiveExperts
from sparingly.nn.linear import SelectiveLinear
from sparingly.nn.mlp import SelectiveMLP
from sparingly.nn.screen_head import ScreenHead
from sparingly.nn.selective import NO_INT8, Selective, selective_modules
from sparingly.selectors import InputThreshold, LowRank, Random, Screen, Selector, Threshold, Zeros

CONTRACT = "sparingly_contract"
"""Attribute of a calibrated model that holds its :class:`sparingly.Contract`."""


@dataclass(frozen=True)
class Change:
    """One module that was replaced: its name, what kind of place it is, the selector's name, how many units."""

    path: str
    kind: str
    selector: str
    units: int
    note: str = ""


@dataclass(frozen=True)
class Changes:
    """What :func:`convert_` changed, and what it left alone with the reason."""

    changed: tuple[Change, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} changed, {len(self.skipped)} left alone"]
        for change in self.changed:
            note = f" ({change.note})" if change.note else ""
            lines.append(f"  {change.path}: {change.kind}, {change.units:,} units, {change.selector}{note}")
        lines.extend(f"  {skip.path or 'the network'}: left alone, {skip.reason}" for skip in self.skipped)
        return "\n".join(lines)


def convert_(
    model: nn.Module,
    selector: Selector | Mapping[str, Selector] | None = None,
    where: str | None = None,
    *,
    example: Any = None,
    rows: str | None = None,
) -> Changes:
    """Make parts of a trained network selective, in place; :func:`restore_` undoes it exactly.

    Selectors that learn from data run every unit until :func:`sparingly.calibrate` has fitted them.

    Args:
        model: any network; transformers' models of any family.
        selector: how units are chosen; every place gets a copy. Or a mapping of ``where`` to selector. None: what suits
            each part: ``{"mlp": Threshold(), "linear": InputThreshold(), "head": Screen(256)}``, parts that the network
            lacks being left out.
        where: "mlp" (hidden layers of MLP blocks), "linear" (every other linear layer inside repeated blocks, and the
            layer of an MLP that computes every activation), "attention" (those of attention only), "head" (the output
            layer), "conv" (pointwise convolutions, with Zeros or Threshold; never converted unless asked for), or a
            glob on module names, such as "model.layers.*.mlp". None: what the selector is for.
        example: input for one forward, where none can be made up: a tensor, a tuple or a dict of keyword arguments.
        rows: what selected units run from: None, the weights as they are; "int8", the same rounded to int8 with a
            float32 scale for each unit's row, a quarter of the bytes of float32. The weights stay beside them, for
            training and for :func:`restore_`. Experts, and MLPs whose selector looks at the input, have no such rows
            and are left alone.

    Returns what was changed, and what was not with the reason.

    Raises:
        ValueError: nothing could be changed (with the reasons), a place is selective already, or an unknown ``where``
            or ``rows``.
        TypeError: no selector, or one that does not fit the place.
    The model is as it was, whatever is raised.
    """
    # What is made in inference mode could not be changed outside of it.
    with torch.inference_mode(False):
        check_kind(rows)
        return _convert(model, _plan(model, selector, where, example, rows), rows)


def _convert(model: nn.Module, plan: _Plan, rows: str | None) -> Changes:
    replaced: dict[str, Selective] = {}
    changes: list[Change] = []
    try:
        for place, chosen, _ in plan.places:
            module = _make(model, place, copy.deepcopy(chosen))
            module.rows = rows
            _put(model, place.path, module)
            replaced[place.path] = module
            note = "" if place.container or place.kind != "mlp" else "only the second layer skips"
            note = f"{place.per_token} experts a token" if place.kind == "experts" else note
            changes.append(Change(place.path, place.kind, type(chosen).__name__, module.num_units, note))
    except BaseException:
        _put_back(model, replaced)
        raise
    compile_steps_(model)
    return Changes(tuple(changes), tuple(plan.skipped))


def restore_(model: nn.Module) -> tuple[str, ...]:
    """Put every original module back, in place -> the names of those that were replaced.

    The weights are those of today: bit for bit the original ones unless they were trained in between. A contract is
    removed. Raises ValueError if nothing is selective.
    """
    replaced = selective_modules(model)
    if not replaced:
        raise ValueError("nothing to restore: the model has no selective layers")
    if "" in replaced:
        raise ValueError("the model is itself one selective layer; its dense() gives the original")
    with torch.inference_mode(False):
        drop_steps_(model)
        _put_back(model, replaced)
    if hasattr(model, CONTRACT):
        delattr(model, CONTRACT)
    return tuple(replaced)


@dataclass
class _Plan:
    places: list[tuple[Place, Selector, str]]
    skipped: list[Skipped]


def _plan(model: nn.Module, selector: Any, where: str | None, example: Any, rows: str | None) -> _Plan:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = _wanted(selector, where)
    _check_not_selective(model, wanted)
    plan, taken = _Plan([], []), set()
    # A search runs the network: once for each part.
    look = functools.cache(lambda part: find(model, part, example))
    for part, chosen in wanted.items():
        found, skipped = look(part)
        if part == "linear" and isinstance(wanted.get("mlp", Threshold()), Threshold):
            found = _with_first_layers(model, found, look("mlp")[0])
        for place in found:
            reason = _unfit(place, chosen) or _without_rows(place, chosen, rows)
            if place.path in taken:
                continue
            if reason is not None:
                plan.skipped.append(Skipped(place.path, reason))
                continue
            taken.add(place.path)
            plan.places.append((place, chosen, part))
        plan.skipped.extend(skipped)
    if not plan.places:
        reasons = "; ".join(dict.fromkeys(f"{skip.path or 'network'}: {skip.reason}" for skip in plan.skipped))
        raise ValueError(f"nothing could be made selective at {', '.join(map(repr, wanted))}: {reasons[:2000]}")
    # A container before what is inside it: its children are then found under their new parent.
    plan.places.sort(key=lambda entry: entry[0].path.count("."))
    return plan


def _wanted(selector: Any, where: str | None) -> dict[str, Selector]:
    if selector is None:
        wanted: dict[str, Selector] = {"mlp": Threshold(), "linear": InputThreshold(), "head": Screen(256)}
        return wanted if where is None else {where: Zeros() if where == "conv" else wanted.get(where, Threshold())}
    if isinstance(selector, Mapping):
        if where is not None:
            raise TypeError("give where either as an argument or as the keys of the mapping, not both")
        wanted = dict(selector)
    else:
        wanted = {where if where is not None else _home(selector): selector}
    for chosen in wanted.values():
        if not isinstance(chosen, Selector):
            got = chosen.__name__ if isinstance(chosen, type) else type(chosen).__name__
            raise TypeError(f"selector must be a Selector such as sparingly.Threshold(), got {got}")
    if not wanted:
        raise ValueError("the mapping of selectors is empty: give at least one part, such as 'mlp'")
    return wanted


def _home(selector: Any) -> str:
    """Where a selector belongs."""
    if isinstance(selector, InputThreshold):
        return "linear"
    return "head" if isinstance(selector, Screen) else "mlp"


def _check_not_selective(model: nn.Module, wanted: Mapping[str, Selector]) -> None:
    done = {name: _kind(module) for name, module in selective_modules(model).items()}
    for part in wanted:
        kinds = {"attention": ("linear",), "mlp": ("mlp", "experts")}.get(part, (part,))
        names = [name for name, found in done.items() if found in kinds]
        if names:
            raise ValueError(
                f"{len(names)} places of {part!r} are selective already ({names[0]!r} …): restore_(model) first, or "
                f"convert another part"
            )


def _kind(module: Selective) -> str:
    if isinstance(module, ScreenHead):
        return "head"
    if isinstance(module, SelectiveExperts):
        return "experts"
    if isinstance(module, SelectiveConv):
        return "conv"
    return "mlp" if isinstance(module, SelectiveMLP) or module.of_mlp else "linear"


def _with_first_layers(model: nn.Module, found: list[Place], mlps: list[Place]) -> list[Place]:
    """Linear layers, and those of MLPs that compute every activation (also in MLPs that are selective already)."""
    paths = {place.path for place in found}
    first = [place.gate or place.up for place in mlps if place.fused is None]
    for name, module in selective_modules(model).items():
        if isinstance(module, SelectiveMLP) and module.first is not None:
            first.append(f"{name}.{module.first}")
    more = [Place(path, "linear", container=False) for path in first if path is not None and path not in paths]
    return found + more


def _unfit(place: Place, selector: Selector) -> str | None:
    """Why this selector cannot serve the place."""
    name = type(selector).__name__
    if place.kind == "experts":
        ok = isinstance(selector, Threshold) and not isinstance(selector, InputThreshold)
        return None if ok else f"experts that share one parameter take Threshold or Zeros, got {name}"
    if place.kind == "head":
        return None if isinstance(selector, Screen) else f"an output layer takes Screen, got {name}"
    if place.kind == "conv":
        ok = isinstance(selector, Threshold)
        return None if ok else f"a pointwise convolution takes Zeros or Threshold, got {name}"
    if place.kind == "linear" or not place.container:
        ok = isinstance(selector, Threshold)
        return None if ok else f"{name} needs an MLP in a module of its own; here only a Threshold can be used"
    if place.activation is None:
        return "its activation is not known"
    ok = isinstance(selector, (Threshold, LowRank, Random)) and not isinstance(selector, InputThreshold)
    return None if ok else f"an MLP takes Threshold, Zeros, LowRank or Random, got {name}"


def _without_rows(place: Place, selector: Selector, rows: str | None) -> str | None:
    """Why the place cannot run from such rows."""
    takes = place.kind not in ("experts", "conv") and isinstance(selector, (Threshold, Screen))
    return None if rows is None or takes else NO_INT8


def _make(model: nn.Module, place: Place, selector: Selector) -> Selective:
    original = model.get_submodule(place.path)
    if place.kind == "head":
        assert isinstance(selector, Screen) and isinstance(original, nn.Linear)
        return ScreenHead.from_dense(original, selector)
    if place.kind == "experts":
        assert isinstance(selector, Threshold) and place.form is not None
        return SelectiveExperts(original, place.form, selector, place.per_token)
    if place.kind == "conv":
        assert isinstance(selector, Threshold) and isinstance(original, nn.Conv2d)
        return SelectiveConv.from_dense(original, selector)
    if place.kind == "linear" or not place.container:
        assert isinstance(selector, Threshold)
        module = SelectiveLinear.from_dense(original, selector)
        module.of_mlp = place.kind == "mlp"
        return module
    full = (place.up, place.gate, place.down)
    up, gate, down = [None if name is None else name.removeprefix(f"{place.path}.") for name in full]
    assert up is not None and down is not None and place.activation is not None
    return SelectiveMLP(original, up, down, place.activation, selector, gate=gate, gate_first=place.fused != "up_gate")


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` wherever the module at ``path`` stands."""
    old = model.get_submodule(path)
    if old is model:
        raise ValueError("the model is itself the layer to replace: wrap it in torch.nn.Sequential")
    for holder in list(model.modules()):
        if holder is module:
            continue
        for name, child in list(holder._modules.items()):
            if child is old:
                holder._modules[name] = module


def _put_back(model: nn.Module, replaced: Mapping[str, Selective]) -> None:
    """Deepest first, so that a container takes back children that are the originals again; else latest first, because
    the first of those that share a weight saw its memory as it was."""
    for path in sorted(reversed(list(replaced)), key=lambda path: -path.count(".")):
        _put(model, path, replaced[path].dense())
