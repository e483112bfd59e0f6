"""The scan of :class:`sparingly.selectors.screen.Screen`, compiled for the CPU.

Codes lie in blocks of BLOCK classes, and in a block by groups of four dimensions: [blocks, rank / 4, BLOCK, 4]. One
vector instruction then multiplies four dimensions of 16 classes and adds them up, without a sum across a vector.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from sparingly.ops._numba import (
    dot,
    heap_clear,
    heap_push,
    heap_sort,
    inlined,
    intrinsic,
    kernel,
    near_rows,
    prefetch_ahead,
    prefetch_first,
)

BLOCK = 64
"""Classes whose sums are kept in registers at once: four vectors of 16."""
GROUP = 4
"""Dimensions that one instruction adds up."""
ZERO = 128
"""What is stored for a code of 0: codes are unsigned, because the instruction takes unsigned times signed bytes."""
SAMPLE = 16
"""One score in so many is looked at to guess where the best ``keep`` begin."""

LARGEST = np.finfo(np.float32).max
_LANES = 16


def _dot4(builder, fast, total, codes, query):
    """total + sums of codes <64 x i8> unsigned * query <64 x i8> signed: <16 x i32> over groups of four if ``fast``,
    else <32 x i32> over pairs."""
    i32s = ir.VectorType(ir.IntType(32), _LANES)
    if fast:
        signature = ir.FunctionType(i32s, [i32s, i32s, i32s])
        name = "llvm.x86.avx512.vpdpbusd.512"
        function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
        return builder.call(function, [total, builder.bitcast(codes, i32s), builder.bitcast(query, i32s)])
    wide = ir.VectorType(ir.IntType(32), 64)
    # The pattern that becomes one instruction (pmaddwd) on older x86 processors.
    return builder.add(total, _pairs(builder, builder.mul(builder.zext(codes, wide), builder.sext(query, wide))))


def _pairs(builder, values):
    """Sums of neighbours, a vector half as long."""
    half = values.type.count // 2
    even, odd = (ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(first, 2 * half, 2))) for first in (0, 1))
    return builder.add(builder.shuffle_vector(values, values, even), builder.shuffle_vector(values, values, odd))


def _loop(builder, count, sums, step):
    """A loop of ``count`` rounds in which ``step(number, sums) -> sums``; returns the last sums."""
    before, i64 = builder.block, ir.IntType(64)
    body, done = builder.append_basic_block("body"), builder.append_basic_block("done")
    builder.branch(body)
    builder.position_at_end(body)
    number = builder.phi(i64)
    number.add_incoming(ir.Constant(i64, 0), before)
    carried = [builder.phi(value.type) for value in sums]
    for phi, value in zip(carried, sums, strict=True):
        phi.add_incoming(value, before)
    after = step(number, carried)
    following = builder.add(number, ir.Constant(i64, 1))
    number.add_incoming(following, builder.block)
    for phi, value in zip(carried, after, strict=True):
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), body, done)
    builder.position_at_end(done)
    return after


def _block_codegen(fast):
    def codegen(context, builder, signature, args):
        codes, block, query, sums = args
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(
                (signature.args[0], signature.args[2], signature.args[3]), (codes, query, sums), strict=True
            )
        ]
        i32, i64 = ir.IntType(32), ir.IntType(64)
        i32s, bytes_ = ir.VectorType(i32, _LANES), ir.VectorType(ir.IntType(8), 64)
        use_fast = fast and "+avx512vnni" in context.codegen().magic_tuple()[2]
        groups = builder.extract_value(arrays[0].shape, 1)
        size = builder.extract_value(arrays[0].strides, 0)
        base = builder.add(builder.ptrtoint(arrays[0].data, i64), builder.mul(block, size))
        start = builder.ptrtoint(arrays[1].data, i64)
        out = builder.ptrtoint(arrays[2].data, i64)
        first_lane = ir.Constant(i32s, [0] * _LANES)
        # Sums over pairs are twice as long: half of the block at a time, so that they stay in 16 registers of 32 bytes.
        lanes, together = (_LANES, BLOCK // _LANES) if use_fast else (2 * _LANES, BLOCK // _LANES // 2)
        zeros = ir.Constant(ir.VectorType(i32, lanes), [0] * lanes)

        def step_from(first):
            def step(group, totals):
                four = builder.load(builder.inttoptr(builder.add(start, builder.shl(group, i64(2))), i32.as_pointer()))
                single = builder.insert_element(ir.Constant(i32s, ir.Undefined), four, i32(0))
                spread = builder.bitcast(builder.shuffle_vector(single, single, first_lane), bytes_)
                place = builder.add(base, builder.shl(group, i64(8)))
                after = []
                for part, total in enumerate(totals, first):
                    pointer = builder.inttoptr(builder.add(place, i64(64 * part)), bytes_.as_pointer())
                    after.append(_dot4(builder, use_fast, total, builder.load(pointer, align=1), spread))
                return after

            return step

        for first in range(0, BLOCK // _LANES, together):
            for part, total in enumerate(_loop(builder, groups, [zeros] * together, step_from(first)), first):
                pointer = builder.inttoptr(builder.add(out, i64(64 * part)), i32s.as_pointer())
                builder.store(total if use_fast else _pairs(builder, total), pointer, align=4)
        return context.get_dummy_value()

    return codegen


def _fits(codes, query, sums):
    return (
        isinstance(codes, types.Array)
        and (codes.dtype, codes.ndim, codes.layout) == (types.uint8, 4, "C")
        and (query.dtype, query.layout) == (types.int8, "C")
        and (sums.dtype, sums.layout) == (types.int32, "C")
    )


@intrinsic
def block_sums(typingctx, codes, block, query, sums):
    """sums int32 [BLOCK] = codes uint8 [blocks, groups, BLOCK, 4] of one block times query int8 [groups * 4]; exact.

    One instruction (vpdpbusd) for four dimensions of 16 classes where the processor has AVX-512 VNNI.
    """
    if not _fits(codes, query, sums):
        return None
    return types.void(codes, types.intp, query, sums), _block_codegen(True)


@intrinsic
def block_sums_portable(typingctx, codes, block, query, sums):
    """:func:`block_sums` in instructions that every processor has."""
    if not _fits(codes, query, sums):
        return None
    return types.void(codes, types.intp, query, sums), _block_codegen(False)


@inlined
def count_above(values, size, limit):
    """How many of values[:size] lie above ``limit``."""
    above = np.int32(0)
    for i in range(size):
        above += np.int32(values[i] > limit)
    return above


@inlined
def bound_of(values, size, count):
    """(limit, n): n <= count of values[:size] lie above ``limit``, and the most that any limit leaves; by bisection.

    Vectorised counting makes 30 passes over 3,000 values 5 us; a heap or a partial sort takes five times as long.
    """
    low, high = values[0], values[0]
    for i in range(size):
        low, high = min(low, values[i]), max(high, values[i])
    if size <= count:
        return np.float32(-np.inf), size
    low -= abs(low) * np.float32(1e-6) + np.float32(1e-30)  # All lie above it.
    above = 0
    while True:
        middle = np.float32(0.5) * low + np.float32(0.5) * high
        if not low < middle < high:
            return high, above
        found = count_above(values, size, middle)
        if found > count:
            low = middle
        else:
            high, above = middle, found
            if found == count:
                return high, above


@intrinsic
def _mask(typingctx, scores, row, first, limit):
    """Which of scores[row, first : first + 16], float32, lie above ``limit``: 16 bits of an int64, the lowest first."""
    if not (isinstance(scores, types.Array) and (scores.dtype, scores.ndim, scores.layout) == (types.float32, 2, "C")):
        return None

    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        i32, i64 = ir.IntType(32), ir.IntType(64)
        floats = ir.VectorType(ir.FloatType(), _LANES)
        start = builder.mul(args[1], builder.extract_value(array.strides, 0))
        offset = builder.add(start, builder.shl(args[2], i64(2)))
        address = builder.add(builder.ptrtoint(array.data, i64), offset)
        values = builder.load(builder.inttoptr(address, floats.as_pointer()), align=4)
        single = builder.insert_element(ir.Constant(floats, ir.Undefined), args[3], i32(0))
        zeros = ir.Constant(ir.VectorType(i32, _LANES), [0] * _LANES)
        hits = builder.fcmp_ordered(">", values, builder.shuffle_vector(single, single, zeros))
        return builder.zext(builder.bitcast(hits, ir.IntType(_LANES)), i64)

    return types.int64(scores, types.intp, types.intp, types.float32), codegen


@inlined
def _above(scores, row, limit, ids):
    """Positions of scores[row] above ``limit``, in rising order, into ids as far as they fit; how many there are."""
    count, size = 0, scores.shape[1]
    whole = size - size % _LANES
    for first in range(0, whole, _LANES):
        hits = _mask(scores, row, first, limit)
        place = first
        while hits:
            if hits & 1:
                if count < ids.shape[0]:
                    ids[count] = place
                count += 1
            hits >>= 1
            place += 1
    for place in range(whole, size):
        if scores[row, place] > limit:
            if count < ids.shape[0]:
                ids[count] = place
            count += 1
    return count


@inlined
def _encode(hidden, token, projection, offset, values, query):
    """The query's code, int8, into ``query``; returns (its scale, what all classes have in common)."""
    rank = projection.shape[0] - 1
    largest = np.float32(0.0)
    for j in range(rank):
        values[j] = dot(projection, j, hidden, token) - offset[j]
        largest = max(largest, abs(values[j]))
    scale = largest / np.float32(127.0)
    inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
    total = np.int32(0)
    for j in range(rank):
        query[j] = np.int8(np.rint(values[j] * inverse))
        total += np.int32(query[j])
    common = dot(projection, rank, hidden, token) - offset[rank]
    return scale, common - scale * np.float32(ZERO * total)


