"""Small compiled functions that every CPU kernel shares, to be called from other Numba kernels.

All of them take a C-contiguous 2-D array and a row index instead of a slice: a slice builds a new array structure
in the inner loop. bfloat16 arrives as its bits, ``uint16`` (:func:`sparingly.ops._arrays.as_numpy`), and is widened by
a shift, which is exact. Sums are kept in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types

# An intrinsic is called without its first parameter, the typing context, which type checkers cannot know.
intrinsic: Any = extending.intrinsic
# Sums may be reordered, so that LLVM can vectorise them; NaN and infinity keep their meaning (no nnan, no ninf).
FAST = {"reassoc", "contract", "arcp", "nsz"}

# Prefetching in two stages, measured on a virtual EPYC 9004 with 2 GB of rows: whole rows into the second cache level
# some 8 KB ahead (the first level has too few line buffers: 0.3 of the sequential speed instead of 0.5), and one line
# of each row 16 rows ahead, for the page walk, which takes longer than the data.
NEAR_BYTES = 8192
FAR_ROWS = 16


def kernel(function):
    """Compile for the CPU without the GIL and cache the machine code next to the source file.

    Serial on purpose: Numba's own thread pools abort the process when two Python threads enter them at once, so
    threads come from :mod:`sparingly.ops._threads`.
    """
    return njit(nogil=True, cache=True, fastmath=FAST)(function)


def inlined(function):
    """Like :func:`kernel`, for small functions that other kernels call: inlined, and without reference counts.

    They must not make arrays. Counting, atomically, the references to array arguments costs 12 ns a call, as much as
    a row of 512 bytes; Numba removes it from straight code only.
    """
    options: dict[str, Any] = {"forceinline": True, "_nrt": False}
    return njit(nogil=True, cache=True, fastmath=FAST, **options)(function)


@intrinsic
def to_f32(typingctx, value):
    """One element as float32: float32 unchanged, uint16 as the bits of a bfloat16, int8 converted."""
    if value not in (types.float32, types.uint16, types.int8):
        return None

    def codegen(context, builder, signature, args):
        single = ir.FloatType()
        if value == types.float32:
            return args[0]
        if value == types.int8:
            return builder.sitofp(args[0], single)
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), single)

    return types.float32(value), codegen


@intrinsic
def from_f32(typingctx, value, like):
    """A float32 as an element of the type of ``like``: float32, or uint16 for the nearest bfloat16 (ties to even)."""
    if value != types.float32 or like not in (types.float32, types.uint16):
        return None

    def codegen(context, builder, signature, args):
        if like == types.float32:
            return args[0]
        i32, i16 = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(args[0], i32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(i32, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(i32, 16)), i16)

    return like(value, like), codegen


@intrinsic
def _multiply_add_i32(typingctx, total, left, right):
    """total + left * right in int32; Numba itself would widen to int64 and lose the packed instructions."""
    if {left, right} - {types.int8, types.int16}:
        return None

    def codegen(context, builder, signature, args):
        wide = ir.IntType(32)
        product = builder.mul(builder.sext(args[1], wide), builder.sext(args[2], wide), flags=["nsw"])
        return builder.add(args[0], product, flags=["nsw"])

    return types.int32(types.int32, left, right), codegen


@intrinsic
def prefetch(typingctx, array, row, offset_bytes):
    """Ask for the cache line at ``offset_bytes`` of ``array[row]`` (C-contiguous, 2-D), into the second cache level.

    Never faults and never waits.
    """
    if not (isinstance(array, types.Array) and array.ndim == 2 and array.layout == "C"):
        return None

    def codegen(context, builder, signature, args):
        holder = context.make_array(signature.args[0])(context, builder, args[0])
        stride = builder.extract_value(holder.strides, 0)
        base = builder.ptrtoint(holder.data, ir.IntType(64))
        address = builder.add(base, builder.add(builder.mul(args[1], stride), args[2]))
        pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        hint = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer.type], ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
        )
        # For reading, locality 1 of 0..3 (prefetcht2), data cache.
        builder.call(hint, [pointer, ir.Constant(i32, 0), ir.Constant(i32, 1), ir.Constant(i32, 1)])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), codegen


@inlined
def prefetch_row(array, row):
    """Ask for every cache line of ``array[row]``."""
    for offset in range(0, array.shape[1] * array.itemsize, 64):
        prefetch(array, row, offset)


@inlined
def near_rows(array):
    """How many rows ahead whole rows are prefetched: about NEAR_BYTES, in 1..8."""
    return max(1, min(8, NEAR_BYTES // max(1, array.shape[1] * array.itemsize)))


@inlined
def prefetch_pages(array, row):
    """Have the addresses of ``array[row]`` translated: ask for its first and, for wide rows, last cache line."""
    size = array.shape[1] * array.itemsize
    prefetch(array, row, 0)
    if size >= 1024:
        prefetch(array, row, size - 1)


@inlined
def prefetch_first(array, ids, start, stop):
    """Before a loop over ``array[ids[start..stop]]``: what :func:`prefetch_ahead` would have asked for by then."""
    for position in range(start, min(start + FAR_ROWS, stop)):
        if ids[position] >= 0:
            prefetch_pages(array, ids[position])
    for position in range(start, min(start + near_rows(array), stop)):
        if ids[position] >= 0:
            prefetch_row(array, ids[position])


@inlined
def prefetch_ahead(array, ids, position, stop, near):
    """In a loop over ``array[ids[start..stop]]``, before the row at ``position`` is used; ids below 0 are skipped."""
    if position + FAR_ROWS < stop and ids[position + FAR_ROWS] >= 0:
        prefetch_pages(array, ids[position + FAR_ROWS])
    if position + near < stop and ids[position + near] >= 0:
        prefetch_row(array, ids[position + near])


@inlined
def dot(rows, row, vectors, vector):
    """``rows[row] . vectors[vector]``, float32; rows float32, uint16 (bfloat16 bits) or int8, vectors likewise."""
    total = np.float32(0.0)
    for j in range(rows.shape[1]):
        total += to_f32(rows[row, j]) * to_f32(vectors[vector, j])
    return total


@inlined
def dot_i8(rows, row, vectors, vector):
    """``rows[row] . vectors[vector]`` of values within -128..127, int32, exact up to 131,071 elements.

    Either array is int8, or int16, which spares a vector that is used often its widening: 5 % of a walk.
    """
    total = np.int32(0)
    for j in range(rows.shape[1]):
        total = _multiply_add_i32(total, rows[row, j], vectors[vector, j])
    return total


@inlined
def axpy(weight, rows, row, out, target):
    """``out[target] += weight * rows[row]``; out float32, rows as in :func:`dot`."""
    for j in range(rows.shape[1]):
        out[target, j] += weight * to_f32(rows[row, j])


EIGHT = 8
"""Rows that are read at once, far apart, so that each is a stream through memory of its own: the processor's
prefetchers follow a stream within a page, and rows that are neighbours share pages. GB/s of 80 % (30 %) of the rows,
one thread of a virtual EPYC 7003; a software prefetch beside it gave nothing:

