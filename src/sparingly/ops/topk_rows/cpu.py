"""Best k among the selected rows on the CPU: scores go into a heap of k and never into memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._arrays import as_numpy, as_vector, check_range, not_for_numba
from sparingly.ops._numba import (
    NOTHING,
    dot,
    heap_clear,
    heap_push,
    heap_sort,
    near_rows,
    prefetch_ahead,
    prefetch_first,
)
from sparingly.ops._numba import kernel as compiled
from sparingly.ops._record import record_rows, row_bytes
from sparingly.ops._threads import run_chunks


@compiled
def _best(start, stop, hidden, rows, ids, scale, bias, scores, classes):
    """The best k of tokens start..stop; scale and bias may be empty. ``classes`` holds places until the end."""
    m = ids.shape[1]
    k = scores.shape[1]
    flat_ids = ids.reshape(-1)
    near = near_rows(rows)
    prefetch_first(rows, flat_ids, start * m, stop * m)
    for token in range(start, stop):
        heap_clear(scores, classes, token)
        for place in range(m):
            prefetch_ahead(rows, flat_ids, token * m + place, stop * m, near)
            row = ids[token, place]
            if row < 0:
                continue
            score = dot(rows, row, hidden, token)
            if scale.size:
                score *= scale[row]
            if bias.size:
                score += bias[row]
            # Places come in rising order, so that an equal score never displaces an earlier one.
            if not score <= scores[token, 0] or classes[token, 0] == NOTHING:
                heap_push(scores, classes, token, score, place)
        heap_sort(scores, classes, token)
        for rank in range(k):
            place = classes[token, rank]
            classes[token, rank] = ids[token, place] if place != NOTHING else np.int64(-1)


def unsupported(
    hidden: Tensor, rows: Tensor, ids: Tensor, k: int, scale: Tensor | None = None, bias: Tensor | None = None
) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    return not_for_numba(hidden, rows, scale, bias, contiguous=(rows,))


def kernel(
    hidden: Tensor, rows: Tensor, ids: Tensor, k: int, scale: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`sparingly.ops.topk_rows.topk_rows`."""
    ids = ids.contiguous()
    visited = check_range(ids, rows.shape[0])
    scores = torch.empty(ids.shape[0], k, dtype=torch.float32)
    classes = torch.empty(ids.shape[0], k, dtype=torch.int64)
    run_chunks(
        _best,
        ids.shape[0],
        visited * row_bytes(rows),
        as_numpy(hidden.float().contiguous()),
        as_numpy(rows),
        as_numpy(ids),
        as_vector(scale),
        as_vector(bias),
        scores.numpy(),
        classes.numpy(),
    )
    written = (scores, classes)
    record_rows("topk_rows", visited, rows, scale, bias, read=(hidden, ids), written=written, other=visited)
    return scores, classes
