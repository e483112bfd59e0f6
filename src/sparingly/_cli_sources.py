"""What ``sparingly convert`` and its companions read: networks and data, by the names that a user gives."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparingly._folder import DESCRIPTION
from sparingly._folder_load import quiet

WINDOW = 256
"""Tokens of one window of text, the token that begins a text counted; fewer where the network takes fewer."""

TEXTS = (".txt", ".md")
TENSORS = (".pt", ".safetensors", ".npy")


def read_model(source: str) -> tuple[nn.Module, Any]:
    """SOURCE -> (network in evaluation mode, its tokenizer or None).

    A folder of transformers is read in its own dtype, a GGUF as float32. ``module.path:callable`` is imported, the
    working folder included, and called without arguments.

    Raises ValueError, OSError, ImportError with what is wrong.
    """
    path = Path(source)
    if not path.exists() and ":" in source:
        return called(source), None
    if not path.exists():
        raise ValueError(f"there is no {source}: give a folder, a .gguf file, or module.path:callable")
    if (path / DESCRIPTION).is_file():
        raise ValueError(f"{source} is converted already: give the network that it was made from")
    if path.is_dir() and (path / "config.json").is_file():
        return _read_transformers(str(path), {"dtype": "auto"}, {})
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(files) != 1 or files[0].suffix != ".gguf":
        found = ", ".join(file.name for file in files) or "neither"
        raise ValueError(f"{source} must hold a config.json of transformers or one .gguf file, got {found}")
    gguf = {"gguf_file": files[0].name}
    return _read_transformers(str(files[0].parent), {"dtype": torch.float32, **gguf}, gguf)


def _read_transformers(folder: str, options: dict[str, Any], of_tokenizer: dict[str, Any]) -> tuple[nn.Module, Any]:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"reading {folder} needs: pip install transformers") from error
    with quiet(transformers):
        made = transformers.AutoModelForCausalLM
        if not of_tokenizer:
            named = (transformers.AutoConfig.from_pretrained(folder, local_files_only=True).architectures or [""])[0]
            # The class that was saved: not every network is a language model.
            made = getattr(transformers, named, made)
        model = made.from_pretrained(folder, local_files_only=True, **options)
    return model.eval(), read_tokenizer(folder, of_tokenizer)


def read_tokenizer(folder: str, options: dict[str, Any] | None = None) -> Any:
    """The folder's tokenizer, None where it has none."""
    import transformers

    with quiet(transformers):
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **(options or {}))
        except (OSError, ValueError, KeyError):
            return None


def called(source: str) -> nn.Module:
    """``module.path:callable`` -> the network that it returns. Raises ValueError for anything else."""
    name, _, function = source.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(name), function)()
    except Exception as error:  # the user's own code: whatever it raises is told in one line
        raise ValueError(f"{source} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(made, nn.Module):
        raise ValueError(f"{source} must return a torch.nn.Module, got {type(made).__name__}")
    return made.eval()


def read_data(file: Path, model: nn.Module, tokenizer: Any, most: int) -> Any:
    """FILE -> what a metric takes, at most so many examples, evenly spread over the file.

    Text becomes windows of token ids, int64 [n, WINDOW]. Tensors stay what they are: one, or a mapping with keyword
    arguments; ``inputs`` and ``targets`` become a pair.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if file.suffix in TEXTS:
        return _spread(windows(file.read_text(encoding="utf-8"), model, tokenizer, file), most)
    if file.suffix not in TENSORS:
        raise ValueError(f"data must be a file ending in {', '.join((*TEXTS, *TENSORS))}, got {file}")
    try:
        data = _read_tensors(file)
    except Exception as error:  # three readers, each with errors of its own
        raise ValueError(f"{file} cannot be read: {error}") from error
    if isinstance(data, dict) and data.keys() == {"inputs", "targets"}:
        data = (data["inputs"], data["targets"])
    if isinstance(data, dict) and len(data) == 1 and not hasattr(model, "config"):
        (data,) = data.values()
    return _spread(data, most)


def _read_tensors(file: Path) -> Any:
    if file.suffix == ".pt":
        data = torch.load(file, map_location="cpu", weights_only=True)
        return tuple(data) if isinstance(data, list) else data
    if file.suffix == ".npy":
        import numpy

        return torch.from_numpy(numpy.load(file, allow_pickle=False))
    from safetensors.torch import load_file

    return load_file(file)


def windows(text: str, model: Any, tokenizer: Any, file: Path) -> Tensor:
    """A text cut into windows of token ids, int64 [n, WINDOW]; the last, shorter one is left out."""
    if tokenizer is None:
        raise ValueError(f"{file} is text, but there is no tokenizer beside the network: give token ids as a .pt file")
    config = getattr(model, "config", None)
    length = min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    step = length - len(begin)
    found = [begin + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
    if len(found) < 2:
        raise ValueError(f"{file} has {len(ids):,} tokens; at least {2 * step} are needed, for 2 windows of {length}")
    return torch.tensor(found)


def _spread(data: Any, most: int) -> Any:
    if isinstance(data, Tensor):
        if len(data) <= most:
            return data
        return data[torch.linspace(0, len(data) - 1, most).round().long()]
    if isinstance(data, dict):
        return {name: _spread(value, most) for name, value in data.items()}
    return tuple(_spread(value, most) for value in data) if isinstance(data, Iterable) else data
