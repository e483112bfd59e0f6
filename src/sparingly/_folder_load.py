"""Load a folder that :mod:`sparingly._folder` wrote: check everything, then build, convert again, and fill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparingly._data import data_hash
from sparingly._folder import DESCRIPTION, FORMAT, STATES, VERSION, WEIGHTS, _units, place
from sparingly.contract import Contract
from sparingly.convert import CONTRACT, Place
from sparingly.convert._convert import _make, _put, _put_back
from sparingly.convert._experts import expert_form
from sparingly.convert._families import ACTIVATIONS
from sparingly.convert._match import TOLERANCE, distance
from sparingly.nn._expert_form import ExpertForm
from sparingly.nn._rows import sizes
from sparingly.nn.decoding import compile_steps_
from sparingly.nn.screen_head import ScreenHead
from sparingly.nn.selective import Selective, selective_modules
from sparingly.selectors import LowRank, Selector, selector_class

_Text = (str, type(None))
_DESCRIPTION: dict[str, Any] = {
    "format": str,
    "version": int,
    "class": dict,
    "attention": _Text,
    "weights": str,
    "aliases": dict,
    "buffers": dict,
    "selectors": str,
    "layers": list,
    "contract": (dict, type(None)),
}
_LAYER: dict[str, Any] = {
    "path": str,
    "kind": str,
    "units": int,
    "per_token": (int, type(None)),
    "selector": str,
    "config": dict,
    "rows": _Text,
    "off": bool,
    "always": bool,
    "mlp": (dict, type(None)),
}
_MLP: dict[str, Any] = {
    "up": str,
    "gate": _Text,
    "down": str,
    "fused": _Text,
    "activation": str,
    "guesses": bool,
}
_FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}


def load_folder(path: str | os.PathLike[str], into: nn.Module | None = None) -> nn.Module:
    """Load what :func:`sparingly._folder.save_folder` saved -> the converted model, or ``into``, converted.

    Args:
        path: the folder.
        into: the dense model to fill and convert, built as the saved one was: same names, shapes and dtypes. Its
            weights are replaced by the saved ones. None: a model of transformers, which is built anew on the CPU.

    Raises:
        ValueError: the folder is truncated, foreign, of another version, its parts are of different models (weights
            that differ from those that were converted), it names a selector or a class that is not known, or it does
            not fit ``into``. ``into`` is as it was then.
        FileNotFoundError: there is no such folder.
        ImportError: transformers is missing.
    """
    folder = place(path)
    if folder is None:
        raise FileNotFoundError(f"there is no folder {path}")
    description = _read(folder)
    weights, states = (_tensors(folder, name, description[key]) for name, key in _PARTS)
    contract = None if description["contract"] is None else Contract.from_dict(description["contract"])
    entries = description["layers"]
    selectors = [_selector(folder, entry, states) for entry in entries]
    model = _build(folder, description) if into is None else into
    if selective_modules(model):
        raise ValueError("into is selective already: sparingly.restore_(model) first, or give a dense model")
    _check_fits(folder, model, weights, description["aliases"], any_dtype=into is None)
    _convert(folder, model, entries, selectors)
    _fill(model, weights, description["aliases"], afresh=into is None)
    if into is None:
        _set_dtypes(model, description["buffers"])
    if contract is not None:
        setattr(model, CONTRACT, contract)
    return model


_PARTS = ((WEIGHTS, "weights"), (STATES, "selectors"))


# What is read.


def _read(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    if not file.is_file():
        raise ValueError(f"{folder} holds no converted model of Sparingly's: it has no {DESCRIPTION}")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is truncated or no JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{file} is not one of Sparingly's: its format is not {FORMAT!r}")
    version = description.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        known = f"versions 1 to {VERSION}"
        raise ValueError(f"{file} has version {version!r}; this Sparingly reads {known}: use another release")
    _check_keys(file, "the description", description, _DESCRIPTION)
    if version == 1:  # which had no other rows than the weights
        description["layers"] = [
            entry | {"rows": None} if isinstance(entry, dict) else entry for entry in description["layers"]
        ]
    for entry in description["layers"]:
        _check_keys(file, "a layer", entry, _LAYER)
        if entry["mlp"] is not None:
            _check_keys(file, f"layer {entry['path']!r}", entry["mlp"], _MLP)
    if any(name not in _FLOATS for name in description["buffers"].values()):
        raise ValueError(f"{file}: unknown dtypes of buffers, known are {', '.join(_FLOATS)}")
    return description


def _check_keys(file: Path, what: str, values: Any, kinds: Mapping[str, Any]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{file}: {what} must be an object, got {values!r}")
    unknown, missing = sorted(values.keys() - kinds.keys()), sorted(kinds.keys() - values.keys())
    if unknown or missing:
        raise ValueError(f"{file}: {what} has unknown keys {unknown} and lacks {missing}")
    for name, kind in kinds.items():
        # A bool is an int.
        if not isinstance(values[name], kind) or (kind is int and isinstance(values[name], bool)):
            raise ValueError(f"{file}: {name} of {what} has the wrong type, got {values[name]!r}")


def _tensors(folder: Path, name: str, digest: str) -> dict[str, Tensor]:
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{folder} is not whole: it has no {name}. Save the model again")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {error}") from error
    if data_hash(tensors) != digest:
        what = "base model's hash differs" if name == WEIGHTS else "selectors' hash differs"
        raise ValueError(
            f"{file}: the {what} from the one in {DESCRIPTION}. These are not the tensors that were saved with it; "
            "convert and calibrate this model anew"
        )
    return tensors


def _selector(folder: Path, entry: dict[str, Any], states: Mapping[str, Tensor]) -> Selector:
    where, name = f"{folder / DESCRIPTION}: layer {entry['path']!r}", entry["selector"]
    try:
        known = selector_class(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}. A class of your own goes into sparingly.selectors.SELECTORS") from error
    try:
        selector = known.from_config(entry["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {name} takes other arguments: {error}") from error
    prefix = f"{entry['path']}.selector."
    state = {key.removeprefix(prefix): value for key, value in states.items() if key.startswith(prefix)}
    try:
        selector.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{where}: damaged selector: {error}") from error
    if selector.num_units not in (-1, entry["units"]):
        raise ValueError(f"{where}: a selector of {selector.num_units} units in a layer of {entry['units']}")
    return selector


# What is built.


def _build(folder: Path, description: Mapping[str, Any]) -> nn.Module:
    module, name = (str(description["class"].get(key)) for key in ("module", "name"))
    if not module.startswith("transformers."):
        raise ValueError(
            f"{folder} holds a {module}.{name}, which is no class of transformers: build the dense model yourself and "
            "call sparingly.load(path, into=model)"
        )
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{folder} holds a {name}: pip install transformers") from error
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"transformers {transformers.__version__} has no model {name}: install the version that {folder} was saved "
            "with, or build the dense model yourself and call sparingly.load(path, into=model)"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not whole: it has no config.json. Save the model again")
    options = {} if description["attention"] is None else {"attn_implementation": description["attention"]}
    try:
        with quiet(transformers):
            return found.from_pretrained(str(folder), dtype="auto", local_files_only=True, **options)
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"transformers cannot build the {name} in {folder}: {error}") from error


@contextmanager
def without_bars(transformers: Any) -> Iterator[Any]:
    """The module given, without its progress bars for a while."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def quiet(transformers: Any) -> Iterator[Any]:
    """The module given, without its progress bars and remarks for a while."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars(transformers):
            yield transformers
    finally:
        logging.set_verbosity(verbosity)


def _check_fits(
    folder: Path, model: nn.Module, weights: Mapping[str, Tensor], aliases: Mapping[str, str], any_dtype: bool
) -> None:
    state, saved = model.state_dict(), weights.keys() | aliases.keys()
    owners = _owners(state)
    problems = [f"{name} is missing" for name in state.keys() - saved]
    problems += [f"{name} is not in the model" for name in saved - state.keys()]
    for name in state.keys() & saved:
        owner = aliases.get(name, name)
        if owners[name] != owner:
            problems.append(f"{name} is the same tensor as {owner}, the model's as {owners[name]}")
            continue
        got, want = weights[owner], state[name]
        if got.shape != want.shape or (got.dtype != want.dtype and not any_dtype):
            problems.append(f"{name} is {got.dtype} {list(got.shape)}, the model's {want.dtype} {list(want.shape)}")
    if problems:
        raise ValueError(f"{folder} does not fit the model: {'; '.join(sorted(problems)[:5])}")


def _owners(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> the first name of the same tensor."""
    first: dict[Any, str] = {}
    owners = {}
    for name, value in state.items():
        memory = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        owners[name] = first.setdefault(memory if value.numel() else name, name)
    return owners


