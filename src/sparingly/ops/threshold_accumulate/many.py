"""Product of many tokens with the inputs that pass their cut: rows are read block by block for all of them.

The kernel in :mod:`.cpu` goes token by token, so that each token reads its rows anew from the outer caches: right for
one token, dear for a sentence or an image. Here a block of inputs at a time serves a group of tokens while a tile of
their rows lies in the first cache, with the sums of a token in registers, and the rows of the next block that some
token keeps are asked for meanwhile. Microseconds of processor time on a virtual EPYC 9004, rows [1536, 384] in
float32, one thread, other work running beside it, inputs kept at random:

======  =====================  ====  ====  ====  ====
tokens  ONNX Runtime's MatMul  15 %  25 %  40 %  70 %
======  =====================  ====  ====  ====  ====
8       234                    126   125   136   174
12      274                    148   153   175   231
20      344                    174   226   223   324
98      1264                   600   751   944   1380
======  =====================  ====  ====  ====  ====
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import types
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._numba import add_atomically, inlined, intrinsic, prefetch_row
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import record_rows
from sparingly.ops._threads import chunks_for, run_chunks
from sparingly.ops._views import CPU, matrix_at, vector_at

LEAST_TOKENS = 8
"""From so many tokens on, reading a row once for all of them pays."""

TILE_BYTES = 24 * 1024
"""Of a tile, a block of rows as wide as the sums in registers: it stays in the first cache."""

GROUP_BYTES = 1 << 19
"""Of a group of tokens: its inputs, what they keep and its sums stay in the second cache."""

MULTIPLE = 8
"""Inputs and outputs come in multiples of so many."""

VECTORS = 7
"""At most so many vectors of sums are in registers, of 16 floats, or of 8 where outputs are no multiple of 16."""

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


def _places_of_bits() -> np.ndarray:
    """int32 [256, 8]: for each byte the places of its ones, rising, then zeros."""
    table = np.zeros((1 << MULTIPLE, MULTIPLE), np.int32)
    for byte in range(1 << MULTIPLE):
        ones = [place for place in range(MULTIPLE) if byte >> place & 1]
        table[byte, : len(ones)] = ones
    return table


_TABLE = torch.from_numpy(_places_of_bits())


def _vector(builder, kind, address):
    """The vector at an address, which need not be aligned."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 4
    return value


def _put(builder, value, address):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def _spread(builder, kind, value):
    """A vector with the same value everywhere."""
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count))


@intrinsic
def _find_8(typingctx, x, cut, ids, first, table, seen):
    """How many of 8 float32 at the address ``x`` reach ``cut`` (NaN does). Writes their numbers, from ``first``, to
    ``ids`` (int32, room for 8), and sets a bit for each in the byte ``seen``."""

    def codegen(context, builder, signature, args):
        x, cut, ids, first, table, seen = args
        floats, ints, byte = ir.VectorType(_F32, MULTIPLE), ir.VectorType(_I32, MULTIPLE), ir.IntType(MULTIPLE)
        positive = ir.Constant(ints, [0x7FFFFFFF] * MULTIPLE)
        size = builder.bitcast(builder.and_(_vector(builder, ints, x), positive), floats)
        bits = builder.bitcast(builder.fcmp_unordered(">=", size, _vector(builder, floats, cut)), byte)
        at = builder.inttoptr(seen, byte.as_pointer())
        builder.store(builder.or_(builder.load(at), bits), at)
        bits = builder.zext(bits, _I64)
        places = _vector(builder, ints, builder.add(table, builder.mul(bits, ir.Constant(_I64, 4 * MULTIPLE))))
        start = _spread(builder, ints, builder.trunc(first, _I32))
        _put(builder, builder.add(places, start), ids)
        return builder.ctpop(bits)

    return types.int64(*[types.int64] * 6), codegen