==========  ===============================  ======================  =================
rows        two at once, lines asked for     eight neighbours        eight far apart
==========  ===============================  ======================  =================
576 fp32    5.2 (4.5)                        11.6 (12.9)             17.2 (13.3)
1536 fp32   7.4 (8.2)                        18.0 (18.0)             21.6 (18.6)
576 bf16    3.3 (3.8)                        7.6 (7.0)               12.3 (7.3)
576 int8    3.0 (3.2)                        4.5 (4.0)               9.5 (4.7)
==========  ===============================  ======================  =================
"""


@inlined
def eight(values, first, apart):
    """Eight of ``values``, from ``first`` on, ``apart`` from one another, as a tuple."""
    return (
        values[first],
        values[first + apart],
        values[first + 2 * apart],
        values[first + 3 * apart],
        values[first + 4 * apart],
        values[first + 5 * apart],
        values[first + 6 * apart],
        values[first + 7 * apart],
    )


@inlined
def axpy_eight(weights, ids, rows, out, target):
    """``out[target] +=`` eight rows ``ids`` times ``weights``, tuples both; types as :func:`axpy`."""
    w0, w1, w2, w3, w4, w5, w6, w7 = weights
    r0, r1, r2, r3, r4, r5, r6, r7 = ids
    for j in range(rows.shape[1]):
        out[target, j] += (
            (w0 * to_f32(rows[r0, j]) + w1 * to_f32(rows[r1, j]))
            + (w2 * to_f32(rows[r2, j]) + w3 * to_f32(rows[r3, j]))
            + (w4 * to_f32(rows[r4, j]) + w5 * to_f32(rows[r5, j]))
            + (w6 * to_f32(rows[r6, j]) + w7 * to_f32(rows[r7, j]))
        )


@inlined
def dot_eight(rows, ids, vectors, vector):
    """:func:`dot` of eight rows ``ids``, a tuple, with one vector: a tuple."""
    r0, r1, r2, r3, r4, r5, r6, r7 = ids
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0.0)
    for j in range(rows.shape[1]):
        x = to_f32(vectors[vector, j])
        s0 += x * to_f32(rows[r0, j])
        s1 += x * to_f32(rows[r1, j])
        s2 += x * to_f32(rows[r2, j])
        s3 += x * to_f32(rows[r3, j])
        s4 += x * to_f32(rows[r4, j])
        s5 += x * to_f32(rows[r5, j])
        s6 += x * to_f32(rows[r6, j])
        s7 += x * to_f32(rows[r7, j])
    return s0, s1, s2, s3, s4, s5, s6, s7


@intrinsic
def add_atomically(typingctx, array, place, amount):
    """``array[place] += amount`` (int64, 1-D, contiguous), also while other threads add to the same place."""
    if not (isinstance(array, types.Array) and array.dtype == types.int64 and array.ndim == 1):
        return None

    def codegen(context, builder, signature, args):
        holder = context.make_array(signature.args[0])(context, builder, args[0])
        builder.atomic_rmw("add", builder.gep(holder.data, [args[1]]), args[2], "monotonic")
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), codegen


# A best-k heap lives in one row of two arrays, ``scores`` float32 [_, k] and ``positions`` int64 [_, k], with the
# worst kept pair first. Higher scores are better, NaN is best of all (as in torch.topk: it must not vanish), and of
# equal scores the lower position is better.
NOTHING = np.iinfo(np.int64).max


@inlined
def heap_better(score, position, other, other_position):
    if score == other:
        return position < other_position
    if np.isnan(score):
        return not np.isnan(other) or position < other_position
    return score > other


@inlined
def heap_clear(scores, positions, heap):
    """Empty the heap: every place holds -inf at the position NOTHING, which any real pair beats."""
    for place in range(scores.shape[1]):
        scores[heap, place] = -np.inf
        positions[heap, place] = NOTHING


@inlined
def heap_sink(scores, positions, heap, size, score, position):
    """Put a pair at the root of the first ``size`` places and let it sink to where it belongs."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        left, right = child, child + 1
        if right < size and heap_better(
            scores[heap, left], positions[heap, left], scores[heap, right], positions[heap, right]
        ):
            child = right
        if not heap_better(score, position, scores[heap, child], positions[heap, child]):
            break
        scores[heap, place] = scores[heap, child]
        positions[heap, place] = positions[heap, child]
        place = child
    scores[heap, place] = score
    positions[heap, place] = position


@inlined
def heap_push(scores, positions, heap, score, position):
    """Keep the pair if it beats the worst one kept; True if it did."""
    if not heap_better(score, position, scores[heap, 0], positions[heap, 0]):
        return False
    heap_sink(scores, positions, heap, scores.shape[1], score, position)
    return True


@inlined
def heap_sort(scores, positions, heap):
    """Order the heap's row best first. It is no heap afterwards."""
    for last in range(scores.shape[1] - 1, 0, -1):
        score, position = scores[heap, last], positions[heap, last]
        scores[heap, last] = scores[heap, 0]
        positions[heap, last] = positions[heap, 0]
        heap_sink(scores, positions, heap, last, score, position)
