"""Data of the spelling workload: a vocabulary, real misspellings to test on, and synthetic ones to train on.

The words are those of ``wordfreq`` (Speer, 2022) that have 2 to 24 letters a-z, by falling frequency; the real
misspellings are those that the ``codespell`` project collected from people's texts. Both come from Python packages
and are checked by hash, so that a figure always means the same data.

R. Speer, "rspeer/wordfreq: v3.0", 2022, doi:10.5281/zenodo.7199437. Hashed letter n-grams as the features of a word:
P. Bojanowski, E. Grave, A. Joulin, T. Mikolov, "Enriching word vectors with subword information", TACL 5, 2017.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._numba import inlined, kernel
from sparingly.workloads._noise import LETTERS_WIDTH, Rates, draw_classes, misspell

__all__ = ["Features", "Noise", "Pairs", "Vocabulary", "misspellings"]

WORDS_SHA256 = "9d73d16f47870021c552bc5a10db5e1ed8927e1b9f99ce219ae0da6e00f45fa8"  # wordfreq 3.1.1, joined by "\n"
DICTIONARY_SHA256 = "a457564a466120c728361e9c759b6a6ef05c2acc05c7e12d1ba0eb251036f42d"  # codespell 2.4.3

_SPARE = 29  # the code of every character that is not a-z; 27 and 28 mark a word's start and end
_INSTALL = 'install it with: pip install "sparingly[bench]"'


def _check(name: str, content: bytes, expected: str, version: str) -> None:
    got = hashlib.sha256(content).hexdigest()
    if got != expected:
        raise RuntimeError(
            f"the data of {name} are not those that the figures are stated for: SHA-256 {got[:16]}…, expected "
            f"{expected[:16]}…; install them with: pip install {name}=={version}"
        )


def letter_array(words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [words, 32] (a-z 1-26, any other character 29, 0 after the end) and lengths int32 [words].

    Words are stripped and put in lower case, and cut after 32 characters. Raises ValueError for an empty word.
    """
    codes, lengths = np.zeros((len(words), LETTERS_WIDTH), np.uint8), np.zeros(len(words), np.int32)
    for number, word in enumerate(words):
        text = word.strip().lower()[:LETTERS_WIDTH]
        if not text:
            raise ValueError(f"word {number} is empty: got {word!r}, needs at least one character that is not a space")
        codes[number, : len(text)] = [ord(c) - 96 if "a" <= c <= "z" else _SPARE for c in text]
        lengths[number] = len(text)
    return codes, lengths


def words_of(codes: np.ndarray, lengths: np.ndarray) -> list[str]:
    """The inverse of :func:`letter_array`; a character that was not a-z reads as "?"."""
    return [
        "".join("?" if code == _SPARE else chr(96 + code) for code in row[:length])
        for row, length in zip(codes.tolist(), lengths.tolist(), strict=True)
    ]


class Vocabulary:
    """The words that can be answered, by falling frequency; a word's class is its place.

    ``words`` list [N]; ``letters`` uint8 [N, 32] (1-26, 0 after the end); ``lengths`` int32 [N]; ``zipf``
    float64 [N]: log10 of occurrences per 10^9 words. ``limit`` keeps the most frequent ones, all 288,992 by default.
    Raises ImportError without ``wordfreq``, RuntimeError if its words are not those of version 3.1.1.
    """

    def __init__(self, limit: int | None = None):
        try:
            from wordfreq import get_frequency_dict, top_n_list
        except ImportError as error:
            raise ImportError(f"the spelling workload needs wordfreq; {_INSTALL}") from error
        words = [w for w in top_n_list("en", 10**7, wordlist="large") if re.fullmatch("[a-z]{2,24}", w)]
        _check("wordfreq", "\n".join(words).encode(), WORDS_SHA256, "3.1.1")
        if limit is not None and not 2 <= limit <= len(words):
            raise ValueError(f"limit must be in 2..{len(words)} or None, got {limit}")
        self.words = words[:limit]
        self.letters, self.lengths = letter_array(self.words)
        frequency = get_frequency_dict("en", wordlist="large")
        self.zipf = np.array([round(math.log10(frequency[word]) + 9, 2) for word in self.words])
        self._classes = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._classes

    def class_of(self, word: str) -> int:
        """The word's class; KeyError if it is not in the vocabulary."""
        return self._classes[word]

    def probabilities(self, alpha: float = 1.0) -> np.ndarray:
        """float64 [N], proportional to frequency ** alpha; 0 makes all words equally likely. Sums to 1."""
        weight = 10.0 ** (alpha * (self.zipf - self.zipf[0]))
        return weight / weight.sum()


class Pairs(NamedTuple):
    """Misspellings as people typed them and the classes int64 [n] of their corrections."""

    typed: list[str]
    classes: np.ndarray

    def __repr__(self) -> str:
        return f"Pairs({len(self.typed)} misspellings)"


def misspellings(vocabulary: Vocabulary) -> tuple[Pairs, Pairs]:
    """Real misspellings (codespell) with exactly one correction, which is in the vocabulary: (dev, test).

    Only dev (a fifth of the corrections, by the CRC-32 of the correction) may be used to choose rates and
    hyperparameters; test is for reporting. No correction is in both. Typed words that are not 2 to 30 letters a-z
    are left out; nothing else is, not even typed words that are themselves in the vocabulary.
    Raises ImportError without ``codespell``, RuntimeError if its dictionary is not that of version 2.4.3.
    """
    spec = importlib.util.find_spec("codespell_lib")
    if spec is None or spec.origin is None:
        raise ImportError(f"the spelling workload is tested on codespell's dictionary; {_INSTALL}")
    content = (Path(spec.origin).parent / "data" / "dictionary.txt").read_bytes()
    _check("codespell", content, DICTIONARY_SHA256, "2.4.3")
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for line in content.decode().splitlines():
        typed, _, right = line.partition("->")
        corrections = [text.strip() for text in right.split(",") if text.strip()]
        if len(corrections) == 1 and corrections[0] in vocabulary and re.fullmatch("[a-z]{2,30}", typed):
            correction = corrections[0]
            parts[zlib.crc32(correction.encode()) % 5 != 0].append((typed, vocabulary.class_of(correction)))
    dev, test = (Pairs([t for t, _ in part], np.array([c for _, c in part], np.int64)) for part in parts)
    return dev, test


