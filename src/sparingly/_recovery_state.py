"""The state of an unfinished :func:`sparingly.recover`: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparingly.store import _write

FILE = "recovery.safetensors"
FORMAT = "sparingly recovery"
VERSION = "1"
_PROGRESS = {"step": int, "examples": int, "cpu_s": float, "losses": list}


def save_state(path: Path, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
    """Tensors, and as JSON ``values``: how far the run is, and what has to be the same to go on."""
    metadata = {"format": FORMAT, "version": VERSION, "run": json.dumps(values)}
    _write(path, {name: value.detach().contiguous() for name, value in tensors.items()}, metadata)


def load_state(
    path: Path, shapes: Mapping[str, torch.Size], same: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, values). Raises ValueError if the file is damaged, of another version, or of a run not the ``same``."""
    anew = "delete it to begin anew, or give another folder"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                raise ValueError(f"{path} is not the state of a recovery that this Sparingly reads; {anew}")
            values = json.loads(metadata["run"])
            # The options first: they say more than that the weights differ.
            for key, now in same.items():
                if values[key] != now:
                    raise ValueError(_differs(path, key, values[key], now) + f"; {anew}")
            if any(type(values[key]) is not kind for key, kind in _PROGRESS.items()):
                raise KeyError("progress")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error!r}); {anew}") from error
    wrong = [name for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape]
    if wrong or len(tensors) != len(shapes):
        raise ValueError(f"{path} does not fit the model: {wrong[:3] or 'it holds other tensors too'}; {anew}")
    return tensors, values


def _differs(path: Path, key: str, then: Any, now: Any) -> str:
    hashed = {
        "data": "the batches are not those",
        "weights": "the converted layers' weights are not those",
        "selectors": "the selectors (or their settings) are not those",
    }
    if key in hashed:
        return f"{hashed[key]} that the run in {path} began with"
    return f"{path} is the state of a run with {key}={then}, got {key}={now}"
