"""Gated feed-forward layer on the CPU: up product and down sum of a unit in one loop, of the units that pass alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._arrays import not_for_numba
from sparingly.ops._numba import EIGHT, add_atomically, axpy, axpy_eight, dot, dot_eight, eight, inlined
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._threads import chunks_for, most_alone, run_chunks
from sparingly.ops._views import CPU, LIKE, matrix_at, vector_at
from sparingly.ops.gated_rows._arguments import Arguments
from sparingly.ops.gated_rows._count import record
from sparingly.ops.threshold_accumulate.cpu import (
    as_f32,
    count_kept,
    count_ran,
    fill,
    find_kept,
    is_bank,
    is_plain,
    merge,
    why_not_banks,
)


@inlined
def _value(score, gate, token, row, up_bias, up_scale):
    """What the unit's row of down is multiplied by."""
    if up_scale.size:
        score *= up_scale[row]
    if up_bias.size:
        score += up_bias[row]
    return score * gate[token, row]


@inlined
def _wait(value, row, cut_out, down_scale, rows, weights, waiting):
    """Let the unit's row of down wait, unless the second cut takes it; how many do."""
    if cut_out.size and abs(value) < cut_out[row]:
        return waiting
    rows[waiting] = row
    weights[waiting] = value * down_scale[row] if down_scale.size else value
    return waiting + 1


@inlined
def _add(
    ids, start, stop, gate, hidden, token, up, down, cut_out, up_bias, up_scale, down_scale, sums, target, rows, weights
):
    """``sums[target] +=`` what the units ``ids[start..stop]`` add for a token; how many passed the second cut.

    Rows of down wait until eight have passed. ``rows``, ``weights``: room for two times eight.
    """
    added, waiting = 0, 0
    rounds = (stop - start) // EIGHT
    for first in range(start, start + rounds):
        chosen = eight(ids, first, rounds)
        scores = dot_eight(up, chosen, hidden, token)
        for i in range(EIGHT):
            value = _value(scores[i], gate, token, chosen[i], up_bias, up_scale)
            waiting = _wait(value, chosen[i], cut_out, down_scale, rows, weights, waiting)
        if waiting >= EIGHT:
            axpy_eight(eight(weights, 0, 1), eight(rows, 0, 1), down, sums, target)
            added += EIGHT
            waiting -= EIGHT
            for i in range(waiting):
                rows[i], weights[i] = rows[EIGHT + i], weights[EIGHT + i]
    for place in range(start + EIGHT * rounds, stop):
        row = ids[place]
        value = _value(dot(up, row, hidden, token), gate, token, row, up_bias, up_scale)
        waiting = _wait(value, row, cut_out, down_scale, rows, weights, waiting)
    for i in range(waiting):
        axpy(weights[i], down, rows[i], sums, target)
    return added + waiting


@compiled
def _sums(
    first, last, gate, hidden, up, down, cut, cut_out, up_bias, up_scale, down_scale, sums, partial, chunk, ran, passed
):
    """Add the kept units ``first..last``, counted over all tokens, to sums, or where a token began before to partial.

    ``partial[chunk]`` is zero before. What passed the second cut is added to ``ran[3]`` and ``passed[0]``.
    """
    ids = np.empty(cut.size + 1, np.int64)
    rows, weights = np.empty(2 * EIGHT, np.int64), np.empty(2 * EIGHT, np.float32)
    before, count = 0, 0
    for token in range(gate.shape[0]):
        kept = find_kept(gate, token, cut, ids)
        start, stop = max(first - before, 0), min(last - before, kept)
        if start == 0 and stop > 0:
            count += _add(
                ids, start, stop, gate, hidden, token, up, down, cut_out, up_bias, up_scale, down_scale, sums, token,
                rows, weights,
            )  # fmt: skip
        elif start < stop:
            count += _add(
                ids, start, stop, gate, hidden, token, up, down, cut_out, up_bias, up_scale, down_scale, partial, chunk,
                rows, weights,
            )  # fmt: skip
        before += kept
        if before >= last:
            break
    add_atomically(ran, 3, count)
    add_atomically(passed, 0, count)


@compiled
def part(start, stop, chunks, visited, partial, like_up, like_down, sizes, places):
    """:func:`_sums` of ``start..stop`` of ``chunks`` equal parts of what lies at addresses; partial [chunks, d_out].

    The banks are of the types of ``like_up`` and ``like_down`` (:mod:`sparingly.ops._views`).
    """
    tokens, n, d_in, d_out = sizes
    gate, hidden, up, down, cut, cut_out, up_bias, up_scale, down_scale, _, sums, ran, passed = places
    parts = matrix_at(partial, chunks, d_out, np.float32)
    for chunk in range(start, stop):
        if chunks > 1:
            for j in range(d_out):
                parts[chunk, j] = 0.0
        _sums(
            visited * chunk // chunks,
            visited * (chunk + 1) // chunks,
            matrix_at(gate, tokens, n, np.float32),
            matrix_at(hidden, tokens, d_in, np.float32),
            matrix_at(up, n, d_in, like_up.dtype),
            matrix_at(down, n, d_out, like_down.dtype),
            vector_at(cut, n, np.float32),
            vector_at(cut_out, n, np.float32),
            vector_at(up_bias, n, np.float32),
            vector_at(up_scale, n, np.float32),
            vector_at(down_scale, n, np.float32),
            matrix_at(sums, tokens, d_out, np.float32),
            parts,
            chunk,
            vector_at(ran, 4, np.int64),
            vector_at(passed, 1, np.int64),
        )


