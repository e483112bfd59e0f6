"""A small causal decoder over bytes, with a bank of n-gram rows, and three engines that decode with it byte by byte."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.nn import SelectiveBag, compile_plan
from sparingly.nn._attention_kernels import attend
from sparingly.nn._program_kernels import linear
from sparingly.nn._program_kernels import run_one as run_program
from sparingly.ops._numba import axpy, kernel
from sparingly.ops._pages import request_huge_pages
from sparingly.ops._views import matrix_at, vector_at
from sparingly.workloads._onnx import session
from sparingly.workloads._trained import Residual

SYMBOLS, CONTEXT, HEAD = 256, 128, 32
"""Values of a byte, bytes that a network looks back at most, width of an attention head."""

BANK_GAIN = np.float32(2.0)
"""Rows of the bank count so much: with one learning rate for everything they learn at twice the others' rate. Bits per
byte on development text after 30 processor-seconds without feed-forward layer: 2.067 at 2, 2.073 at 4."""

_MIX = np.uint64(0x9E3779B97F4A7C15)


@kernel
def name_rows(text, first, stop, orders, bits, ids):
    """Rows of a bank that the last bytes up to each of text[:, first:stop] name: ids [n * (stop - first), orders].

    text uint8 [n, T]; orders int64, rising, how many bytes name a row; each has 2 ** bits rows of its own. -1 where a
    window has not as many bytes yet.
    """
    for window in range(text.shape[0]):
        for place in range(first, stop):
            token = window * (stop - first) + place - first
            name, order = np.uint64(0), 0
            for j in range(orders.size):
                ids[token, j] = -1
            for back in range(min(place + 1, orders[orders.size - 1])):
                name = (name ^ (np.uint64(text[window, place - back]) + np.uint64(1))) * _MIX
                if back + 1 == orders[order]:
                    ids[token, order] = (order << bits) + np.int64(name >> np.uint64(64 - bits))
                    order += 1


class NgramBank(nn.Module):
    """A row for each of the last n bytes, summed: a token reads as many rows as there are orders, of 100,000s.

    What an n-gram says is looked up, not computed: capacity that costs a token next to nothing, in training too. Rows
    are shared by n-grams of the same hash.

    Args:
        width: of a row.
        orders: how many bytes name a row, rising.
        bits: 2 ** bits rows for each order.

    n-gram embeddings of bytes by hash: Pagnoni et al., Byte Latent Transformer, 2024, section 3.2.1; of tokens: Huang
    et al., Over-Tokenized Transformer, 2025::

        @article{pagnoni2024byte, title={Byte Latent Transformer: Patches Scale Better Than Tokens}, author={Pagnoni,
          Artidoro and Pasunuru, Ram and Rodriguez, Pedro and Nguyen, John and Muller, Benjamin and Li, Margaret and
          Zhou, Chunting and Yu, Lili and Weston, Jason and Zettlemoyer, Luke and Ghosh, Gargi and Lewis, Mike and
          Holtzman, Ari and Iyer, Srinivasan}, journal={arXiv:2412.09871}, year={2024}}
    """

    def __init__(self, width: int, orders: tuple[int, ...], bits: int):
        super().__init__()
        self.orders, self.bits = np.array(orders, np.int64), bits
        self.bag = SelectiveBag(len(orders) << bits, width, gain=float(BANK_GAIN), std=1e-3)

    def names(self, text: Tensor, first: int = 0) -> Tensor:
        """text uint8 [n, T] -> ids int64 [n * (T - first), orders]; see :func:`name_rows`."""
        ids = np.empty((text.shape[0] * (text.shape[1] - first), self.orders.size), np.int64)
        name_rows(text.contiguous().numpy(), first, text.shape[1], self.orders, self.bits, ids)
        return torch.from_numpy(ids)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [tokens, orders] -> [tokens, width]."""
        return self.bag(ids)


