"""Text of Debian packages as bytes, in three parts by document; and what counting n-grams of it predicts.

The documents and their parts are those of :class:`sparingly.workloads.smollm_data.Texts`, both kinds together:

========  ===========================================  ==========
part      documents                                    bytes
========  ===========================================  ==========
"train"   "fit", and three quarters of "calibration"   20,300,000
"dev"     the other quarter of "calibration"           1,900,000
"test"    "held_out"                                   7,900,000
========  ===========================================  ==========
"""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparingly.workloads.smollm_data import KINDS, Texts

PARTS = ("train", "dev", "test")


class Corpus:
    """The text of each part.

    Attributes:
        parts: name -> uint8 [bytes], documents one after the other in an order that is random and always the same.
        sha256: kind -> of its documents; frozen: whether these are the ones that published figures are of.

    Raises FileNotFoundError, saying what to install, where there are no documents under ``root``.
    """

    def __init__(self, root: str | os.PathLike[str] = "/usr/share/doc"):
        texts = Texts(None, root)
        named: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
        for kind in KINDS:
            calibration = texts.names("calibration", kind)
            cut = len(calibration) * 3 // 4
            named["train"] += [(kind, name) for name in texts.names("fit", kind) + calibration[:cut]]
            named["dev"] += [(kind, name) for name in calibration[cut:]]
            named["test"] += [(kind, name) for name in texts.names("held_out", kind)]
        self.parts: dict[str, Tensor] = {}
        for part, names in named.items():
            names.sort(key=lambda one: hashlib.sha256("/".join(one).encode()).digest())
            joined = b"".join(texts.documents(kind)[name].encode() for kind, name in names)
            self.parts[part] = torch.from_numpy(np.frombuffer(joined, np.uint8).copy())
        self.sha256 = {kind: texts.sha256(kind) for kind in KINDS}
        self.frozen = all(texts.frozen(kind) for kind in KINDS)

    def windows(self, part: str, n: int, length: int) -> Tensor:
        """uint8 [n, length], evenly spaced over a part. Raises ValueError if they would overlap."""
        text = self.parts[part]
        if n < 1 or length < 1 or n * length > len(text):
            raise ValueError(f'"{part}" holds {len(text)} bytes, asked for {n} windows of {length}')
        firsts = torch.linspace(0, len(text) - length, n, dtype=torch.float64).long()
        return text[firsts[:, None] + torch.arange(length)]

    def sample(self, n: int, length: int, generator: torch.Generator) -> Tensor:
        """uint8 [n, length], from random places of the training text."""
        text = self.parts["train"]
        return text[torch.randint(len(text) - length + 1, (n, 1), generator=generator) + torch.arange(length)]


class _Order(NamedTuple):
    """grams uint64 rising, a context's bytes and the next one, and how often each came; the same of contexts, with how
    many different bytes came next."""

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray


class Counts:
    """The next byte from how often it came after the last ``order`` bytes, mixed with the counts after fewer of them.

    The incumbent: nothing is trained, all of the text is counted in seconds. A context's counts weigh as much as the
    bytes that came after it, the shorter context as much as there were different ones, so that chances add up to one.
    Witten, Bell, The Zero-Frequency Problem, IEEE Transactions on Information Theory, 1991, method C.

    Args:
        text: uint8 [bytes].
        order: of the longest context, 0..7. All of the training text, bits per byte of held-out text: order 5 2.093,
            6 2.100, 7 2.145.
    """

    def __init__(self, text: np.ndarray, order: int = 5):
        if not 0 <= order <= 7:
            raise ValueError(f"order must be in 0..7, so that a context and a byte fit 64 bits, got {order}")
        self.orders = []
        for size in range(order + 1):
            grams, counts = np.unique(_grams(text, size + 1), return_counts=True)
            contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
            kinds = np.diff(first, append=len(grams))
            self.orders.append(_Order(grams, counts, contexts, np.add.reduceat(counts, first), kinds))

    def bits(self, windows: np.ndarray) -> np.ndarray:
        """windows uint8 [n, T + 1] -> [n, T]: bits of every byte but the first, from those before it."""
        chances = np.full((windows.shape[0], windows.shape[1] - 1), 1 / 256)
        for size, order in enumerate(self.orders):
            grams = np.stack([_grams(window, size + 1) for window in windows])
            counts = _found(order.grams, order.counts, grams)
            totals = _found(order.contexts, order.totals, grams >> np.uint64(8))
            kinds = _found(order.contexts, order.kinds, grams >> np.uint64(8))
            # The first bytes of a window have no context of this size; no context of size 0 stands before the first.
            if size == 0:
                counts, totals, kinds = counts[:, 1:], totals[:, 1:], kinds[:, 1:]
            lower = chances[:, max(0, size - 1) :]
            lower[:] = np.where(totals > 0, (counts + kinds * lower) / np.maximum(totals + kinds, 1), lower)
        return -np.log2(chances)


def _grams(text: np.ndarray, size: int) -> np.ndarray:
    """uint64 [bytes - size + 1]: every ``size`` bytes in a row as one number, the first of them highest."""
    count = len(text) - size + 1
    found = np.zeros(count, np.uint64)
    for place in range(size):
        found = found << np.uint64(8) | text[place : place + count]
    return found


def _found(names: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted name, 0 for one that is not there; ``names`` rising."""
    places = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
    return np.where(names[places] == wanted, values[places], 0)