@inlined
def _scan(codes, query, scale, common, shift, scores, row, sums):
    """scores[row] = every class's score."""
    size = scores.shape[1]
    for block in range(codes.shape[0]):
        block_sums(codes, block, query, sums)
        first = block * BLOCK
        if first + BLOCK <= size:
            for i in range(BLOCK):
                scores[row, first + i] = np.float32(sums[i]) * scale + (shift[first + i] + common)
        else:
            for i in range(size - first):
                scores[row, first + i] = np.float32(sums[i]) * scale + (shift[first + i] + common)


@inlined
def _pick(scores, row, keep, sample, found, values, ids, place):
    """The ``keep`` best of scores[row], in rising order of ids, into ids[place]; of equal scores the lower ids.

    A sample says where about they begin, the rest follows among those above that.
    """
    size = scores.shape[1]
    count = 0
    for i in range(0, size, SAMPLE):
        sample[count] = scores[row, i]
        count += 1
    # The guess has an error of its square root: four of those more, and the first try nearly always holds enough.
    wanted = keep / SAMPLE
    limit, _ = bound_of(sample, count, np.int64(wanted + 4.0 * np.sqrt(wanted) + 2.0))
    total = _above(scores, row, limit, found)
    if total < keep or total > found.shape[0]:
        for i in range(size):
            found[i] = i
        total = size
    for i in range(total):
        values[i] = scores[row, found[i]]
    limit, better = bound_of(values, total, keep)
    # Those at the limit that still fit: equal scores stand in the way of an exact cut.
    spare = keep - better
    level = np.float32(-np.inf)
    if spare > 0:
        for i in range(total):
            if values[i] <= limit:
                level = max(level, values[i])
    kept = 0
    for i in range(total):
        if values[i] > limit or (spare > 0 and values[i] == level):
            spare -= values[i] <= limit
            ids[place, kept] = found[i]
            kept += 1
    ids[place, kept:] = -1  # Fewer than ``keep`` only where scores overflowed.
    return kept