class Attention(nn.Module):
    """Causal, with the rotation of J. Su et al., RoFormer, 2021, in halves."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """x [n, T, width], normed; turn [2, T, HEAD] -> [n, T, width]."""
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_turned(q, turn), _turned(k, turn), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(n, t, width))

    def step(self, x: Tensor, turn: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """One byte: x [1, width], turn [2, 1, HEAD], past [2, heads, t, HEAD] -> ([1, width], past with t + 1)."""
        q, k, v = self.qkv(x).view(3, self.heads, 1, HEAD)
        now = torch.cat((past, torch.stack((_turned(k, turn), v))), dim=2)
        weights = (_turned(q, turn) @ now[0].transpose(1, 2) * HEAD**-0.5).softmax(dim=2)
        return self.out((weights @ now[1]).view(1, -1)), now


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat((-high, low), dim=-1) * turn[1]


@dataclass(frozen=True)
class Shape:
    """A network: its width, layers, ``ffn(width)`` of each layer (None: no feed-forward), orders of its bank (none: no
    bank) with 2 ** bits rows each."""

    width: int = 64
    layers: int = 1
    ffn: Callable[[int], nn.Module] | None = None
    orders: tuple[int, ...] = ()
    bits: int = 16


class Decoder(nn.Module):
    """Embedding and bank, layers of attention and feed-forward, and the scores of the next byte."""

    turn: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        if shape.width % HEAD:
            raise ValueError(f"width must be a multiple of a head's, {HEAD}, got {shape.width}")
        width, layers = shape.width, range(shape.layers)
        self.shape, self.heads = shape, width // HEAD
        self.embedding = nn.Embedding(SYMBOLS, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.bank = NgramBank(width, shape.orders, shape.bits) if shape.orders else None
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)
        self.attention = nn.ModuleList(Attention(width) for _ in layers)
        ffn = shape.ffn
        self.ffn = nn.ModuleList(nn.Identity() if ffn is None else Residual(width, ffn(width)) for _ in layers)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, SYMBOLS))
        angles = torch.outer(torch.arange(CONTEXT).float(), 1e4 ** (-torch.arange(0, HEAD, 2) / HEAD)).repeat(1, 2)
        self.register_buffer("turn", torch.stack((angles.cos(), angles.sin())), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """text uint8 [n, T <= CONTEXT] -> scores of each next byte [n, T, SYMBOLS]."""
        if text.shape[1] > CONTEXT:
            raise ValueError(f"a window has at most {CONTEXT} bytes, got {text.shape[1]}")
        x, turn = self.embedding(text.int()), self.turn[:, : text.shape[1]]
        if self.bank is not None:
            x = x + self.bank(self.bank.names(text)).view(x.shape)
        for norm, attention, ffn in zip(self.norms, self.attention, self.ffn, strict=True):
            x = x + attention(norm(x), turn)
            x = ffn(x)
        return self.head(x)

    def step(self, byte: Tensor, turn: Tensor, past: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """byte int64 [1], turn [2, 1, HEAD], past [layers, 2, heads, t, HEAD], ids [1, orders] -> scores [1, SYMBOLS],
        past with t + 1."""
        x, kept = self.embedding(byte), []
        if self.bank is not None and ids is not None:
            x = x + self.bank(ids)
        for layer, (norm, ffn) in enumerate(zip(self.norms, self.ffn, strict=True)):
            attention: Any = self.attention[layer]
            mixed, now = attention.step(norm(x), turn, past[layer])
            x = ffn(x + mixed)
            kept.append(now)
        return self.head(x), torch.stack(kept) if kept else past

    def bits(self, windows: Tensor) -> Tensor:
        """windows uint8 [n, T + 1] -> bits of every byte but the first [n, T]."""
        scores = self(windows[:, :-1]).transpose(1, 2)
        return F.cross_entropy(scores, windows[:, 1:].long(), reduction="none") / np.log(2)


class Engine(ABC):
    """Decodes with a network in evaluation mode, one byte at a time, up to CONTEXT of them."""

    name: str

    @abstractmethod
    def begin(self) -> None:
        """Forget all bytes."""

    @abstractmethod
    def step(self, byte: int) -> Any:
        """Scores of the byte after this one [SYMBOLS], float32; valid until the next step."""


class Modules(Engine):
    """PyTorch, operation by operation."""

    name = "pytorch"

    def __init__(self, model: Decoder):
        self.model = model
        self.begin()

    def begin(self) -> None:
        self.text = torch.zeros(1, CONTEXT, dtype=torch.uint8)
        self.position = 0
        self.past: Any = torch.empty(self.model.shape.layers, 2, self.model.heads, 0, HEAD)

    @torch.no_grad()
    def step(self, byte: int) -> Tensor:
        place, bank = self.position, self.model.bank
        self.text[0, place] = byte
        ids = None if bank is None else bank.names(self.text[:, : place + 1], place)
        turn = self.model.turn[:, place : place + 1]
        scores, self.past = self._run(torch.tensor([byte]), turn, self.past, ids)
        self.position += 1
        return scores[0]

    def _run(self, byte: Tensor, turn: Tensor, past: Any, ids: Tensor | None) -> tuple[Any, Any]:
        return self.model.step(byte, turn, past, ids)


class Onnx(Modules):
    """ONNX Runtime on one thread, keys and values in and out; for networks without a bank and selective layers.

    Raises ImportError without its packages.
    """

    name = "onnxruntime"

    def __init__(self, model: Decoder):
        super().__init__(model)
        past = torch.zeros(model.shape.layers, 2, model.heads, 3, HEAD)
        given = torch.zeros(1, dtype=torch.int64), model.turn[:, :1], past
        axes = {"byte": {}, "turn": {}, "past": {3: "t"}, "scores": {}, "now": {3: "u"}}
        self._session = session(_Step(model), given, axes, outputs=2)

    def _run(self, byte: Tensor, turn: Tensor, past: Any, ids: Tensor | None) -> tuple[Any, Any]:
        # What comes out goes in as it is.
        past = past.numpy() if isinstance(past, Tensor) else past
        found: Any = self._session.run(None, {"byte": byte.numpy(), "turn": turn.numpy(), "past": past})
        return torch.from_numpy(found[0]), found[1]


class _Step(nn.Module):
    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model

    def forward(self, byte: Tensor, turn: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.step(byte, turn, past)


# What a compiled step needs of a network: numbers, then addresses; one of ``out`` follows for each layer.
WIDTH, HEADS, LAYERS, BITS, ORDERS, ORDERS_AT, EMBEDDING, BANK, TURN, TEXT, CACHE, X, ROOM, SCORES, OUTS = range(15)


@kernel
def decode(plan, table, eps, bounds, work, byte, position):
    """One byte through the whole network; its scores end up at plan[SCORES].

    The parts between the attentions are programs of :mod:`sparingly.nn._program_kernels`: rows bounds[i] to
    bounds[i + 1] of table and eps. For each layer one up to queries, keys and values and one from its attention on
    (none: no feed-forward), then the head. ``work`` is their workspace.
    """
    width, heads, layers = plan[WIDTH], plan[HEADS], plan[LAYERS]
    text = matrix_at(plan[TEXT], 1, CONTEXT, np.uint8)
    text[0, position] = byte
    x = matrix_at(plan[X], 1, width, np.float32)
    room = plan[ROOM]
    mixed, moved = matrix_at(room, 1, width, np.float32), matrix_at(room + 4 * width, 1, width, np.float32)
    qkv = matrix_at(room + 8 * width, 1, 3 * width, np.float32)
    embedding = matrix_at(plan[EMBEDDING], SYMBOLS, width, np.float32)
    for j in range(width):
        x[0, j] = embedding[byte, j]
    if plan[ORDERS]:
        orders = vector_at(plan[ORDERS_AT], plan[ORDERS], np.int64)
        ids, known = np.empty((1, orders.size), np.int64), 0
        name_rows(text, position, position + 1, orders, plan[BITS], ids)
        while known < orders.size and ids[0, known] >= 0:
            known += 1
        share = BANK_GAIN / np.sqrt(np.float32(max(known, 1)))
        bank = matrix_at(plan[BANK], orders.size << plan[BITS], width, np.float32)
        for j in range(known):
            axpy(share, bank, ids[0, j], x, 0)
    angles = plan[TURN] + 4 * HEAD * position
    sizes = (heads, heads, HEAD, CONTEXT, position)
    nothing = np.empty(0, np.float32)
    for layer in range(layers):
        first, middle, last = bounds[2 * layer], bounds[2 * layer + 1], bounds[2 * layer + 2]
        run_program(table[first:middle], eps[first:middle], x, qkv, work)
        cache = plan[CACHE] + layer * 8 * width * CONTEXT
        places = (room + 8 * width, angles, angles + 4 * HEAD * CONTEXT, cache, room)
        attend(sizes, np.float32(HEAD**-0.5), places)
        linear(mixed, matrix_at(plan[OUTS + layer], width, width, np.float32), nothing, moved)
        for j in range(width):
            x[0, j] += moved[0, j]
        if last > middle:
            run_program(table[middle:last], eps[middle:last], x, moved, work)
            for j in range(width):
                x[0, j] = moved[0, j]
    first, last = bounds[2 * layers], bounds[2 * layers + 1]
    run_program(table[first:last], eps[first:last], x, matrix_at(plan[SCORES], 1, SYMBOLS, np.float32), work)


class Compiled(Engine):
    """One compiled call for a byte: the programs of ``sp.compile_plan`` with the attention between them.

    It reads the model's own parameters: make it again after they were moved.
    """

    name = "one compiled call"

    def __init__(self, model: Decoder):
        layers: list[Any] = list(zip(model.norms, model.attention, model.ffn, strict=True))
        pieces: list[nn.Module | None] = []
        for norm, attention, ffn in layers:
            pieces += [nn.Sequential(norm, attention.qkv).eval(), ffn if isinstance(ffn, Residual) else None]
        plans = [None if piece is None else compile_plan(piece.eval()) for piece in (*pieces, model.head)]
        made = [plan for plan in plans if plan is not None]
        self._table = np.concatenate([plan._table for plan in made])
        self._eps = np.concatenate([plan._epsilons for plan in made])
        sizes = [0 if plan is None else len(plan._table) for plan in plans]
        self._bounds = np.cumsum([0, *sizes]).astype(np.int64)
        self._work = np.empty(max(plan._room for plan in made), np.float32)
        shape, bank = model.shape, model.bank
        self._text = np.zeros(CONTEXT, np.uint8)
        self._cache = np.zeros((shape.layers, 2, model.heads, CONTEXT, HEAD), np.float32)
        self._x, self._room = np.zeros(shape.width, np.float32), np.zeros(5 * shape.width, np.float32)
        self._scores = np.zeros(SYMBOLS, np.float32)
        # Parameters have to live as long as their addresses.
        self._keep: list[Any] = [made, model]
        rows = None if bank is None else bank.bag.weight.detach()
        if rows is not None:
            request_huge_pages(rows)
        orders = np.zeros(0, np.int64) if bank is None else bank.orders
        parts = [orders, model.embedding.weight, rows, model.turn, self._text, self._cache, self._x, self._room]
        parts += [self._scores, *(attention.out.weight for _, attention, _ in layers)]
        numbers = [shape.width, model.heads, shape.layers, shape.bits, orders.size]
        self._plan = np.array(numbers + [_address(part) for part in parts], np.int64)
        self._position = 0

    def begin(self) -> None:
        self._position = 0

    def step(self, byte: int) -> np.ndarray:
        if not 0 <= byte < SYMBOLS or self._position >= CONTEXT:
            raise ValueError(f"a byte in 0..255 at one of {CONTEXT} places, got {byte} at {self._position}")
        decode(self._plan, self._table, self._eps, self._bounds, self._work, byte, self._position)
        self._position += 1
        return self._scores


def _address(part: Tensor | np.ndarray | None) -> int:
    if part is None:
        return 0
    return part.ctypes.data if isinstance(part, np.ndarray) else part.detach().data_ptr()
