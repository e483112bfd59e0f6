"""Units found by a cheap score of every one of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._arrays import as_numpy, as_vector, check_finite, check_matrix
from sparingly.ops._pages import request_huge_pages
from sparingly.ops._record import record_rows
from sparingly.ops._threads import run_chunks
from sparingly.ops._views import LIKE
from sparingly.selection import Selection
from sparingly.selectors._screen import BLOCK, GROUP, ZERO, screen
from sparingly.selectors._weights import WeightFit
from sparingly.selectors.base import Selector, check_bank, check_count

REFERENCE_ELEMENTS = 16 * 1024 * 1024
"""Scores, and gathered rows, that the reference holds at once."""


class Screen(WeightFit):
    """A low-rank int8 score of every unit, then exact scores of the best ``keep`` from the bank's own rows.

    Every unit is a code of ``rank`` bytes that are read in order, which a processor does at its best speed: it pays
    for 10,000 to 1,000,000 units, where ``Graph`` reads less but at random. Besides the best units it yields usable
    scores of all others, which sampling needs: see ``ScreenHead``.

    Args:
        rank: dimensions of a code, a multiple of 4.
        keep: units with exact scores, the first ``setting``.

    With inputs, ``fit`` finds the projection under which the scores of *those* come out best, not the rows: on
    SmolLM2's output layer (49,152 x 576) rank 64 and 1,024 kept then miss the best class for 0.7 % of the tokens, for
    28 % without. The best class needs few exact scores there, the softmax more: at rank 128, 256 kept find the best
    for 99.4 % of the tokens, but 4,096 are needed for a divergence from the exact softmax below 0.01.

    A unit's approximate score is its expected weight in the softmax: what the code leaves out has a variance over the
    inputs, and half of it is added to the score, since E exp(x) = exp(variance / 2) for a normal x of mean 0.

    CPU kernels take float32, bfloat16 and int8 rows; other devices and dtypes run the same steps in PyTorch.

    Source: Shim, Lee, Choi, Boo and Sung, SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural Networks,
    NeurIPS 2017 (low-rank preview, then exact scores of the best). The projection weighted by the inputs is that of
    Chen, Yu, Dhillon and Hsieh, DRONE: Data-aware Low-rank Compression for Large NLP Models, NeurIPS 2021::

        @inproceedings{shim2017svdsoftmax, title={SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural
          Networks}, author={Shim, Kyuhong and Lee, Minjae and Choi, Iksoo and Boo, Yoonho and Sung, Wonyong},
          booktitle={NeurIPS}, year={2017}}
        @inproceedings{chen2021drone, title={DRONE: Data-aware Low-rank Compression for Large NLP Models},
          author={Chen, Patrick and Yu, Hsiang-Fu and Dhillon, Inderjit and Hsieh, Cho-Jui}, booktitle={NeurIPS},
          year={2021}}
    """

    projection: Tensor
    offset: Tensor
    codes: Tensor
    shift: Tensor

    def __init__(self, rank: int = 128, keep: int = 512):
        super().__init__()
        if not isinstance(rank, int) or rank < GROUP or rank % GROUP:
            raise ValueError(f"rank must be a positive multiple of {GROUP}, got {rank!r}")
        self.rank, self._setting = rank, check_count("keep", keep)
        self.register_buffer("projection", torch.empty(0, 0))
        self.register_buffer("offset", torch.empty(0))
        self.register_buffer("codes", torch.empty(0, rank // GROUP, BLOCK, GROUP, dtype=torch.uint8))
        self.register_buffer("shift", torch.empty(0))
        self._arrays: tuple[Any, tuple[Any, ...]] | None = None

    @property
    def setting(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How many units get exact scores, at least 1."""
        return self._setting

    @setting.setter
    def setting(self, keep: int) -> None:
        self._setting = check_count("setting", keep)

    def config(self) -> dict[str, Any]:
        """``rank``, ``keep`` and ``setting``."""
        return {"rank": self.rank, "keep": self.setting, "setting": self.setting}

    def settings(self) -> list[int]:
        """How many units get exact scores: 16, 24, 32, ... 4096, cheapest first, below the number of units."""
        counts = [count for power in range(4, 12) for count in (1 << power, 3 << power - 1)] + [4096]
        return [count for count in counts if count < self.num_units] if self.fitted else []

    @torch.no_grad()
    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        """Find the projection and encode the bank; 49,152 rows of 576 take 3 processor-seconds.

        With ``hidden`` [n, d], inputs like those to come, some per dimension: the scores of those come out best, and
        the approximate scores sum to the right softmax. Without, the rows themselves do, which is much worse (see the
        class). bias [num_units] counts.
        """
        check_bank(bank, bias)
        if bank.shape[1] < 1:
            raise ValueError(f"bank must have at least one column, got {list(bank.shape)}")
        rows = bank.detach().float().cpu()
        states = None
        if hidden is not None and hidden.shape[0]:
            check_matrix("hidden", hidden, rows.shape[1])
            states = hidden.detach().float().cpu().contiguous()
            check_finite("hidden", states)
        fitted = low_rank(rows, None if bias is None else bias.detach().float().cpu(), states, self.rank)
        for name, value in fitted._asdict().items():
            setattr(self, name, value.to(bank.device))
        self._arrays = None
        self.remember(bank.detach(), bias)
        self.num_units = rows.shape[0]

    def select(self, hidden: Tensor) -> Selection:
        """hidden [tokens, d] -> ids [tokens, keep], in rising order; -1 for a token that is not finite."""
        self.check_fitted()
        rows = torch.zeros(self.num_units, self.projection.shape[1] if not hidden.is_cpu else 0)
        return Selection(self._run(hidden, rows.to(hidden), None, None, 0).kept.long(), self.num_units)

    def topk(
        self, hidden: Tensor, bank: Tensor, bias: Tensor | None, k: int, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As in :class:`Selector`; on the CPU everything is one compiled call."""
        found = self._run(hidden, bank, bias, scale, k)
        return found.scores, found.classes

    def logits(self, hidden: Tensor, bank: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
        """hidden [tokens, d] -> float32 [tokens, num_units]: exact for the best ``setting`` units, expected elsewhere.

        Operands as in :meth:`topk`. A token that is not finite gets NaN.
        """
        return self._run(hidden, bank, bias, scale, 0, every=True).logits

    @property
    def fitted_shape(self) -> bool:
        """As ``fitted``, from the buffers' sizes: nothing is read, so that a compiler can follow."""
        return self._buffers["shift"].shape[0] > 0  # pyright: ignore[reportOptionalMemberAccess]

    def _run(
        self, hidden: Tensor, bank: Tensor, bias: Tensor | None, scale: Tensor | None, k: int, every: bool = False
    ) -> Screened:
        if not self.fitted_shape:
            self.check_fitted()
        fitted = self.parts()
        check_matrix("hidden", hidden, fitted.projection.shape[1])
        units = fitted.shift.shape[0]
        if bank.shape[0] != units:
            raise ValueError(f"bank must have {units} rows, as when fitted, got {bank.shape[0]}")
        keep = min(max(self.setting, k), units)
        if _for_compiled(hidden, bank) and fitted.codes.is_cpu:
            found = _compiled(self._views(fitted, bank), hidden, bank, bias, scale, k, keep, every)
        else:
            found = _reference(fitted, hidden, bank, bias, scale, k, keep)
        if ledger.active():
            self._record(hidden, bank, (scale, bias), keep)
        return found

    def parts(self) -> Fitted:
        """What is read for each token."""
        # Past the module's look-up by name, which takes 0.5 us for each.
        return Fitted(*[self._buffers[name] for name in Fitted._fields])  # pyright: ignore[reportArgumentType]

    def _views(self, fitted: Fitted, bank: Tensor) -> tuple[Any, ...]:
        """The buffers as arrays, made once: conversion costs as much as a tenth of a scan.

        Exact scores are of rows far apart: 1,024 of 2 KB took 0.8 ms of a virtual EPYC 7003 in pages of 4 KB, 0.3 ms in
        those of 2 MB.
        """
        key = [tensor.data_ptr() for tensor in (bank, *fitted)]
        if self._arrays is None or self._arrays[0] != key:
            _check_fit(fitted)
            for tensor in (fitted.codes, bank):
                request_huge_pages(tensor)
            self._arrays = (key, tuple(as_numpy(buffer.contiguous()) for buffer in fitted))
        return self._arrays[1]

    def _record(self, hidden: Tensor, bank: Tensor, vectors: tuple[Tensor | None, ...], keep: int) -> None:
        tokens = hidden.shape[0]
        ledger.record(
            "screen_projection",
            dtype=torch.float32,
            macs=tokens * self.projection.numel(),
            bytes_read=tokens * (self.projection.nbytes + self.offset.nbytes) + hidden.nbytes,
            bytes_written=tokens * (self.projection.shape[0] - 1),
        )
        ledger.record(
            "screen_scan",
            dtype=torch.int8,
            macs=tokens * self.codes.numel(),
            other=tokens * self.num_units * 3,  # scale, shift, comparison
            bytes_read=tokens * (self.codes.nbytes + 2 * self.shift.nbytes),  # scores are read again
            bytes_written=tokens * self.shift.nbytes,
        )
        record_rows("screen_exact", tokens * keep, bank, *vectors, read=(), written=())

    def _apply(self, fn: Any, recurse: bool = True) -> Selector:
        super()._apply(fn, recurse)
        self._arrays = None
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._arrays = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_arrays": None}


class Screened(NamedTuple):
    """What a screen hands back."""

    logits: Tensor  # float32 [tokens, N], or [0, N] if not asked for
    kept: Tensor  # whole numbers [tokens, keep], or [0, keep]
    scores: Tensor  # float32 [tokens, k]
    classes: Tensor  # int64 [tokens, k]


class Fitted(NamedTuple):
    """The buffers of a :class:`Screen`."""

    projection: Tensor
    offset: Tensor
    codes: Tensor
    shift: Tensor


def _check_fit(fitted: Fitted) -> None:
    """Raise RuntimeError unless the buffers fit together, as those of a broken file may not: compiled code reads on."""
    units, dimensions = fitted.shift.shape[0], fitted.codes.shape[1] * GROUP
    if (
        fitted.codes.shape != (-(-units // BLOCK), dimensions // GROUP, BLOCK, GROUP)
        or fitted.projection.shape[0] != dimensions + 1
        or fitted.offset.shape[0] != dimensions + 1
    ):
        raise RuntimeError("the screen's buffers do not fit together; call fit(bank) again")


def _for_compiled(hidden: Tensor, bank: Tensor) -> bool:
    on_cpu = hidden.is_cpu and bank.is_cpu and bank.is_contiguous()
    return on_cpu and bank.dtype in LIKE and hidden.dtype != torch.float64


def screen_states(
    fitted: Fitted, hidden: Tensor, bank: Tensor, scale: Tensor | None, bias: Tensor | None, keep: int
) -> Tensor:
    """:meth:`Screen.logits` from its buffers."""
    if _for_compiled(hidden, bank) and fitted.codes.is_cpu:
        views = tuple(as_numpy(buffer.contiguous()) for buffer in fitted)
        return _compiled(views, hidden, bank, bias, scale, 0, keep, True).logits
    return _reference(fitted, hidden, bank, bias, scale, 0, keep).logits.float()


def _compiled(
    views: tuple[Any, ...],
    hidden: Tensor,
    bank: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    k: int,
    keep: int,
    every: bool,
) -> Screened:
    tokens, units = hidden.shape[0], bank.shape[0]
    found = Screened(
        torch.empty((tokens if every else 0, units), dtype=torch.float32, device="cpu"),
        torch.empty((0 if every or k else tokens, keep), dtype=torch.int32, device="cpu"),
        torch.empty((tokens, k), dtype=torch.float32, device="cpu"),
        torch.empty((tokens, k), dtype=torch.int64, device="cpu"),
    )
    states = as_numpy(hidden.detach().float().contiguous())
    vectors = (as_vector(scale), as_vector(None if bias is None else bias.detach().float()))
    arguments = (*views, keep, as_numpy(bank), *vectors, *[tensor.numpy() for tensor in found])
    run_chunks(screen, tokens, tokens * views[2].nbytes, states, *arguments)
    return found


@torch.no_grad()
def _reference(
    fitted: Fitted, hidden: Tensor, bank: Tensor, bias: Tensor | None, scale: Tensor | None, k: int, keep: int
) -> Screened:
    """The same steps in PyTorch, for any device and dtype; scores that are equal may be cut otherwise."""
    block = max(1, REFERENCE_ELEMENTS // max(bank.shape[0], keep * bank.shape[1]))
    # Unsigned as they lie in memory, in the order of the units: [N, rank].
    codes = fitted.codes.movedim(2, 1).flatten(0, 1).flatten(1)[: bank.shape[0]].float() - ZERO
    parts = [_few(fitted, codes, part, bank, bias, scale, k, keep) for part in hidden.split(block)]
    return Screened(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _few(
    fitted: Fitted,
    codes: Tensor,
    hidden: Tensor,
    bank: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    k: int,
    keep: int,
) -> Screened:
    projected = hidden.float() @ fitted.projection.float().T - fitted.offset.float()
    query, common = projected[:, :-1], projected[:, -1:]
    step = query.abs().amax(1, keepdim=True) / 127
    query = torch.where(step > 0, query / step, 0.0).round()
    # Integers below 2^24: float32 adds them up exactly in any order.
    logits = (query @ codes.T) * step + (fitted.shift.float() + common)
    kept = logits.topk(keep, dim=1).indices.sort(dim=1).values
    dtype = torch.float64 if torch.float64 in (hidden.dtype, bank.dtype) else torch.float32
    values = torch.bmm(bank[kept].to(dtype), hidden.to(dtype).unsqueeze(2)).squeeze(2)
    values = values if scale is None else values * scale[kept]
    values = values if bias is None else values + bias[kept].to(dtype)
    logits = logits.to(dtype).scatter(1, kept, values)
    best = values.topk(k, dim=1)
    bad = ~torch.isfinite(step + common)
    classes = kept.gather(1, best.indices).masked_fill(bad, -1)
    scores = best.values.float().masked_fill(bad, float("-inf"))
    return Screened(logits.masked_fill(bad, float("nan")), kept.masked_fill(bad, -1), scores, classes)


def low_rank(rows: Tensor, bias: Tensor | None, hidden: Tensor | None, rank: int) -> Fitted:
    """Projection and codes for rows [N, d] that lose least of the scores of ``hidden`` [n, d], all float32.

    With the inputs' mean m and covariance C, and the rows' mean taken off (every class has that in common), the best
    approximation of ``rows @ C^(1/2)`` of rank r is that of its main axes V: codes ``rows @ C^(1/2) V``, queries
    ``V^T C^(-1/2) (h - m)``. What the codes leave out of a unit has the variance ``row C row - code code`` there.
    """
    mean_row = rows.mean(0)
    mean = rows.new_zeros(rows.shape[1]) if hidden is None else hidden.mean(0)
    root, inverse, covariance = _roots(rows.shape[1], None if hidden is None else hidden - mean)
    centred = rows - mean_row
    moment = (centred.T @ centred).double()
    axes = torch.linalg.eigh(root @ moment @ root)[1].flip(1)[:, :rank]
    codes = centred @ (root @ axes).float()
    left_out = ((centred @ covariance) * centred).sum(1) - codes.square().sum(1)
    shift = centred @ mean + (0.0 if bias is None else bias)
    if hidden is not None:
        shift += left_out.clamp_min(0.0) / 2
    # The query takes on the size of each dimension, so that the codes of each use all of their 8 bits.
    step = codes.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    projection = (axes.T @ inverse).float() * step[:, None]
    projection = torch.nn.functional.pad(projection, (0, 0, 0, rank - projection.shape[0]))
    offset = torch.cat([projection @ mean, mean.new_zeros(1)])
    codes = torch.nn.functional.pad((codes / step).round_().clamp_(-127, 127), (0, rank - codes.shape[1]))
    return Fitted(torch.cat([projection, mean_row[None]]), offset, _blocks(codes), shift)


def _roots(d: int, centred: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(C^(1/2), C^(-1/2)) float64 and C float32 of centred inputs [n, d]; the identity without any."""
    if centred is None:
        eye = torch.eye(d, dtype=torch.float64)
        return eye, eye, eye.float()
    covariance = (centred.T @ centred).double() / centred.shape[0]
    # Few inputs do not span the space: what they leave out counts a little all the same.
    covariance.diagonal().add_(covariance.trace() / d * max(1e-4, 0.1 * d / (d + centred.shape[0])) + 1e-12)
    values, axes = torch.linalg.eigh(covariance)
    values = values.clamp_min(1e-12)
    return (axes * values.sqrt()) @ axes.T, (axes / values.sqrt()) @ axes.T, covariance.float()


def _blocks(codes: Tensor) -> Tensor:
    """Whole numbers [N, rank] in -127..127 -> uint8 [blocks, rank / 4, BLOCK, 4], see ``_screen``."""
    rank = codes.shape[1]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % BLOCK))
    return (padded + ZERO).to(torch.uint8).view(-1, BLOCK, rank // GROUP, GROUP).movedim(2, 1).contiguous()
