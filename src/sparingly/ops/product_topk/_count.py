"""What the search for the best sums puts on the ledger."""

from __future__ import annotations

from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._record import tensor_bytes


def record(left: Tensor, right: Tensor, scores: Tensor, pairs: int) -> None:
    """``pairs``: how many sums were made, for all rows together. Each score and each sum is compared once."""
    if not ledger.active():
        return
    ledger.record(
        "sparingly::product_topk",
        dtype=scores.dtype,
        macs=0,
        other=left.numel() + right.numel() + 2 * pairs,
        bytes_read=tensor_bytes(left, right),
        bytes_written=tensor_bytes(scores) + scores.numel() * 8,
    )
