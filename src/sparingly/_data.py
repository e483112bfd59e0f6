"""Calibration data: batches of a tensor, a tuple, a mapping or a loader, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def batches(data: Any, size: int = 8) -> list[Any]:
    """A list of batches, which can be gone through again and hashed.

    Args:
        data: a tensor, or a tuple or mapping of tensors of one length, is one data set and is cut along its first
            dimension. Any other iterable (a list, a loader, a generator) is one of batches, taken as they are.
        size: examples per batch that is cut here.

    Raises ValueError if there are no examples or lengths differ, TypeError for anything else.
    """
    if isinstance(data, (Tensor, tuple, Mapping)):
        length = _length(data)
        cut = [_map(lambda value, at=at: value[at : at + size], data) for at in range(0, length, size)]
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, np.ndarray)):
        cut = list(data)
    else:
        raise TypeError(f"data must be a tensor, a tuple or mapping of tensors, or batches, got {type(data).__name__}")
    if not cut:
        raise ValueError("there are no examples: data is empty")
    return cut


def _map(function: Any, data: Any) -> Any:
    """function of every tensor in nested tuples, lists and mappings; what is no tensor stays."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        return {key: _map(function, value) for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        mapped = [_map(function, value) for value in data]
        return tuple(mapped) if isinstance(data, tuple) else mapped
    return data


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch with its tensors on that device."""
    return _map(lambda value: value.to(device), batch)


def inputs(batch: Any) -> Any:
    """What goes to the model: of a tuple or list, such as (inputs, targets), the first."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def call(model: Any, given: Any) -> Any:
    """The model's output; a mapping goes in by keyword."""
    return model(**given) if isinstance(given, Mapping) else model(given)


def _length(data: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> int:
    """How many examples a data set has."""
    values = [data] if isinstance(data, Tensor) else list(data.values() if isinstance(data, Mapping) else data)
    if not values:
        raise ValueError("there are no examples: data is empty")
    wrong = [type(value).__name__ for value in values if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(
            f"a {type(data).__name__} is one data set and must hold tensors, got {wrong[0]}; give batches as a list"
        )
    lengths = sorted({len(value) if value.dim() else -1 for value in values})
    if len(lengths) > 1 or lengths[0] < 0:
        shapes = [list(value.shape) for value in values]
        raise ValueError(f"the tensors of a data set need one length, [n, ...] each, got {shapes}")
    return lengths[0]


def data_hash(data: Any) -> str:
    """SHA-256 over dtype, shape and bytes of every tensor in nested tuples, lists and mappings, in hexadecimal.

    NumPy arrays count as tensors; text, bytes, numbers and None may stand between. Mappings are read in the order of
    their keys. How data are cut into batches is part of it. Raises TypeError for anything else: a loader or a
    generator has to become a list first (:func:`batches`).
    """
    digest = hashlib.sha256()
    _feed(digest, data)
    return digest.hexdigest()


def _feed(digest: Any, data: Any) -> None:
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(np.array(data))
    if isinstance(data, Tensor):
        flat = data.detach().cpu().contiguous().reshape(-1)
        digest.update(f"tensor {data.dtype} {list(data.shape)}:".encode())
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(data, Mapping):
        digest.update(f"mapping {len(data)}:".encode())
        for key in sorted(data, key=str):
            _feed(digest, key)
            _feed(digest, data[key])
    elif isinstance(data, (tuple, list)):
        digest.update(f"sequence {len(data)}:".encode())
        for value in data:
            _feed(digest, value)
    elif data is None or isinstance(data, (str, bytes, bool, int, float)):
        text = repr(data).encode()
        digest.update(f"{type(data).__name__} {len(text)}:".encode() + text)
    else:
        raise TypeError(
            f"data must be tensors in tuples, lists and mappings, got {type(data).__name__}; make a list of it"
        )
