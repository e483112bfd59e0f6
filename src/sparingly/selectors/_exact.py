"""The exact best k of all units, in blocks, so that the scores of all units are never in memory at once."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores of one block: 16 MB of float32, which is past the point where a larger matrix product runs faster.
BLOCK_ELEMENTS = 4 * 1024 * 1024
# A converted copy of the bank's rows (int8, or bfloat16 beside float32) is kept to 32 MB of float32.
CONVERTED_ELEMENTS = 8 * 1024 * 1024
# More tokens at once would leave blocks of few units, each with its own best k.
BLOCK_TOKENS = 512


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
    found = [_best(part, bank, bias, k, scale) for part in hidden.split(BLOCK_TOKENS)]
    if len(found) == 1:
        return found[0]
    return torch.cat([values for values, _ in found]), torch.cat([classes for _, classes in found])


def _best(hidden: Tensor, bank: Tensor, bias: Tensor | None, k: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`exact_topk`, all tokens at once."""
    tokens, num_units = hidden.shape[0], bank.shape[0]
    block = max(BLOCK_ELEMENTS // max(tokens, 1), k)
    if bank.dtype != torch.float32:
        block = min(block, max(CONVERTED_ELEMENTS // max(bank.shape[1], 1), k))
    # Merged block by block: results kept between the blocks of scores would split the freed memory up, so that each
    # block takes new memory.
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, num_units, block):
        part = slice(start, start + block)
        pick = [None if vector is None else vector[part] for vector in (bias, scale)]
        scores = exact_scores(hidden, bank[part], pick[0], pick[1])
        count = min(k, scores.shape[1])
        values, classes = scores.topk(count, dim=1)
        classes += start
        if best is not None:
            values, classes = torch.cat([best[0], values], dim=1), torch.cat([best[1], classes], dim=1)
            values, places = values.topk(k, dim=1)
            classes = classes.gather(1, places)
        best = values, classes
    assert best is not None
    return best
