"""The exact best k of all units, in blocks, so that the scores of all units are never in memory at once."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores of one block: 16 MB of float32, which is past the point where a larger matrix product runs faster.
BLOCK_ELEMENTS = 4 * 1024 * 1024
# A converted copy of the bank's rows (int8, or bfloat16 beside float32) is kept to 32 MB of float32.
CONVERTED_ELEMENTS = 8 * 1024 * 1024


def exact_scores(hidden: Tensor, rows: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """hidden [tokens, d], rows [n, d] float or int8, bias and scale [n] -> scores [tokens, n], float32 or float64."""
    dtype = torch.float64 if torch.float64 in (hidden.dtype, rows.dtype) else torch.float32
    scores = hidden.to(dtype) @ rows.to(dtype).T
    if scale is not None:
        scores *= scale
    if bias is not None:
        scores += bias
    return scores


def exact_topk(
    hidden: Tensor, bank: Tensor, bias: Tensor | None, k: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best of all units: scores [tokens, k] float32, classes [tokens, k] int64, best first.

    hidden [tokens, d], bank [num_units, d], bias and scale [num_units]; k in 1..num_units. Which of equal scores comes
    first is not defined.
    """
    tokens, num_units = hidden.shape[0], bank.shape[0]
    block = max(BLOCK_ELEMENTS // max(tokens, 1), k)
    if bank.dtype != torch.float32:
        block = min(block, max(CONVERTED_ELEMENTS // max(bank.shape[1], 1), k))
    best: list[tuple[Tensor, Tensor]] = []
    for start in range(0, num_units, block):
        part = slice(start, start + block)
        pick = [None if vector is None else vector[part] for vector in (bias, scale)]
        scores = exact_scores(hidden, bank[part], pick[0], pick[1])
        values, places = scores.topk(min(k, scores.shape[1]), dim=1)
        best.append((values, places + start))
    if len(best) == 1:
        return best[0]
    values, classes = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
    values, places = values.topk(k, dim=1)
    return values, classes.gather(1, places)
