"""MediaWiki's messages in 148 languages, as bytes and as rows of hashed n-grams: which language is it?

The package mediawiki carries its interface and that of its extensions in 558 languages and scripts, translated by the
volunteers of translatewiki.net (GPL-2+). Short texts, many of close relatives (Serbian in both scripts, Croatian,
Bosnian; Portuguese of two countries), and now and then one that has not been translated: some cannot be told apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._numba import kernel
from sparingly.workloads._parts import cache_folder

FOLDER = Path("/usr/share/mediawiki")
INSTALL = (
    "apt-get install --no-install-recommends mediawiki, or without its web server: apt-get download mediawiki and "
    "dpkg -x mediawiki_*.deb {own}"
)
SHA256 = "40bdd186ceaf7575f42835ff97c0852155ad697509141f60676f15964348de38"
"""Of the messages that published figures are of (mediawiki 1.39.17)."""

SHORTEST, LONGEST, FEWEST = 20, 160, 2000
"""Characters that a message has at least, bytes of it that are looked at, messages that a language has at least."""

PARTS = {"train": 0.70, "dev": 0.75, "calibration": 0.875, "test": 1.0}
"""Where the parts end, by the hash of a message's key: all translations of a message are in one part."""

_TEMPLATE, _TAG, _ARGUMENT = re.compile(r"\{\{[^{}]*\}\}"), re.compile(r"<[^<>]*>"), re.compile(r"\$\d+")
_MIX = np.uint64(0x9E3779B97F4A7C15)


def cleaned(message: str) -> str:
    """Without templates (also nested ones), tags and arguments, spaces single."""
    while (inner := _TEMPLATE.sub(" ", message)) != message:
        message = inner
    return " ".join(_ARGUMENT.sub(" ", _TAG.sub(" ", message)).split())


def messages(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(language, key, cleaned text) of all translations under ``folder`` that are long enough and not English."""
    found: dict[Path, dict[str, Path]] = {}
    for file in sorted(folder.rglob("*.json")):
        if "i18n" in str(file.relative_to(folder)) and file.stem != "qqq":
            found.setdefault(file.parent, {})[file.stem] = file
    for files in found.values():
        english = dict(_texts(files["en"])) if "en" in files else {}
        for language, file in files.items():
            for key, text in _texts(file):
                if len(text) >= SHORTEST and (language == "en" or text != english.get(key)):
                    yield language, key, text


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return
    for key, text in content.items() if isinstance(content, dict) else ():
        if isinstance(text, str) and not key.startswith("@"):
            yield key, cleaned(text)


@dataclass(frozen=True)
class Texts:
    """text uint8 [n, LONGEST], lower-case UTF-8, zeros behind the end; lengths int64 [n]; labels int64 [n]."""

    text: Tensor
    lengths: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, ids: Tensor) -> Texts:
        return Texts(self.text[ids], self.lengths[ids], self.labels[ids])

    def bytes_of(self, ids: Tensor) -> list[bytes]:
        """What a user would give: a text each."""
        text, lengths = self.text.numpy(), self.lengths.tolist()
        return [text[i, : lengths[i]].tobytes() for i in ids.tolist()]


def from_bytes(texts: list[bytes]) -> tuple[Tensor, Tensor]:
    """Texts -> (uint8 [n, longest of them], lengths int64 [n]); cut after LONGEST bytes."""
    if len(texts) == 1 and texts[0]:  # A third of the time of what follows.
        one = np.frombuffer(texts[0][:LONGEST], np.uint8)
        return torch.from_numpy(one.copy()).unsqueeze(0), torch.tensor([len(one)])
    cut = [text[:LONGEST] for text in texts]
    lengths = np.fromiter(map(len, cut), np.int64, len(cut))
    width = int(lengths.max(initial=1))
    joined = np.frombuffer(b"".join(text.ljust(width, b"\0") for text in cut), np.uint8)
    return torch.from_numpy(joined.reshape(len(cut), width).copy()), torch.from_numpy(lengths)


class Corpus:
    """All messages of the languages that have enough of them.

    Attributes:
        languages: their codes, sorted; a label is a place there.
        parts: "train", "dev", "calibration", "test" -> :class:`Texts`. No text of the last three is in "train".
        sha256: of all of it; frozen: whether these are the ones that published figures are of.

    Args:
        folder: where MediaWiki lies; None: the package's place, or ``mediawiki`` in the cache folder.
        fewest: messages that a language has at least.

    Raises FileNotFoundError, saying what to install.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, fewest: int = FEWEST):
        own = cache_folder() / "mediawiki"
        places = [FOLDER, own / "usr/share/mediawiki", own] if folder is None else [Path(folder)]
        root = next((place for place in places if next(place.glob("**/i18n/**/en.json"), None)), None)
        if root is None:
            raise FileNotFoundError(f"no messages in {' or '.join(map(str, places))}: {INSTALL.format(own=own)}")
        rows = list(messages(root))
        often = Counter(language for language, _, _ in rows)
        self.languages = sorted(language for language, count in often.items() if count >= fewest)
        numbers = {language: place for place, language in enumerate(self.languages)}
        rows = [row for row in rows if row[0] in numbers]
        digest = hashlib.sha256()
        for row in rows:
            digest.update("\0".join(row).encode())
        self.sha256 = digest.hexdigest()
        self.frozen = self.sha256 == SHA256
        chances = np.array([_chance(key) for _, key, _ in rows])
        text, lengths = from_bytes([text.lower().encode() for _, _, text in rows])
        whole = Texts(text, lengths, torch.tensor([numbers[language] for language, _, _ in rows]))
        known: set[bytes] = set()
        self.parts: dict[str, Texts] = {}
        first = 0.0
        for name, last in PARTS.items():
            ids = torch.from_numpy(np.flatnonzero((chances >= first) & (chances < last)))
            if name == "train":
                known = set(whole.bytes_of(ids))
            else:
                ids = ids[[one not in known for one in whole.bytes_of(ids)]]
            self.parts[name], first = whole[ids], last


def _chance(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32


@kernel
def name_ngrams(text, lengths, orders, bits, ids):
    """Rows that a text's n-grams name, those over its first and last byte too: ids int64 [n, (T + 2) * orders], -1
    behind the last. text uint8 [n, T]; orders int64, rising; 2 ** bits rows."""
    for i in range(text.shape[0]):
        count = 0
        for place in range(-1, lengths[i] + 1):
            name, order = np.uint64(0), 0
            for back in range(orders[orders.size - 1]):
                at = place - back
                if at < -1:
                    break
                symbol = np.uint64(text[i, at]) if 0 <= at < lengths[i] else np.uint64(32)
                name = (name ^ (symbol + np.uint64(1))) * _MIX
                if back + 1 == orders[order]:
                    ids[i, count] = np.int64(name >> np.uint64(64 - bits))
                    count += 1
                    order += 1
        ids[i, count:] = -1
