"""Product with the inputs that pass their cut on the CPU: each row that counts is read once, the others never."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._arrays import not_for_numba
from sparingly.ops._numba import EIGHT, add_atomically, axpy, axpy_eight, eight, inlined
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import record_rows
from sparingly.ops._threads import chunks_for, most_alone, run_chunks
from sparingly.ops._views import CPU, LIKE, matrix_at, vector_at
from sparingly.ops.threshold_accumulate import many


@inlined
def count_kept(x, token, cut):
    """How many elements of ``x[token]`` pass their cut: all but those of a magnitude below it, so also NaN."""
    kept = 0
    for unit in range(cut.size):
        kept += not (abs(x[token, unit]) < cut[unit])
    return kept


@inlined
def find_kept(x, token, cut, ids):
    """Write the units of ``x[token]`` that pass their cut to ids [n + 1], rising; returns how many."""
    kept = 0
    for unit in range(cut.size):
        # Written in any case and overwritten if it was cut: a branch would be mispredicted half the time.
        ids[kept] = unit
        kept += not (abs(x[token, unit]) < cut[unit])
    return kept


@inlined
def fill(sums, bias):
    """``sums[token] = bias``, or zeros where bias is empty."""
    for token in range(sums.shape[0]):
        for j in range(sums.shape[1]):
            sums[token, j] = bias[j] if bias.size else np.float32(0.0)


@inlined
def count_ran(ran, tokens, units):
    """Add what ran selectively to ran [4]."""
    add_atomically(ran, 0, tokens)
    add_atomically(ran, 1, units)


@inlined
def _weight(x, token, scale, row):
    return x[token, row] * scale[row] if scale.size else x[token, row]


@inlined
def add_rows(ids, start, stop, x, token, rows, scale, sums, target):
    """``sums[target] +=`` the rows ``ids[start..stop]``, weighted by ``x[token]``."""
    rounds = (stop - start) // EIGHT
    for place in range(start, start + rounds):
        chosen = eight(ids, place, rounds)
        a, b, c, d, e, f, g, h = chosen
        weights = (
            _weight(x, token, scale, a),
            _weight(x, token, scale, b),
            _weight(x, token, scale, c),
            _weight(x, token, scale, d),
            _weight(x, token, scale, e),
            _weight(x, token, scale, f),
            _weight(x, token, scale, g),
            _weight(x, token, scale, h),
        )
        axpy_eight(weights, chosen, rows, sums, target)
    for place in range(start + EIGHT * rounds, stop):
        axpy(_weight(x, token, scale, ids[place]), rows, ids[place], sums, target)


@compiled
def _sums(first, last, x, cut, rows, scale, sums, partial, chunk):
    """Add the kept units ``first..last``, counted over all tokens, to sums, or where a token began before to partial.

    ``partial[chunk]`` is zero before.
    """
    ids = np.empty(cut.size + 1, np.int64)
    before = 0
    for token in range(x.shape[0]):
        kept = find_kept(x, token, cut, ids)
        start, stop = max(first - before, 0), min(last - before, kept)
        if start == 0 and stop > 0:
            add_rows(ids, start, stop, x, token, rows, scale, sums, token)
        elif start < stop:
            add_rows(ids, start, stop, x, token, rows, scale, partial, chunk)
        before += kept
        if before >= last:
            break


@compiled
def part(start, stop, chunks, visited, partial, like, sizes, places):
    """:func:`_sums` of ``start..stop`` of ``chunks`` equal parts of what lies at addresses; partial [chunks, d].

    Rows are of the type of ``like`` (:mod:`sparingly.ops._views`).
    """
    tokens, n, d = sizes
    x, rows, cut, scale, _, sums, _ = places
    parts = matrix_at(partial, chunks, d, np.float32)
    for chunk in range(start, stop):
        if chunks > 1:
            for j in range(d):
                parts[chunk, j] = 0.0
        _sums(
            visited * chunk // chunks,
            visited * (chunk + 1) // chunks,
            matrix_at(x, tokens, n, np.float32),
            vector_at(cut, n, np.float32),
            matrix_at(rows, n, d, like.dtype),
            vector_at(scale, n, np.float32),
            matrix_at(sums, tokens, d, np.float32),
            parts,
            chunk,
        )


@compiled
def _begin(most, like, sizes, places):
    """How many units pass their cut. Sums become the bias, and up to ``most`` units are added at once."""
    tokens, n, d = sizes
    x, _, cut, _, bias, sums, ran = places
    fill(matrix_at(sums, tokens, d, np.float32), vector_at(bias, d, np.float32))
    visited = 0
    for token in range(tokens):
        visited += count_kept(matrix_at(x, tokens, n, np.float32), token, vector_at(cut, n, np.float32))
    count_ran(vector_at(ran, 4, np.int64), tokens, visited)
    if visited <= most:
        part(0, 1, 1, visited, 0, like, sizes, places)
    return visited


@compiled
def merge(chunks, visited, partial, sizes, x, cut, sums):
    """Add what chunks have summed of tokens that they did not begin, in the order of the chunks."""
    tokens, n, d = sizes
    total, parts = matrix_at(sums, tokens, d, np.float32), matrix_at(partial, chunks, d, np.float32)
    values, cuts = matrix_at(x, tokens, n, np.float32), vector_at(cut, n, np.float32)
    token, before, kept = 0, 0, count_kept(values, 0, cuts)
    for chunk in range(1, chunks):
        first = visited * chunk // chunks
        while first >= before + kept:
            before += kept
            token += 1
            kept = count_kept(values, token, cuts)
        if first > before:
            for j in range(d):
                total[token, j] += parts[chunk, j]


def as_f32(tensor: Tensor) -> Tensor:
    """The tensor itself if its memory holds it as contiguous float32, else a copy that does."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().float().contiguous()


