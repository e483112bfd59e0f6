"""The best sums of two lists in plain PyTorch; also serves float64 and devices without a kernel."""

from __future__ import annotations

from torch import Tensor

from sparingly.ops._arrays import accumulator
from sparingly.ops.product_topk._count import record


def reference(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`sparingly.ops.product_topk.product_topk`."""
    dtype = accumulator(left)
    a, i = left.to(dtype).topk(min(k, left.shape[1]), dim=1)
    b, j = right.to(dtype).topk(min(k, right.shape[1]), dim=1)
    sums = (a.unsqueeze(2) + b.unsqueeze(1)).flatten(1)
    ids = (i.unsqueeze(2) * right.shape[1] + j.unsqueeze(1)).flatten(1)
    scores, places = sums.topk(k, dim=1)
    record(left, right, scores, sums.numel())
    return scores, ids.gather(1, places)
