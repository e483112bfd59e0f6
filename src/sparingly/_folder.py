"""A converted model as a folder: the dense network in its own format, and beside it what makes it selective.

====================== =================================================================================================
``model.safetensors``   the weights of the *restored* network under its own names, each once
``config.json``         and ``generation_config.json``: only for models of transformers, which then reads the folder as
                        the dense network
``sparingly.json``      format and version; class of the model; SHA-256 of the weights and of the selectors; names that
                        stand for a tensor saved under another name; what stands where, in the order in which it was
                        put there; the contract
``selectors.safetensors`` what the selectors have learned
====================== =================================================================================================

Never pickle, and nothing in the folder names code to import but a class of transformers. A new folder is written
beside the old one and takes its place, so that a crash leaves one of them whole; other files in the old one (a
tokenizer) come along.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparingly._data import data_hash
from sparingly.convert import CONTRACT
from sparingly.convert._convert import _kind
from sparingly.convert._families import ACTIVATIONS
from sparingly.convert._observe import is_transformers
from sparingly.nn.experts import SelectiveExperts
from sparingly.nn.head import SelectiveHead
from sparingly.nn.mlp import SelectiveMLP
from sparingly.nn.selective import Selective, selective_modules
from sparingly.selectors import SELECTORS, LowRank
from sparingly.store import _distinct

FORMAT = "sparingly-model"
VERSION = 2
DESCRIPTION, WEIGHTS, STATES = "sparingly.json", "model.safetensors", "selectors.safetensors"
OURS = (DESCRIPTION, WEIGHTS, STATES, "config.json", "generation_config.json")

_ADAPTERS = (".base_layer", ".lora_")


def place(path: str | os.PathLike[str]) -> Path | None:
    """Where the folder of that name is: under its name, or beside it after a crash between two renames; or None."""
    path = Path(os.path.realpath(path))
    found = path if path.exists() else _older(path)
    return found if found.is_dir() else None


def save_folder(model: nn.Module, path: str | os.PathLike[str], also: Callable[[Path], Any] | None = None) -> None:
    """Save a converted model; the model is not touched.

    ``also`` is given the new folder before it takes its place, to write a tokenizer for example.

    Raises:
        ValueError: the model cannot be told in this format (adapters, a selector class that is not in
            ``sparingly.selectors.SELECTORS``, an activation that is nowhere in the model), or ``path`` is something
            else than a folder of Sparingly's, or an empty one.
        OSError: the folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    check_free(path)
    model = getattr(model, "_orig_mod", model)  # as torch.compile wraps it
    weights, states, description = _description(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        save_file(weights, fresh / WEIGHTS, {"format": "pt"})
        save_file(states, fresh / STATES)
        if is_transformers(model):
            _write_config(model, fresh)
        (fresh / DESCRIPTION).write_text(json.dumps(description, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _bring_along(place(path), fresh)
        if also is not None:
            also(fresh)
        _take_place(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_free(path: Path) -> None:
    """Raise ValueError unless a folder may be written there: nothing is lost that is not Sparingly's."""
    if path.is_dir() and any(path.iterdir()) and not (path / DESCRIPTION).is_file():
        raise ValueError(f"{path} holds other things than a converted model: give a new or empty folder")
    if path.exists() and not path.is_dir():
        raise ValueError(f"a converted model is saved as a folder, but {path} is a file: give another name")


# What is written.


def _description(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(weights of the dense network, states of the selectors, what stands in the description)."""
    if any(isinstance(module, SelectiveHead) for module in model.modules()):
        raise ValueError("the model holds a SelectiveHead beside converted layers: restore_(model) before saving it")
    layers = selective_modules(model)
    if "" in layers:
        raise ValueError("the model is itself one selective layer: wrap it in torch.nn.Sequential before converting")
    prefixes = tuple(f"{name}.selector." for name in layers)
    weights, states = {}, {}
    for name, value in model.state_dict().items():
        (states if name.startswith(prefixes) else weights)[name] = value
    if any(part in name for part in _ADAPTERS for name in (*layers, *weights)):
        raise ValueError("the model has adapters: merge or unload them first (in PEFT, model.merge_and_unload())")
    weights, aliases = _distinct(weights)
    states = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in states.items()}
    contract = getattr(model, CONTRACT, None)
    kept = model.state_dict().keys()
    buffers = {n: value.dtype for n, value in model.named_buffers() if n not in kept and value.is_floating_point()}
    return (
        weights,
        states,
        {
            "format": FORMAT,
            "version": VERSION,
            "class": {"module": type(model).__module__, "name": type(model).__name__},
            "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
            "weights": data_hash(weights),
            "aliases": aliases,
            "buffers": {name: str(dtype).removeprefix("torch.") for name, dtype in buffers.items()},
            "selectors": data_hash(states),
            "layers": [_layer(name, layer) for name, layer in layers.items()],
            "contract": None if contract is None else contract.as_dict(),
        },
    )


def _layer(path: str, layer: Selective) -> dict[str, Any]:
    selector = layer.selector
    name = type(selector).__name__
    if SELECTORS.get(name) is not type(selector):
        raise ValueError(f"selector {name} cannot be saved: add its class to sparingly.selectors.SELECTORS")
    entry: dict[str, Any] = {
        "path": path,
        "kind": _kind(layer),
        "units": _units(layer),
        "per_token": layer.per_token if isinstance(layer, SelectiveExperts) else None,
        "selector": name,
        "config": selector.config() | {"setting": selector.setting},
        "rows": layer.rows,
        "off": layer.off,
        "always": bool(getattr(layer, "always", False)),
        "mlp": None,
    }
    if isinstance(layer, SelectiveMLP):
        up, gate, down = layer._names
        fused = None if gate != up else "gate_up" if layer._gate_first else "up_gate"
        (activation,), (original,) = layer._activation, layer._original
        entry["mlp"] = {
            "up": up,
            "gate": gate,
            "down": down,
            "fused": fused,
            "activation": _name_of(activation, original, path),
            "guesses": isinstance(selector, LowRank) and selector.activation is not None,
        }
    return entry


def _units(layer: Selective) -> int:
    """How many units the layer's selector is for."""
    return layer.bank_units if isinstance(layer, SelectiveExperts) else layer.num_units


def _name_of(activation: Any, container: nn.Module, path: str) -> str:
    """How a fresh container's activation is found again: its module, its attribute, or one of the known functions."""
    for name, module in container.named_modules(remove_duplicate=False):
        if module is activation:
            return f"module:{name}"
    for name, module in container.named_modules():
        for key, value in vars(module).items():
            if value is activation:
                return f"attribute:{name}.{key}"
    for function in ACTIVATIONS:
        if function is activation:
            return f"function:{function.__name__}"
    raise ValueError(f"the activation of {path!r} is neither in the model nor a known one, so it cannot be saved")


def _write_config(model: Any, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    # Of a GGUF: its weights are plain now.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.to_json_file(str(folder / "generation_config.json"))


def _older(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _bring_along(old: Path | None, fresh: Path) -> None:
    """Copy what stands in the old folder and is not written by us."""
    for entry in [] if old is None else old.iterdir():
        if entry.name not in OURS:
            (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, fresh / entry.name)


def _take_place(fresh: Path, path: Path) -> None:
    # mkdtemp and safetensors make things for their owner alone; take what ordinary ones would get.
    mask = os.umask(0)
    os.umask(mask)
    for entry in [*fresh.rglob("*"), fresh]:
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
        _sync(entry)
    old = _older(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    try:
        os.rename(fresh, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