def _convert(folder: Path, model: nn.Module, entries: list[dict[str, Any]], selectors: list[Selector]) -> None:
    """Make the same layers selective again; the model is as it was, whatever is raised."""
    replaced: dict[str, Selective] = {}
    path = ""
    try:
        for entry, selector in zip(entries, selectors, strict=True):
            path = entry["path"]
            _convert_one(model, entry, selector, replaced)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        _put_back(model, replaced)
        raise ValueError(f"{folder} does not fit the model at {path!r}: {error}") from error
    except BaseException:
        _put_back(model, replaced)
        raise
    compile_steps_(model)


@torch.no_grad()
def _convert_one(model: nn.Module, entry: dict[str, Any], selector: Selector, replaced: dict[str, Selective]) -> None:
    path, mlp = entry["path"], entry["mlp"]
    original = model.get_submodule(path)
    here = Place(path, entry["kind"], container=False)
    x = want = torch.empty(0)
    if mlp is not None:
        up, gate, down = (mlp[role] and f"{path}.{mlp[role]}" for role in ("up", "gate", "down"))
        activation = _found(mlp["activation"], original)
        here = Place(path, entry["kind"], up, gate, down, activation, fused=mlp["fused"])
        first = model.get_submodule(up)
        x = torch.randn(2, sizes(first)[0], generator=torch.Generator().manual_seed(0)).to(first.weight)  # pyright: ignore
        want = original(x)
        if mlp["guesses"] and isinstance(selector, LowRank):
            selector.rank_by(activation)
    if entry["kind"] == "experts":
        form = expert_form(original)
        if not isinstance(form, ExpertForm):
            raise ValueError(form or "it holds no experts in one parameter")
        here = Place(path, "experts", form=form, per_token=entry["per_token"] or 1)
    selector.to(next(original.parameters()).device)
    module = replaced[path] = _make(model, here, selector)
    if _units(module) != entry["units"]:
        raise ValueError(f"it has {_units(module)} units, the saved one {entry['units']}")
    if mlp is not None:
        module.off = True
        got = module(x)
        module.reset()
        if not (distance(got, want) < 4 * TOLERANCE.get(x.dtype, 3e-6) or torch.equal(got, want)):
            raise ValueError("it does not compute what the saved one did: another activation, or another forward")
    module.rows, module.off = entry["rows"], entry["off"]
    if isinstance(module, ScreenHead):
        module.always = entry["always"]
    _put(model, path, module)