@compiled
def _begin(most, like_up, like_down, sizes, places):
    """How many units pass their cut. Sums become the bias, and up to ``most`` units are added at once."""
    tokens, n, _, d_out = sizes
    gate, _, _, _, cut, _, _, _, _, bias, sums, ran, _ = places
    fill(matrix_at(sums, tokens, d_out, np.float32), vector_at(bias, d_out, np.float32))
    visited = 0
    for token in range(tokens):
        visited += count_kept(matrix_at(gate, tokens, n, np.float32), token, vector_at(cut, n, np.float32))
    count_ran(vector_at(ran, 4, np.int64), tokens, visited)
    if visited <= most:
        part(0, 1, 1, visited, 0, like_up, like_down, sizes, places)
    return visited


def fits(args: Arguments) -> bool:
    """True if :func:`run` takes the arguments as they are, as in ``threshold_accumulate``."""
    gate, hidden, up, down, cut, cut_out, up_bias, up_scale, down_scale, bias, ran = args
    if gate.dim() != 2 or not is_bank(up) or not is_bank(down):
        return False
    tokens, (n, d_in) = gate.shape[0], up.shape
    return (
        is_plain(gate, tokens, n)
        and is_plain(hidden, tokens, d_in)
        and down.shape[0] == n
        and is_plain(cut, n)
        and is_plain(cut_out, n)
        and is_plain(ran, 4, dtype=torch.int64)
        and is_plain(up_bias, n)
        and (up_scale is None or (up.dtype is torch.int8 and is_plain(up_scale, n)))
        and (down_scale is None or (down.dtype is torch.int8 and is_plain(down_scale, n)))
        and is_plain(bias, down.shape[1])
    )


def unsupported(*args: Tensor | None) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    given = Arguments._make(args)
    banks = (given.up, given.down)
    return not_for_numba(*given[:-1], contiguous=(*banks, given.ran)) or why_not_banks(*banks)


def kernel(*args: Tensor | None) -> Tensor:
    """See :func:`sparingly.ops.gated_rows.gated_rows`."""
    given = Arguments._make(args)
    banks = ("up", "down", "ran")
    rest = {name: value for name, value in given._asdict().items() if name not in banks and value is not None}
    return run(given._replace(**{name: as_f32(value) for name, value in rest.items()}), read=_whole(given))


def _whole(args: Arguments) -> tuple[Tensor | None, ...]:
    """What passes whole, for the ledger."""
    return args.gate, args.hidden, args.cut, args.cut_out, args.bias


def run(args: Arguments, read: tuple[Tensor | None, ...] = ()) -> Tensor:
    """:func:`kernel` of contiguous float32 tensors; ``read``: what they were made from, for the ledger.

    Threads share out the units, also those of one token. Sums are the same in every run with as many threads.
    """
    gate, hidden, up, down, cut, cut_out, up_bias, up_scale, down_scale, bias, ran = args
    (tokens, n), d_in, d_out = gate.shape, up.shape[1], down.shape[1]
    sums = torch.empty((tokens, d_out), dtype=torch.float32, device=CPU)
    passed = torch.zeros(1, dtype=torch.int64, device=CPU)
    # One by one: a loop over all of them takes twice the time.
    places = (
        gate.data_ptr(),
        hidden.data_ptr(),
        up.data_ptr(),
        down.data_ptr(),
        cut.data_ptr(),
        0 if cut_out is None else cut_out.data_ptr(),
        0 if up_bias is None else up_bias.data_ptr(),
        0 if up_scale is None else up_scale.data_ptr(),
        0 if down_scale is None else down_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        sums.data_ptr(),
        ran.data_ptr(),
        passed.data_ptr(),
    )
    likes, sizes = (LIKE[up.dtype], LIKE[down.dtype]), (tokens, n, d_in, d_out)
    unit_bytes = d_in * up.element_size() + d_out * down.element_size()
    most = most_alone(unit_bytes)
    visited = _begin(most, *likes, sizes, places)
    if visited > most:
        work_bytes = visited * unit_bytes
        chunks = chunks_for(visited, work_bytes)
        partial = torch.empty((chunks, d_out), dtype=torch.float32, device=CPU)
        at = partial.data_ptr()
        keep = (args, sums, passed, partial)
        run_chunks(part, chunks, work_bytes, chunks, visited, at, *likes, sizes, places, keep=keep)
        merge(chunks, visited, at, (tokens, n, d_out), places[0], places[4], places[10])
    if ledger.active():
        record(visited, int(passed), up, down, (up_bias, up_scale), (down_scale,), read or _whole(args), sums)
    return sums
