"""Units found by walking a graph of similar units towards the input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._arrays import as_numpy, as_vector
from sparingly.ops._pages import request_huge_pages
from sparingly.ops._threads import run_chunks
from sparingly.selection import Selection
from sparingly.selectors import _graph_build as building
from sparingly.selectors._graph_links import FOUND, link
from sparingly.selectors._graph_search import META_BYTES, encode_rows, exact_rows, search
from sparingly.selectors.base import Selector, check_bank

LINE = 64
LINK_BEAMS = (256, 64)
"""Beams that look for links: for the first eighth of the inputs, and for the rest, which has the first one's links."""


class Graph(Selector):
    """Approximate maximum-inner-product search on a graph, with exact scores for the best it finds.

    Every unit keeps a *record* of ``code_bytes`` (its row projected on the bank's main directions, as int8, with its
    scale and bias) and a list of ``degree`` similar units. A query scores the entry records, then walks:
    the neighbours of the best unit so far are scored by their records until the ``setting`` best ones (the beam) have
    been looked at; the best 32 of those, or a quarter of the beam, get exact scores from the bank's own rows. Some 800
    records of 128 bytes and 32 rows are read for 289,000 units. Choose it for one input at a time and for CPUs; for
    GPUs and blocks see ``Partition``.

    Inner products do not make a graph, distances do: neighbours are the nearest by cosine, and since the walk compares
    full logits (norm and bias included), rows with large norms do not draw every list to themselves.

    Args:
        degree: neighbours kept for each unit, even.
        code_bytes: bytes of a record, a multiple of 64 (a cache line); 8 of them are scale and bias.
        entries: records that every walk scores first.
        beam: the first ``setting``, how many units the walk keeps.
        slack: the walk also ends when no unit within ``slack * (1 + log2(beam))`` nats of the best one is left to
            look at: with a peaked softmax most walks end early. On trained word vectors (288,992 x 256, links from
            inputs) a beam of 96 scored 624 units with it, not 2,000, for an agreement of 0.996.
        seed: of the clustering.

    Runs on CPU tensors; ``topk`` on another device raises NotImplementedError (``SelectiveHead`` then answers exactly
    and counts it). bfloat16, float16 and int8 banks work.

    Source: Malkov and Yashunin, Efficient and robust approximate nearest neighbor search using hierarchical navigable
    small world graphs, TPAMI 2020 (walk, algorithm 2; diversity of lists, algorithm 4); Jayaram Subramanya et al.,
    DiskANN, NeurIPS 2019 (compressed codes lead the walk, exact rows rank its end; second pass over the lists)::

        @article{malkov2020hnsw, title={Efficient and Robust Approximate Nearest Neighbor Search Using Hierarchical
          Navigable Small World Graphs}, author={Malkov, Yu A. and Yashunin, D. A.}, journal={IEEE TPAMI},
          volume={42}, number={4}, year={2020}}
        @inproceedings{subramanya2019diskann, title={DiskANN: Fast Accurate Billion-point Nearest Neighbor Search on a
          Single Node}, author={Jayaram Subramanya, Suhas and Devvrit and Kadekodi, Rohan and Krishaswamy, Ravishankar
          and Simhadri, Harsha Vardhan}, booktitle={NeurIPS}, year={2019}}
    """

    projection: Tensor
    records: Tensor
    neighbours: Tensor
    entry_ids: Tensor

    def __init__(
        self,
        degree: int = 48,
        code_bytes: int = 128,
        entries: int = 256,
        beam: int = 128,
        slack: float = 0.75,
        seed: int = 0,
    ):
        super().__init__()
        if degree < 4 or degree % 2:
            raise ValueError(f"degree must be even and at least 4, got {degree}")
        if code_bytes < LINE or code_bytes % LINE:
            raise ValueError(f"code_bytes must be a positive multiple of {LINE}, got {code_bytes}")
        if entries < 1 or beam < 1:
            raise ValueError(f"entries and beam must be at least 1, got {entries} and {beam}")
        if not slack > 0:
            raise ValueError(f"slack must be above 0 (math.inf turns it off), got {slack}")
        self.degree, self.code_bytes, self.entries, self.slack, self.seed = degree, code_bytes, entries, slack, seed
        self.setting = beam
        self.register_buffer("projection", torch.empty(0, 0))
        self.register_buffer("records", torch.empty(0, code_bytes, dtype=torch.int8))
        self.register_buffer("neighbours", torch.empty(0, degree, dtype=torch.int32))
        self.register_buffer("entry_ids", torch.empty(0, dtype=torch.int32))
        self._arrays: tuple[Any, ...] | None = None

    def config(self) -> dict[str, Any]:
        names = ("degree", "code_bytes", "entries", "slack", "seed")
        return {**{name: getattr(self, name) for name in names}, "setting": self.setting}

    def settings(self) -> list[int]:
        """Beams from 8 to 512, cheapest first."""
        return [8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512]

    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        """Build records and lists; 289,000 rows of 256 take about 40 processor-seconds, each input another 40 us.

        With ``hidden`` [n, d], inputs like those to come, units that are best together for an input become neighbours.
        On 288,992 trained word vectors 400,000 inputs lifted the agreement at the same 430 records from 0.964 to 0.986,
        1.2 million to 0.992: four per unit are worth having.
        """
        check_bank(bank, bias)
        rows = bank.detach().float().cpu().contiguous()
        shift = None if bias is None else bias.detach().float().cpu()
        with torch.no_grad():
            projection = main_directions(rows, min(rows.shape[1], self.code_bytes - META_BYTES), self.seed)
            projected = rows @ projection.T
            records = torch.zeros(rows.shape[0], self.code_bytes, dtype=torch.int8)
            views = (projected.numpy(), as_vector(shift), records.numpy(), records.numpy().view(np.float32))
            run_chunks(encode_rows, rows.shape[0], projected.nbytes, *views)
            # A hidden state behind a LayerNorm is sqrt(d) long.
            reach = math.sqrt(rows.shape[1])
            lists, entries = building.build(projected, records.numpy(), reach, self.degree, self.entries, self.seed)
            del projected, views
            if hidden is not None and rows.shape[0] > FOUND:
                states = as_numpy(hidden.detach().float().cpu().contiguous())
                views = walk_views(projection, records, torch.from_numpy(entries))
                lists = self._linked(lists, states, views, (as_numpy(rows), as_vector(None), as_vector(shift)))
        self.projection, self.records = projection.to(bank.device), records.to(bank.device)
        self.neighbours = torch.from_numpy(lists).to(bank.device)
        self.entry_ids = torch.from_numpy(entries).to(bank.device)
        self.num_units = rows.shape[0]

    def _linked(
        self, lists: np.ndarray, states: np.ndarray, views: tuple[Any, ...], bank: tuple[Any, ...]
    ) -> np.ndarray:
        """The lists with links from inputs: states [n, d]; views and bank as ``search`` takes them."""
        found = np.empty((len(states), FOUND), np.int64)
        begin, linked = 0, lists
        for end, beam in zip((-(-len(states) // 8), len(states)), LINK_BEAMS, strict=True):
            part, count = slice(begin, end), end - begin
            scores, counts = np.empty((count, FOUND), np.float32), np.empty((count, 3), np.int64)
            arguments = (*views, linked, beam, np.float32(self._slack(beam)), *bank)
            run_chunks(search, count, count * beam * 2048, states[part], *arguments, scores, found[part], counts)
            begin, linked = end, link(lists, found[:end])
        return linked

    def _slack(self, beam: int) -> float:
        return self.slack * (1.0 + math.log2(beam))

    def select(self, hidden: Tensor) -> Selection:
        """The units whose rows are read, at most 32 a token or a quarter of the beam; -1 where the walk found fewer."""
        count = min(exact_rows(self.setting), self.setting, self.num_units)
        _, ids = self.topk(hidden, torch.zeros(self.num_units, 0), None, count)
        return Selection(ids=ids, num_units=self.num_units)

    def topk(
        self, hidden: Tensor, bank: Tensor, bias: Tensor | None, k: int, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As in :class:`Selector`; the walk and the exact scores run as one compiled call a token."""
        self.check_fitted()
        if not (hidden.is_cpu and bank.is_cpu and self.records.is_cpu):
            raise NotImplementedError(f"Graph walks on the CPU only, got tensors on {hidden.device} and {bank.device}")
        tokens = hidden.shape[0]
        states = as_numpy(hidden.detach().float().contiguous())
        scores = np.empty((tokens, k), np.float32)
        classes = np.empty((tokens, k), np.int64)
        counts = np.empty((tokens, 3), np.int64)
        arguments = self.arguments(bank, bias, scale, k)
        run_chunks(search, tokens, tokens * self.setting * 2048, states, *arguments, scores, classes, counts)
        if ledger.active():
            self._record(counts, bank, scale, bias, hidden, k)
        return torch.from_numpy(scores), torch.from_numpy(classes)

    def arguments(self, bank: Tensor, bias: Tensor | None, scale: Tensor | None, k: int) -> tuple[Any, ...]:
        """What the compiled ``search`` takes between hidden states and results."""
        rows = as_numpy(bank if bank.dtype in (torch.float32, torch.bfloat16, torch.int8) else bank.float())
        beam = max(self.setting, k)
        limits = (beam, np.float32(self._slack(beam)))
        return (
            *self._views(),
            *limits,
            rows,
            as_vector(scale),
            as_vector(None if bias is None else bias.detach().float()),
        )

    def _views(self) -> tuple[Any, ...]:
        """The buffers as arrays, made once: conversion costs as much as a tenth of a walk."""
        buffers = (self.projection, self.records, self.neighbours, self.entry_ids)
        key = tuple(buffer.data_ptr() for buffer in buffers)
        if self._arrays is None or self._arrays[0] != key:
            for buffer in (self.records, self.neighbours):
                request_huge_pages(buffer)  # Short page walks: 5 to 15 % of a walk, where the system grants it.
            views = (*walk_views(self.projection, self.records, self.entry_ids), self.neighbours.numpy())
            self._arrays = (key, views)
        return self._arrays[1]

    def _record(
        self, counts: Any, bank: Tensor, scale: Tensor | None, bias: Tensor | None, hidden: Tensor, k: int
    ) -> None:
        tokens = hidden.shape[0]
        scored, lists, exact = (int(total) for total in counts.sum(0))
        records = scored + tokens * self.entry_ids.numel()
        ledger.record(
            "graph_projection",
            dtype=torch.float32,
            macs=tokens * self.projection.numel(),
            bytes_read=self.projection.nbytes * tokens + hidden.nbytes,
            bytes_written=tokens * self.code_bytes,
        )
        ledger.record(
            "graph_walk",
            dtype=torch.int8,
            macs=records * self.projection.shape[0],
            other=records,
            bytes_read=records * self.code_bytes + lists * self.degree * 4,
        )
        extra = 4 * ((scale is not None) + (bias is not None))
        ledger.record(
            "graph_exact",
            dtype=bank.dtype,
            macs=exact * bank.shape[1],
            other=exact,
            bytes_read=exact * (bank.shape[1] * bank.element_size() + extra),
            bytes_written=tokens * k * 12,
        )

    def negatives(self, hidden: Tensor, target: Tensor, count: int) -> Tensor | None:
        """Random neighbours of the targets: the units most like them, at no search (NGAME's idea, without its batches).

        Lists age as weights train, slowly enough to stay hard. None before the first fit.
        """
        if not self.fitted or count < 1:
            return None
        targets = target[target >= 0]
        if targets.numel() == 0:
            return None
        chosen = targets[torch.randint(targets.numel(), (count,), device=targets.device)]
        place = torch.randint(self.degree, (count,), device=targets.device)
        ids = self.neighbours[chosen, place].long()
        return ids[ids >= 0]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._arrays = None  # Loading writes into the same memory, and the entries' records are a copy.

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_arrays": None}


def walk_views(projection: Tensor, records: Tensor, entry_ids: Tensor) -> tuple[Any, ...]:
    """What ``search`` takes between the hidden states and the lists: records come twice, as bytes and as float32."""
    codes, entries = records.numpy(), entry_ids.numpy()
    entry_codes = codes[entries]
    pairs = (codes, codes.view(np.float32), entry_codes, entry_codes.view(np.float32))
    return (as_numpy(projection.float().contiguous()), *pairs, entries)


def main_directions(rows: Tensor, count: int, seed: int) -> Tensor:
    """Orthonormal [count, d]: the main axes of a sample of rows [n, d], largest first."""
    generator = torch.Generator().manual_seed(seed)
    sample = rows
    if rows.shape[0] > 100_000:
        sample = rows[torch.randint(rows.shape[0], (100_000,), generator=generator)]
    _, axes = torch.linalg.eigh((sample.T @ sample).double())
    return axes.flip(1)[:, :count].T.float().contiguous()
