"""Product of many tokens with the units that pass their cut, in one compiled call that reads rows block by block.

The operator ``threshold_accumulate`` goes token by token, so that each token reads its rows anew from the outer caches:
right for one token, dear for a sentence. Here 64 units at a time serve every token while a tile of their rows lies in
the first cache, with the sums of a token in registers, and the rows of the next block that some token has kept are
asked for meanwhile. Microseconds of processor time on a virtual EPYC 9004, rows [1536, 384] in float32, one thread,
other work running beside it, units chosen at random:

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
from llvmlite import ir
from numba import types

from sparingly.ops._numba import inlined, intrinsic, prefetch_row
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._views import matrix_at

UNITS = 64
"""Units of a block: a tile of their rows, 96 wide, is 24 KB."""

LANES = 16
TILE = 6 * LANES
GROUP = 8

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


def places_of_bits() -> np.ndarray:
    """int32 [256, 8]: for each byte the places of its ones, rising, then zeros."""
    table = np.zeros((1 << GROUP, GROUP), np.int32)
    for byte in range(1 << GROUP):
        ones = [place for place in range(GROUP) if byte >> place & 1]
        table[byte, : len(ones)] = ones
    return table


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
def passing(typingctx, x, centre, cut, centred, ids, first, table):
    """Of 8 float32 at the address ``x``: writes them less ``centre`` to ``centred``, and the numbers, from ``first``,
    of those that reach ``cut`` to ``ids`` (int32, room for 8); returns a bit for each, set where it does. NaN does."""

    def codegen(context, builder, signature, args):
        x, centre, cut, centred, ids, first, table = args
        floats, ints = ir.VectorType(_F32, GROUP), ir.VectorType(_I32, GROUP)
        value = builder.fsub(_vector(builder, floats, x), _vector(builder, floats, centre))
        _put(builder, value, centred)
        positive = ir.Constant(ints, [0x7FFFFFFF] * GROUP)
        size = builder.bitcast(builder.and_(builder.bitcast(value, ints), positive), floats)
        kept = builder.fcmp_unordered(">=", size, _vector(builder, floats, cut))
        bits = builder.zext(builder.bitcast(kept, ir.IntType(GROUP)), _I64)
        places = _vector(builder, ints, builder.add(table, builder.mul(bits, ir.Constant(_I64, 4 * GROUP))))
        start = _spread(builder, ints, builder.trunc(first, _I32))
        _put(builder, builder.add(places, start), ids)
        return bits

    return types.int64(*[types.int64] * 7), codegen


def _adding(vectors: int):
    """An intrinsic that adds weighted rows, so many vectors of 16 wide, to sums that stay in registers meanwhile."""

    @intrinsic
    def add(typingctx, sums, ids, weights, start, stop, rows, row_bytes):
        """``sums += weights[id] * rows[id]`` for ``id`` in ``ids[start..stop]`` (int32); all at addresses."""

        def codegen(context, builder, signature, args):
            sums, ids, weights, start, stop, rows, row_bytes = args
            kind = ir.VectorType(_F32, LANES)
            bytes_of = [ir.Constant(_I64, 4 * LANES * k) for k in range(vectors)]
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
            four = ir.Constant(_I64, 4)
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
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return add


_add_tile, _add_vector = _adding(TILE // LANES), _adding(1)


@intrinsic
def ones(typingctx, bits):
    """How many bits of an int64 are set."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.int64), codegen


@inlined
def fetch(rows, seen, first, last):
    """Ask for those of ``rows[first..last]`` that some token has kept (one bit each in ``seen``)."""
    for unit in range(first, min(last, rows.shape[0])):
        if seen[0, unit // GROUP] >> (unit % GROUP) & 1:
            prefetch_row(rows, unit)


@compiled
def kept_rows(sizes, places):
    """``out = begin + sum of (x - centre) * rows`` over the units whose ``|x - centre|`` reaches its cut; how many did.

    At addresses, float32: x [tokens, n], centre, cut [n], rows [n, d], begin [d], out [tokens, d]; n a multiple of 8,
    d of 16. Room for: centred [tokens, n], ids int32 [tokens, n + 8], ends int64 [tokens, blocks + 1], seen uint8
    [n / 8]: a bit for each unit, set where some token kept it. ran int64 [4]: grows by tokens and by units that ran.
    """
    tokens, n, d = sizes
    x, centre, cut, rows, begin, out, centred, ids, ends, seen, table, ran = places
    blocks = (n + UNITS - 1) // UNITS
    stops, sums = matrix_at(ends, tokens, blocks + 1, np.int64), matrix_at(out, tokens, d, np.float32)
    start, bank = matrix_at(begin, 1, d, np.float32), matrix_at(rows, n, d, np.float32)
    union = matrix_at(seen, 1, n // GROUP, np.uint8)
    for group in range(n // GROUP):
        union[0, group] = 0
    visited = 0
    for token in range(tokens):
        kept, mine = 0, ids + token * (n + GROUP) * 4
        for block in range(blocks):
            stops[token, block] = kept
            for unit in range(block * UNITS, min(n, (block + 1) * UNITS), GROUP):
                at, by = (token * n + unit) * 4, unit * 4
                bits = passing(x + at, centre + by, cut + by, centred + at, mine + kept * 4, unit, table)
                union[0, unit // GROUP] |= np.uint8(bits)
                kept += ones(bits)
        stops[token, blocks] = kept
        visited += kept
        for j in range(d):
            sums[token, j] = start[0, j]
    counts = matrix_at(ran, 1, 4, np.int64)
    counts[0, 0] += tokens
    counts[0, 1] += visited
    wide = d // TILE * TILE
    steps = tokens * ((d + TILE - 1) // TILE)
    fetch(bank, union, 0, UNITS)
    for block in range(blocks):
        step, following = 0, (block + 1) * UNITS
        for column in range(0, d, TILE):
            for token in range(tokens):
                fetch(bank, union, following + UNITS * step // steps, following + UNITS * (step + 1) // steps)
                step += 1
                first, last = stops[token, block], stops[token, block + 1]
                mine, weights = ids + token * (n + GROUP) * 4, centred + token * n * 4
                to = out + (token * d + column) * 4
                if column < wide:
                    _add_tile(to, mine, weights, first, last, rows + column * 4, d * 4)
                else:
                    for j in range(0, d - wide, LANES):
                        _add_vector(to + j * 4, mine, weights, first, last, rows + (column + j) * 4, d * 4)
    return visited
