"""Save and load models with the state of their selectors, written whole or not at all.

A converted model becomes a folder: see :mod:`sparingly._folder`. A model with SelectiveHeads becomes one file: it is
safetensors (https://github.com/huggingface/safetensors) and never pickle. Its tensors are those of ``state_dict()``;
its metadata holds ``format`` ("sparingly"), ``version``, and as JSON ``heads`` (for each SelectiveHead by its name in
the model: the arguments of its constructor, and its selector's class and arguments) and ``aliases`` (names that stand
for a tensor saved under another name).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparingly.nn.head import SelectiveHead
from sparingly.nn.selective import selective_modules
from sparingly.ops._arrays import FLOATS
from sparingly.selectors import SELECTORS, Selector, selector_class

FORMAT = "sparingly"
VERSION = 1

_CONFIG = {
    "in_features": int,
    "num_classes": int,
    "bias": bool,
    "negatives": int,
    "int8": bool,
    "dtype": str,
    "exact": bool,
    "stale": bool,
    "selector": str,
    "selector_config": dict,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*FLOATS, torch.int8)}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a converted model as a folder, or a :class:`SelectiveHead` (a module that may hold some) as a file.

    It is written beside ``path`` and then takes its place, so that a crash leaves what was there whole. The folder
    holds the dense weights as well, with the configuration of a model of transformers; other files in it stay.

    Raises:
        ValueError: a selector's class is not in ``sparingly.selectors.SELECTORS``; the state holds something else
            than tensors; adapters are not merged; ``path`` holds other things than a converted model.
        OSError: the file or folder cannot be written.
    """
    if selective_modules(model):
        from sparingly._folder import save_folder

        save_folder(model, path)
        return
    heads = {}
    for name, module in model.named_modules():
        if isinstance(module, SelectiveHead):
            heads[name] = _config(module)
    tensors, aliases = _distinct(model.state_dict())
    metadata = {"format": FORMAT, "version": str(VERSION), "heads": json.dumps(heads), "aliases": json.dumps(aliases)}
    _write(Path(path), tensors, metadata)


def load(path: str | os.PathLike[str], into: nn.Module | None = None) -> Any:
    """Load what :func:`save` saved.

    Args:
        path: the file or folder.
        into: the model to fill, built as the saved one was: same parameters, and for a file heads at the same names,
            whose selectors are replaced by the saved ones. For a folder the dense model, which is converted in place.
            None: a file holds a lone head, a folder a model of transformers; it is made anew.

    Returns the head, the model, or ``into``.

    Raises:
        ValueError: file or folder is truncated, not one of Sparingly's, of another version, or does not fit ``into``;
            a folder's weights are not those that were converted. ``into`` is as it was then.
        FileNotFoundError: there is neither file nor folder.
    """
    path = Path(path)
    from sparingly._folder import place

    if place(path) is not None:
        from sparingly._folder_load import load_folder

        return load_folder(path, into)
    tensors, heads = _read(path)
    if into is None:
        if list(heads) != [""]:
            names = ", ".join(repr(name) for name in heads) or "none"
            raise ValueError(
                f"{path} holds a model with heads at {names}, not a lone head; build the model and call "
                "load(path, into=model)"
            )
        into = _head(heads[""])
    _fill(path, into, tensors, heads)
    return into


def _config(head: SelectiveHead) -> dict[str, Any]:
    name = type(head.selector).__name__
    if SELECTORS.get(name) is not type(head.selector):
        raise ValueError(f"selector {name} cannot be saved: add its class to sparingly.selectors.SELECTORS")
    return {
        "in_features": head.in_features,
        "num_classes": head.num_classes,
        "bias": head.bias is not None,
        "negatives": head.negatives,
        "int8": head.scale is not None,
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "exact": head.exact,
        "stale": head._stale,
        "selector": name,
        "selector_config": head.selector.config() | {"setting": head.selector.setting},
    }