def _found(reference: str, container: nn.Module) -> Any:
    """What :func:`sparingly._folder._name_of` named."""
    kind, _, name = reference.partition(":")
    if kind == "module":
        return container.get_submodule(name)
    if kind == "attribute":
        owner, _, leaf = name.rpartition(".")
        return vars(container.get_submodule(owner))[leaf]
    known = {function.__name__: function for function in ACTIVATIONS}
    if kind != "function" or name not in known:
        raise ValueError(f"unknown activation {reference!r}")
    return known[name]


@torch.no_grad()
def _fill(model: nn.Module, weights: Mapping[str, Tensor], aliases: Mapping[str, str], *, afresh: bool) -> None:
    """Write the weights, ``afresh`` into memory of their own.

    What transformers has read lies where it lies in the file, at a multiple of 8 bytes only: sums over it may then
    differ in their last bit from those over the memory that was saved.
    """
    state = model.state_dict(keep_vars=True)
    for name, value in weights.items():
        if afresh:  # in the layout that stands here, and perhaps another dtype
            state[name].data = torch.empty_like(state[name], dtype=value.dtype).copy_(value)
        else:
            state[name].copy_(value)
    for name, owner in aliases.items():
        if afresh and state[name] is not state[owner]:
            state[name].data = state[owner].data


def _set_dtypes(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Of buffers that are not saved but made anew, such as the frequencies of rotary positions."""
    buffers = dict(model.named_buffers())
    for name in dtypes.keys() & buffers.keys():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffers[name].to(_FLOATS[dtypes[name]])