def is_plain(tensor: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> bool:
    """True for None and for a tensor of this shape and dtype whose memory holds it as it is, contiguous."""
    return tensor is None or (
        tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and not tensor.is_neg()
    )


def is_bank(rows: Tensor) -> bool:
    """True for a matrix of a dtype that kernels take whose memory holds it as it is, contiguous."""
    return rows.dtype in LIKE and rows.dim() == 2 and rows.is_contiguous() and not rows.is_neg()


def why_not_banks(*banks: Tensor) -> str | None:
    """A reason if one of the banks stands for the negative of its memory (no address could tell), or None."""
    return "rows have their negative bit set" if any(bank.is_neg() for bank in banks) else None


def fits(x: Tensor, rows: Tensor, cut: Tensor, scale: Tensor | None, bias: Tensor | None, ran: Tensor) -> bool:
    """True if :func:`run` takes the arguments as they are; says of no other what is wrong with them.

    For the usual arguments this is all that has to be looked at, and takes a third of the time of ``check`` and
    :func:`unsupported`, which matters: a token decoded calls 180 times.
    """
    if x.dim() != 2 or not is_bank(rows):
        return False
    n, d = rows.shape
    return (
        is_plain(x, x.shape[0], n)
        and is_plain(cut, n)
        and is_plain(ran, 4, dtype=torch.int64)
        and (scale is None or (rows.dtype is torch.int8 and is_plain(scale, n)))
        and is_plain(bias, d)
    )


def unsupported(
    x: Tensor, rows: Tensor, cut: Tensor, scale: Tensor | None, bias: Tensor | None, ran: Tensor
) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    return not_for_numba(x, rows, cut, scale, bias, contiguous=(rows, ran)) or why_not_banks(rows)


def kernel(x: Tensor, rows: Tensor, cut: Tensor, scale: Tensor | None, bias: Tensor | None, ran: Tensor) -> Tensor:
    """See :func:`sparingly.ops.threshold_accumulate.threshold_accumulate`."""
    scales, biases = None if scale is None else as_f32(scale), None if bias is None else as_f32(bias)
    return run(as_f32(x), rows, as_f32(cut), scales, biases, ran, read=(x, cut, bias))


def run(
    x: Tensor,
    rows: Tensor,
    cut: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    ran: Tensor,
    read: tuple[Tensor | None, ...] = (),
) -> Tensor:
    """:func:`kernel` of contiguous float32 tensors; ``read``: what they were made from, for the ledger.

    Threads share out the rows, also those of one token. Sums are the same in every run with as many threads.
    """
    tokens, (n, d) = x.shape[0], rows.shape
    if many.takes(tokens, rows, scale):
        return many.run(x, rows, cut, bias, ran, read)
    sums = torch.empty((tokens, d), dtype=torch.float32, device=CPU)
    # One by one: a loop over the seven takes twice the time.
    places = (
        x.data_ptr(),
        rows.data_ptr(),
        cut.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        sums.data_ptr(),
        ran.data_ptr(),
    )
    like, sizes = LIKE[rows.dtype], (tokens, n, d)
    row_bytes = d * rows.element_size()
    most = most_alone(row_bytes)
    visited = _begin(most, like, sizes, places)
    if visited > most:
        work_bytes = visited * row_bytes
        chunks = chunks_for(visited, work_bytes)
        partial = torch.empty((chunks, d), dtype=torch.float32, device=CPU)
        at = partial.data_ptr()
        keep = (x, rows, cut, scale, bias, sums, ran, partial)
        run_chunks(part, chunks, work_bytes, chunks, visited, at, like, sizes, places, keep=keep)
        merge(chunks, visited, at, sizes, places[0], places[2], places[5])
    if ledger.active():
        passed = tuple([tensor for tensor in read or (x, cut, bias) if tensor is not None])
        record_rows("threshold_accumulate", visited, rows, scale, read=passed, written=(sums,), other=tokens * n)
    return sums