@kernel
def screen(
    start, stop, hidden, projection, offset, codes, shift, keep, rows, scale, bias, logits, kept, scores, classes
):
    """Tokens start..stop: every class's score, exact ones for the ``keep`` best, and the k best of those.

    hidden float32 [tokens, d]; projection float32 [rank + 1, d], whose last row scores what all classes have in
    common, with offset [rank + 1]; codes as in :func:`block_sums`; shift float32 [N]. rows [N, d] float32, bfloat16
    bits or int8 with scale [N]; bias [N] or empty. Written: logits float32 [tokens, N] and kept int32 [tokens, keep],
    both without rows if nobody asks for them; scores, classes [tokens, k]. A token that is not finite gets NaN
    everywhere, and -1 for classes.
    """
    num, rank = shift.shape[0], projection.shape[0] - 1
    sample = np.empty(num // SAMPLE + 1, np.float32)
    found, values = np.empty(num, np.int32), np.empty(num, np.float32)
    sums, query, projected = np.empty(BLOCK, np.int32), np.empty(rank, np.int8), np.empty(rank, np.float32)
    near = near_rows(rows)
    if not logits.shape[0]:
        logits = np.empty((1, num), np.float32)
    if not kept.shape[0]:
        kept = np.empty((1, keep), np.int32)
    for token in range(start, stop):
        row, place = min(token, logits.shape[0] - 1), min(token, kept.shape[0] - 1)
        query_scale, common = _encode(hidden, token, projection, offset, projected, query)
        heap_clear(scores, classes, token)
        # np.isfinite is no use here: with sums that may be reordered, its x - x becomes 0.
        if not (query_scale <= LARGEST and abs(common) <= LARGEST):
            logits[row, :] = np.nan
            kept[place, :] = -1
            classes[token, :] = -1
            continue
        _scan(codes, query, query_scale, common, shift, logits, row, sums)
        count = _pick(logits, row, keep, sample, found, values, kept, place)
        ids = kept[place]
        prefetch_first(rows, ids, 0, count)
        for position in range(count):
            prefetch_ahead(rows, ids, position, count, near)
            value = dot(rows, ids[position], hidden, token)
            if scale.size:
                value *= scale[ids[position]]
            if bias.size:
                value += bias[ids[position]]
            logits[row, ids[position]] = value
            if scores.shape[1]:
                heap_push(scores, classes, token, value, np.int64(ids[position]))
        heap_sort(scores, classes, token)