def _distinct(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors that share no memory, name -> name of the tensor it is the same as)."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"only dense tensors can be saved, got {type(value).__name__} for {name!r}")
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = value.detach().contiguous()
    owners: set[int] = set()
    for name, value in tensors.items():
        memory = value.untyped_storage().data_ptr()
        # Views of one storage that are not the same: safetensors refuses them.
        if value.numel() and (memory in owners or value.untyped_storage().nbytes() != value.nbytes):
            tensors[name] = value.clone()
        owners.add(memory)
    return tensors, aliases


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, name, metadata)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files for their owner alone; take what an ordinary file would get.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is a safetensors file, but not one of Sparingly's: its format is "
                    f"{metadata.get('format')!r}"
                )
            version = metadata.get("version", "")
            if not version.isdecimal() or not 1 <= int(version) <= VERSION:
                raise ValueError(f"{path} has version {version!r}; this Sparingly reads versions 1..{VERSION}. Upgrade")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    try:
        heads, aliases = json.loads(metadata["heads"]), json.loads(metadata["aliases"])
        tensors |= {name: tensors[of] for name, of in aliases.items()}
        for config in heads.values():
            wrong = [name for name, kind in _CONFIG.items() if type(config.get(name)) is not kind]
            if wrong or config["dtype"] not in _DTYPES:
                raise ValueError(f"the configuration of a head lacks {wrong or 'a dtype'}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has damaged metadata: {error!r}") from error
    return tensors, heads


def _head(config: dict[str, Any]) -> SelectiveHead:
    """A head of that shape; its tensors hold whatever was in memory."""
    head = SelectiveHead(
        config["in_features"],
        config["num_classes"],
        bias=config["bias"],
        selector=_selector(config),
        device="meta",
    )
    rows, vector = (head.num_classes, head.in_features), (head.num_classes,)
    if config["int8"]:
        bias = torch.empty(vector) if config["bias"] else None
        head.adopt(torch.empty(rows, dtype=torch.int8), bias, torch.empty(vector))
    else:
        dtype = _DTYPES[config["dtype"]]
        bias = torch.empty(vector, dtype=dtype) if config["bias"] else None
        head.adopt(torch.empty(rows, dtype=dtype), bias)
    return head


def _selector(config: dict[str, Any]) -> Selector:
    try:
        return selector_class(config["selector"]).from_config(config["selector_config"])
    except TypeError as error:
        raise ValueError(f"selector {config['selector']} takes other arguments: {error}") from error


def _fill(path: Path, into: nn.Module, tensors: dict[str, Tensor], configs: dict[str, Any]) -> None:
    """Check everything, then write everything."""
    heads = {name: module for name, module in into.named_modules() if isinstance(module, SelectiveHead)}
    if heads.keys() != configs.keys():
        raise ValueError(f"{path} has heads at {sorted(configs)}, the model at {sorted(heads)}")
    prefixes = tuple(f"{name}.selector.".removeprefix(".") for name in heads)
    rest = {name: value for name, value in tensors.items() if not name.startswith(prefixes)}
    state = {name: value for name, value in into.state_dict().items() if not name.startswith(prefixes)}
    problems = [f"{name} is missing" for name in state.keys() - rest.keys()]
    problems += [f"{name} is not in the model" for name in rest.keys() - state.keys()]
    for name in sorted(state.keys() & rest.keys()):
        got, want = (f"{value.dtype} {list(value.shape)}" for value in (rest[name], state[name]))
        if got != want:
            problems.append(f"{name} is {got}, the model's {want}")
    if problems:
        raise ValueError(f"{path} does not fit the model: {'; '.join(sorted(problems)[:5])}")
    selectors = {name: _loaded_selector(path, name, config, tensors) for name, config in configs.items()}
    into.load_state_dict(rest, strict=False)
    for name, head in heads.items():
        config = configs[name]
        head.selector = selectors[name].to(head.weight.device).train(head.training)
        head.negatives, head.exact, head._stale = config["negatives"], config["exact"], config["stale"]


def _loaded_selector(path: Path, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Selector:
    selector = _selector(config)
    prefix = f"{name}.selector.".removeprefix(".")
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        selector.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} has a damaged selector at {name!r}: {error}") from error
    if selector.num_units not in (-1, config["num_classes"]):
        raise ValueError(
            f"{path} has a selector for {selector.num_units} units at {name!r}, "
            f"the head has {config['num_classes']} classes"
        )
    return selector
