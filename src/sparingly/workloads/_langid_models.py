"""Networks that name a text's language: n-grams alone, and a transformer over bytes; and the former as one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.nn import SelectiveBag
from sparingly.nn._program_kernels import linear
from sparingly.ops._numba import axpy_eight, kernel
from sparingly.workloads._lm_model import NgramBank
from sparingly.workloads._onnx import session
from sparingly.workloads.langid_data import Texts, from_bytes, name_ngrams

GAIN = 2.0
"""Rows learn at twice the rate of the rest."""


class Ngrams(nn.Module):
    """Rows of a text's hashed n-grams, summed, normed and read by one layer; ``width`` 0: rows are the scores.

    P. Bojanowski et al., "Enriching Word Vectors with Subword Information", TACL 2017; as a classifier: A. Joulin et
    al., "Bag of Tricks for Efficient Text Classification", EACL 2017.

    Args:
        classes: how many languages.
        width: of a row.
        orders: how many bytes an n-gram has, rising.
        bits: 2 ** bits rows.
        dropout: of rows, see :class:`sparingly.nn.SelectiveBag`.
    """

    def __init__(self, classes: int, width: int, orders: Sequence[int], bits: int, dropout: float = 0.0):
        super().__init__()
        self.orders, self.bits, self.width = np.array(orders, np.int64), bits, width
        std = 1e-3 if width else 1e-4
        self.bag = SelectiveBag(1 << bits, width or classes, gain=GAIN, std=std, dropout=dropout)
        self.norm = nn.LayerNorm(width) if width else nn.Identity()
        self.out = nn.Linear(width, classes) if width else nn.Identity()

    def names(self, texts: Texts) -> Tensor:
        """int64 [n, n-grams of the longest], padded with -1."""
        longest = int(texts.lengths.max()) if len(texts) else 0
        ids = np.empty((len(texts), (longest + 2) * len(self.orders)), np.int64)
        name_ngrams(texts.text.numpy(), texts.lengths.numpy(), self.orders, self.bits, ids)
        return torch.from_numpy(ids)

    def forward(self, texts: Texts) -> Tensor:
        """Logits [n, classes]."""
        return self.out(self.norm(self.bag(self.names(texts))))


class Block(nn.Module):
    """Attention over all places that hold text, then a feed-forward layer, both on what is normed first."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, here: Tensor) -> Tensor:
        """x [n, T, width]; here bool [n, 1, 1, T] -> [n, T, width]."""
        n, places, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, places, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=here)
        x = x + self.dropout(self.mix(found.transpose(1, 2).reshape(n, places, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class ByteTransformer(nn.Module):
    """The large network: n-grams as in :class:`Ngrams`, beside a transformer over patches of four bytes.

    A place of the transformer is four bytes, each of them the sum of rows for itself and the n-grams that end there
    (A. Pagnoni et al., Byte Latent Transformer, 2024, section 3.2.1).

    Args:
        ngrams: trained; they stay as they are, and are no part of its state.
        width, layers, heads: of the transformer.
        longest: bytes of a text that it looks at.
    """

    PATCH, ROWS = 4, 32

    def __init__(self, ngrams: Ngrams, classes: int, width: int, layers: int, longest: int, heads: int = 4):
        super().__init__()
        # Not a submodule: its rows would be written with every state that training keeps.
        self.longest, self._ngrams = longest, (ngrams,)
        self.bank = NgramBank(self.ROWS, (1, 2, 3), 16)
        self.enter = nn.Linear(self.ROWS * self.PATCH, width)
        self.places = nn.Parameter(0.02 * torch.randn(1, -(-longest // self.PATCH), width))
        self.blocks = nn.ModuleList(Block(width, heads, 0.1) for _ in range(layers))
        self.norm = nn.LayerNorm(2 * width)
        self.out = nn.Linear(2 * width, classes)
        # It begins as the n-grams alone.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def scores(self, texts: Texts) -> Tensor:
        """What the n-grams say, [n, classes]; in training with rows left out, as while they were trained."""
        self._ngrams[0].train(self.training)
        with torch.no_grad():
            return self._ngrams[0](texts)

    def patches(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """(float32 [n, T, PATCH * ROWS], bool [n, T]: whether a patch holds text)."""
        lengths = texts.lengths.clamp(max=self.longest)
        size = -(-max(1, int(lengths.max())) // self.PATCH) * self.PATCH
        text = F.pad(texts.text[:, :size], (0, max(0, size - texts.text.shape[1])))
        here = torch.arange(size) < lengths[:, None]
        rows = self.bank(self.bank.names(text)).view(len(texts), size, self.ROWS) * here[:, :, None]
        return rows.view(len(texts), size // self.PATCH, -1), here.view(len(texts), -1, self.PATCH).any(2)

    def read(self, rows: Tensor, here: Tensor, scores: Tensor) -> Tensor:
        """What :meth:`patches` and :meth:`scores` give -> logits [n, classes]."""
        x = (self.enter(rows) + self.places[:, : rows.shape[1]]) * here[:, :, None]
        for block in self.blocks:
            x = block(x, here[:, None, None, :])
        gone = ~here[:, :, None]
        most = x.masked_fill(gone, -1e4).amax(1)
        mean = x.masked_fill(gone, 0.0).sum(1) / here.sum(1, keepdim=True)
        return self.out(self.norm(torch.cat([most, mean], 1))) + scores

    def forward(self, texts: Texts) -> Tensor:
        """Logits [n, classes]."""
        return self.read(*self.patches(texts), self.scores(texts))


def from_list(texts: list[bytes]) -> Texts:
    """What a user gives -> what networks read; labels are 0."""
    text, lengths = from_bytes(texts)
    return Texts(text, lengths, torch.zeros(len(texts), dtype=torch.int64))


class InOnnx:
    """A :class:`ByteTransformer` whose layers run in ONNX Runtime on one thread; rows are looked up as in PyTorch.

    texts list[bytes] -> probabilities float32 [n, classes]. Raises ImportError without its packages.
    """

    def __init__(self, model: ByteTransformer):
        self._model = model
        with torch.no_grad():
            texts = from_list([b"a" * 8] * 2)
            example = (*model.patches(texts), model.scores(texts))

        class Read(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, rows: Tensor, here: Tensor, scores: Tensor) -> Tensor:
                return self.model.read(rows, here, scores).softmax(1)

        axes = {"x0": {0: "n", 1: "t"}, "x1": {0: "n", 1: "t"}, "x2": {0: "n"}, "y": {0: "n"}}
        self._session = session(Read().eval(), example, axes)
        self._names = [one.name for one in self._session.get_inputs()]

    @torch.no_grad()
    def __call__(self, texts: list[bytes]) -> np.ndarray:
        given = from_list(texts)
        parts = (*self._model.patches(given), self._model.scores(given))
        return self._session.run(None, dict(zip(self._names, (part.numpy() for part in parts), strict=True)))[0]


@kernel
def _answer(text, lengths, orders, bits, table, gain, shift, eps, rows, bias, out):
    """Probabilities of every text, from its bytes: all of :class:`Ngrams` in one pass.

    text uint8 [n, T]; table float32 [2 ** bits, width]; gain and shift [width] of the norm, rows [classes, width] and
    bias [classes] of the layer; out [n, classes].
    """
    width, classes = table.shape[1], rows.shape[0]
    ids = np.empty((1, (text.shape[1] + 2) * orders.size + 8), np.int64)
    hidden = np.empty((1, width), np.float32)
    one, scores = np.float32(1.0), np.empty((1, classes), np.float32)
    weights = (one, one, one, one, one, one, one, one)
    for i in range(text.shape[0]):
        name_ngrams(text[i : i + 1], lengths[i : i + 1], orders, bits, ids)
        hidden[0, :] = 0
        count = 0
        while ids[0, count] >= 0:
            count += 1
        whole = count - count % 8
        for j in range(0, whole, 8):
            r = ids[0, j : j + 8]
            axpy_eight(weights, (r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]), table, hidden, 0)
        for j in range(whole, count):
            for d in range(width):
                hidden[0, d] += table[ids[0, j], d]
        mean, square, scale = 0.0, 0.0, GAIN / np.sqrt(max(1, count))
        for d in range(width):
            hidden[0, d] *= scale
            mean += hidden[0, d]
        mean /= width
        for d in range(width):
            square += (hidden[0, d] - mean) ** 2
        spread = 1 / np.sqrt(square / width + eps)
        for d in range(width):
            hidden[0, d] = (hidden[0, d] - mean) * spread * gain[d] + shift[d]
        linear(hidden, rows, bias, scores)
        most, total = scores[0].max(), np.float32(0)
        for c in range(classes):
            scores[0, c] = np.exp(scores[0, c] - most)
            total += scores[0, c]
        for c in range(classes):
            out[i, c] = scores[0, c] / total


class OneCall:
    """Trained :class:`Ngrams` of some width as one compiled call: texts list[bytes] -> probabilities [n, classes]."""

    def __init__(self, model: Ngrams):
        if not model.width:
            raise ValueError("n-grams whose rows are the scores have no layer to compile: width is 0")
        norm, out = model.norm, model.out
        assert isinstance(norm, nn.LayerNorm) and isinstance(out, nn.Linear)
        parts: list[Any] = [norm.weight, norm.bias, norm.eps, out.weight, out.bias]
        arrays = [part.detach().numpy() if isinstance(part, Tensor) else part for part in parts]
        self._rest = (model.orders, model.bits, model.bag.weight.detach().numpy(), *arrays)
        self._classes = out.out_features

    def __call__(self, texts: list[bytes]) -> np.ndarray:
        text, lengths = from_bytes(texts)
        out = np.empty((len(texts), self._classes), np.float32)
        _answer(text.numpy(), lengths.numpy(), *self._rest, out)  # pyright: ignore[reportCallIssue]
        return out