@dataclass(frozen=True)
class Features:
    """Hashed letter n-grams of a word, with marks for its start and end: what the network reads.

    ``ngrams``: their lengths, 1 to 5; ``skips``: also pairs of letters with one between them; ``buckets``: rows of
    the table that they are hashed to.
    """

    buckets: int = 1 << 18
    ngrams: tuple[int, ...] = (2, 3, 4)
    skips: bool = True

    def __post_init__(self) -> None:
        if self.buckets < 1:
            raise ValueError(f"buckets must be 1 or more, got {self.buckets}")
        if not set(self.ngrams) <= set(range(1, 6)) or len(set(self.ngrams)) != len(self.ngrams):
            raise ValueError(f"ngrams must be different lengths in 1..5, got {self.ngrams}")
        if not self.ngrams and not self.skips:
            raise ValueError("needs at least one kind of feature: ngrams is empty and skips is False")

    def width(self, longest: int) -> int:
        """Most features that a word of at most ``longest`` letters has."""
        symbols = longest + 2
        return sum(max(0, symbols - n + 1) for n in self.ngrams) + max(0, symbols - 2) * self.skips

    def encode(self, words: Sequence[str] | str) -> Tensor:
        """Typed words -> feature ids int64 [words, features of the longest], padded with -1; any characters do.

        Words are stripped, put in lower case and cut after 32 characters; all characters but a-z count as the same
        one. Raises ValueError for an empty word.
        """
        return self.encode_codes(*letter_array([words] if isinstance(words, str) else words))

    def encode_codes(self, letters: np.ndarray, lengths: np.ndarray) -> Tensor:
        """As :meth:`encode`, from codes uint8 [words, 32] and lengths int32 [words]."""
        ids = np.empty((len(letters), self.width(int(lengths.max(initial=0)))), np.int64)
        _hash_features(letters, lengths, np.array(self.ngrams, np.int64), self.skips, np.uint64(self.buckets), ids)
        return torch.from_numpy(ids)


_BASE, _GOLDEN, _SHIFT = np.uint64(31), np.uint64(0x9E3779B97F4A7C15), np.uint64(33)
_SKIP_KIND = np.uint64(101)


@inlined
def _bucket(value, buckets):
    """Multiplicative (Fibonacci) hashing of an n-gram written as a number in base 31."""
    return np.int64(((value * _GOLDEN) >> _SHIFT) % buckets)


@kernel
def _hash_features(letters, lengths, ngrams, skips, buckets, ids):
    symbols = np.zeros(letters.shape[1] + 2, np.uint64)
    symbols[0] = np.uint64(27)
    for i in range(letters.shape[0]):
        count, size = 0, np.int64(lengths[i]) + 2
        for j in range(size - 2):
            symbols[j + 1] = np.uint64(letters[i, j])
        symbols[size - 1] = np.uint64(28)
        for n in ngrams:
            for j in range(size - n + 1):
                value = np.uint64(n)
                for t in range(n):
                    value = value * _BASE + symbols[j + t]
                ids[i, count] = _bucket(value, buckets)
                count += 1
        for j in range(size - 2 if skips else 0):
            value = (_SKIP_KIND * _BASE + symbols[j]) * _BASE + symbols[j + 2]
            ids[i, count] = _bucket(value, buckets)
            count += 1
        ids[i, count:] = -1


class Noise:
    """Endless synthetic training data: classes drawn by frequency ** ``alpha``, misspelt and hashed.

    Batch number ``step`` is a function of the constructor's arguments, ``step`` and ``size`` alone, and its first
    examples do not depend on ``size``: a run that is interrupted goes on where it was.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        features: Features | None = None,
        *,
        alpha: float = 0.5,
        rates: Rates | None = None,
        seed: int = 0,
    ):
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.vocabulary, self.features, self.rates = vocabulary, features or Features(), rates or Rates()
        self.seed = seed
        cumulative = np.cumsum(vocabulary.probabilities(alpha))
        self._cumulative = cumulative / cumulative[-1]  # ends in exactly 1, so that no draw falls behind the end

    def batch(self, size: int, step: int) -> tuple[Tensor, Tensor]:
        """(classes int64 [size], feature ids int64 [size, features of the longest] padded with -1)."""
        classes = np.empty(size, np.int64)
        draw_classes(self._cumulative, np.uint64(self.seed), np.uint64(step), classes)
        return torch.from_numpy(classes), self.features.encode_codes(*self.misspell(classes, step))

    def misspell(self, classes: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Misspelt words of ``classes`` (int64 [n]): codes uint8 [n, 32] and lengths int32 [n]."""
        codes, lengths = np.empty((len(classes), LETTERS_WIDTH), np.uint8), np.empty(len(classes), np.int32)
        source, numbers = self.vocabulary, (np.uint64(self.seed), np.uint64(step))
        misspell(source.letters, source.lengths, classes, *numbers, self.rates, codes, lengths)
        return codes, lengths