def _add_loop(builder, lanes, vectors, args):
    """The loop of :func:`_adding` for so many vectors, from the block that the builder is in to a new one."""
    sums, ids, weights, start, stop, rows, row_bytes = args
    kind, four = ir.VectorType(_F32, lanes), ir.Constant(_I64, 4)
    bytes_of = [ir.Constant(_I64, 4 * lanes * k) for k in range(vectors)]
    begun = [_vector(builder, kind, builder.add(sums, k)) for k in bytes_of]
    entry, loop, body, end = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(loop)
    builder.position_at_end(loop)
    place = builder.phi(_I64)
    place.add_incoming(start, entry)
    totals = [builder.phi(kind) for _ in begun]
    for total, value in zip(totals, begun, strict=True):
        total.add_incoming(value, entry)
    builder.cbranch(builder.icmp_signed("<", place, stop), body, end)
    builder.position_at_end(body)
    at = builder.inttoptr(builder.add(ids, builder.mul(place, four)), _I32.as_pointer())
    row = builder.zext(builder.load(at), _I64)
    at = builder.inttoptr(builder.add(weights, builder.mul(row, four)), _F32.as_pointer())
    weight = _spread(builder, kind, builder.load(at))
    base = builder.add(rows, builder.mul(row, row_bytes))
    for total, k in zip(totals, bytes_of, strict=True):
        part = builder.fmul(weight, _vector(builder, kind, builder.add(base, k)), flags=["contract"])
        total.add_incoming(builder.fadd(total, part, flags=["contract"]), body)
    place.add_incoming(builder.add(place, ir.Constant(_I64, 1)), body)
    builder.branch(loop)
    builder.position_at_end(end)
    for total, k in zip(totals, bytes_of, strict=True):
        _put(builder, total, builder.add(sums, k))


def _adding(lanes: int):
    """An intrinsic that adds weighted rows, some vectors of ``lanes`` wide, to sums that stay in registers."""

    @intrinsic
    def add(typingctx, vectors, sums, ids, weights, start, stop, rows, row_bytes):
        """``sums += weights[id] * rows[id]`` for ``id`` in ``ids[start..stop]`` (int32); all at addresses."""

        def codegen(context, builder, signature, args):
            end = builder.append_basic_block()
            ways = builder.switch(args[0], end)
            for vectors in range(1, VECTORS + 1):
                way = builder.append_basic_block()
                ways.add_case(ir.Constant(_I64, vectors), way)
                builder.position_at_end(way)
                _add_loop(builder, lanes, vectors, args[1:])
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return add


_add_16, _add_8 = _adding(16), _adding(8)


@inlined
def _find(values, n, block, cut, table, ids, stops, token, seen):
    """The inputs of a token that pass their cut, rising, to ids, and where each block of them ends; at addresses."""
    kept = 0
    for number in range(stops.shape[1] - 1):
        stops[token, number] = kept
        for unit in range(number * block, min(n, (number + 1) * block), MULTIPLE):
            kept += _find_8(values + unit * 4, cut + unit * 4, ids + kept * 4, unit, table, seen + (unit >> 3))
    stops[token, stops.shape[1] - 1] = kept
    return kept


@compiled
def _multiply(tokens, n, d, block, values, rows, sums, ids, stops, seen):
    """Add the kept rows of a group of tokens to sums: a block of inputs at a time, a tile of columns at a time."""
    bank = matrix_at(rows, n, d, np.float32)
    lanes = 16 if d % 16 == 0 else 8
    vectors = d // lanes
    tiles = (vectors + VECTORS - 1) // VECTORS
    steps = tokens * tiles
    for number in range(stops.shape[1] - 1):
        # Rows of the next block are asked for one after the other, evenly spread over the work on this one.
        ahead, last, due = (number + 1) * block, min((number + 2) * block, n), 0
        for tile in range(tiles):
            first = vectors * tile // tiles
            wide, column = vectors * (tile + 1) // tiles - first, first * lanes * 4
            for token in range(tokens):
                due += block
                while due >= steps:
                    due -= steps
                    if ahead < last and seen[ahead >> 3] >> (ahead & 7) & 1:
                        prefetch_row(bank, ahead)
                    ahead += 1
                start, stop = stops[token, number], stops[token, number + 1]
                mine, weights = ids + token * (n + MULTIPLE) * 4, values + token * n * 4
                to = sums + token * d * 4 + column
                if lanes == 16:
                    _add_16(wide, to, mine, weights, start, stop, rows + column, d * 4)
                else:
                    _add_8(wide, to, mine, weights, start, stop, rows + column, d * 4)


