"""The best sums of two lists on the CPU: a heap over each list, then one over the pairs that can be among the best."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._arrays import not_for_numba
from sparingly.ops._numba import heap_clear, heap_push, heap_sort
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._threads import run_chunks
from sparingly.ops._views import CPU, addresses, matrix_at
from sparingly.ops.product_topk._count import record


@compiled
def best_sums(row, left, right, best, places, scores, ids):
    """Row ``row`` of scores and ids from that of left and right; best float32 and places int64 [2, >= k] are scratch.

    Lists shorter than k leave the rest of their heap at -inf, which no pair of theirs comes from.
    """
    k, m = scores.shape[1], right.shape[1]
    heap_clear(best, places, 0)
    heap_clear(best, places, 1)
    for i in range(left.shape[1]):
        heap_push(best, places, 0, left[row, i], i)
    for j in range(m):
        heap_push(best, places, 1, right[row, j], j)
    heap_sort(best, places, 0)
    heap_sort(best, places, 1)
    heap_clear(scores, ids, row)
    pairs = 0
    for i in range(min(k, left.shape[1])):
        for j in range(min(k // (i + 1), m)):
            heap_push(scores, ids, row, best[0, i] + best[1, j], places[0, i] * m + places[1, j])
            pairs += 1
    heap_sort(scores, ids, row)
    return pairs


@compiled
def part(start, stop, sizes, at):
    """Rows start..stop of what lies at addresses."""
    rows, n, m, k = sizes
    left, right = matrix_at(at[0], rows, n, np.float32), matrix_at(at[1], rows, m, np.float32)
    scores, ids = matrix_at(at[2], rows, k, np.float32), matrix_at(at[3], rows, k, np.int64)
    best, places = np.empty((2, k), np.float32), np.empty((2, k), np.int64)
    for row in range(start, stop):
        best_sums(row, left, right, best, places, scores, ids)


def unsupported(left: Tensor, right: Tensor, k: int) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    return not_for_numba(left, right)


def kernel(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`sparingly.ops.product_topk.product_topk`."""
    a, b = left.float().contiguous(), right.float().contiguous()
    rows, n, m = *left.shape, right.shape[1]
    scores = torch.empty((rows, k), dtype=torch.float32, device=CPU)
    ids = torch.empty((rows, k), dtype=torch.int64, device=CPU)
    tensors = (a, b, scores, ids)
    # A score takes some 4 ns, as long as 32 bytes of a bank.
    run_chunks(part, rows, rows * (n + m) * 32, (rows, n, m, k), addresses(*tensors), keep=tensors)
    if ledger.active():
        record(left, right, scores, rows * sum(min(k // (i + 1), m) for i in range(min(k, n))))
    return scores, ids