@compiled
def part(begin, end, chunks, sizes, places):
    """Serve the chunks ``begin..end`` of equal parts of the tokens; what lies where, see :func:`run`.

    ``seen``: room for [chunks, n / 8] with a bit for each input that passed for some token, or 0 if nobody asks.
    """
    tokens, n, d, group, block = sizes
    x, centre, cut, rows, bias, sums, ran, seen, table = places
    start, middle = vector_at(bias, d, np.float32), vector_at(centre, n, np.float32)
    total, given = matrix_at(sums, tokens, d, np.float32), matrix_at(x, tokens, n, np.float32)
    ids = np.empty((group, n + MULTIPLE), np.int32)
    stops = np.empty((group, (n + block - 1) // block + 1), np.int64)
    centred = np.empty((group if middle.size else 0, n), np.float32)
    marks = np.empty(n // MULTIPLE, np.uint8)
    for chunk in range(begin, end):
        marks[:] = 0
        visited, begun, last = 0, tokens * chunk // chunks, tokens * (chunk + 1) // chunks
        for first in range(begun, last, group):
            here = min(group, last - first)
            values = x + first * n * 4
            if middle.size:
                values = centred.ctypes.data
                for token in range(here):
                    for unit in range(n):
                        centred[token, unit] = given[first + token, unit] - middle[unit]
            for token in range(here):
                mine, at = values + token * n * 4, ids.ctypes.data + token * (n + MULTIPLE) * 4
                visited += _find(mine, n, block, cut, table, at, stops, token, marks.ctypes.data)
                for j in range(d):
                    total[first + token, j] = start[j] if start.size else np.float32(0.0)
            _multiply(here, n, d, block, values, rows, sums + first * d * 4, ids.ctypes.data, stops, marks)
        if seen:
            matrix_at(seen, chunks, n // MULTIPLE, np.uint8)[chunk] = marks
        counts = vector_at(ran, 4, np.int64)
        add_atomically(counts, 0, last - begun)
        add_atomically(counts, 1, visited)


def takes(tokens: int, rows: Tensor, scale: Tensor | None) -> bool:
    """True if :func:`run` serves so many tokens with these contiguous rows."""
    n, d = rows.shape
    return (
        tokens >= LEAST_TOKENS
        and scale is None
        and rows.dtype is torch.float32
        and n > 0
        and d > 0
        and n % MULTIPLE == 0
        and d % MULTIPLE == 0
    )


def run(
    x: Tensor,
    rows: Tensor,
    cut: Tensor,
    bias: Tensor | None,
    ran: Tensor,
    read: tuple[Tensor | None, ...] = (),
    centre: Tensor | None = None,
) -> Tensor:
    """``bias + sum of (x - centre) * rows`` over the inputs whose ``|x - centre|`` reaches its cut.

    x [tokens, n], rows [n, d], cut and centre [n], bias [d], contiguous float32 on the CPU, of sizes that :func:`takes`
    allows -> [tokens, d]; ran int64 [4] grows by tokens and by inputs that passed. ``read``: what x, cut and bias were
    made from, for the ledger; there a row that several tokens keep is read once, since it stays in a cache meanwhile.
    Threads share out the tokens.
    """
    tokens, (n, d) = x.shape[0], rows.shape
    sums = torch.empty((tokens, d), dtype=torch.float32, device=CPU)
    # From the first cache some four products take as long as a byte of rows from memory.
    work_bytes = tokens * n * d // 4
    chunks = chunks_for(tokens, work_bytes)
    group = max(LEAST_TOKENS, min(-(-tokens // chunks), GROUP_BYTES // (8 * n + 4 * d)))
    tile = VECTORS * (16 if d % 16 == 0 else 8)
    block = min(n, TILE_BYTES // (4 * min(d, tile)) // MULTIPLE * MULTIPLE)
    counting = ledger.active()
    before = int(ran.numpy()[1]) if counting else 0
    seen = torch.empty((chunks, n // MULTIPLE), dtype=torch.uint8, device=CPU) if counting else None
    arrays = (x, centre, cut, rows, bias, sums, ran, seen, _TABLE)
    places = tuple([0 if array is None else array.data_ptr() for array in arrays])
    run_chunks(part, chunks, work_bytes, chunks, (tokens, n, d, group, block), places, keep=arrays)
    if seen is not None:
        passed = tuple([tensor for tensor in (*(read or (x, cut, bias)), centre) if tensor is not None])
        record_rows(
            "threshold_accumulate",
            int(ran.numpy()[1]) - before,
            rows,
            read=passed,
            written=(sums,),
            other=x.numel() * (1 if centre is None else 2),
            distinct=int(np.unpackbits(np.bitwise_or.reduce(seen.numpy(), axis=0)).sum()),
        )
    return sums
