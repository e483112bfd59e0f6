"""What a run of selected units puts on the ledger."""

from __future__ import annotations

from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._record import tensor_bytes
from sparingly.ops.mlp_rows._arguments import Arguments


def record(
    visited: int, args: Arguments, scores: Tensor, sums: Tensor, copied: int = 0, *, shared: bool = False
) -> None:
    """``visited``: units that ran, over all tokens; ``copied``: bytes of temporaries, written and read once;
    ``shared``: whether the rows of a block are read once for all tokens that chose it."""
    if not ledger.active():
        return
    chosen = args.ids[args.ids >= 0].unique().numel() * args.block if shared else visited
    hidden, up, bias, down, ids, weights, *_ = args
    width = up.shape[1] + down.shape[1]
    unit_bytes = width * up.element_size() + (0 if bias is None else bias.element_size())
    ledger.record(
        "sparingly::mlp_rows",
        dtype=up.dtype,
        macs=visited * width + (0 if weights is None else visited),
        other=visited,
        bytes_read=chosen * unit_bytes + tensor_bytes(hidden, ids, weights) + copied,
        bytes_written=tensor_bytes(scores, sums) + copied,
    )


def record_backward(
    visited: int, touched: int, down: Tensor, of_up: Tensor, of_scores: Tensor, hidden: Tensor, grad: Tensor
) -> None:
    """``touched``: distinct units; the row of down of each is read once, its gradients are written once."""
    if not ledger.active():
        return
    d_in, d_out = of_up.shape[1], down.shape[1]
    ledger.record(
        "sparingly::mlp_rows_backward",
        dtype=down.dtype,
        macs=visited * (2 * d_out + d_in),
        other=visited,
        # Tokens' vectors count once, as they lie in the cache; scores, weights and places of each unit.
        bytes_read=touched * d_out * down.element_size() + tensor_bytes(hidden, grad) + visited * 16,
        bytes_written=touched * (d_in + d_out + 1) * 4 + tensor_bytes(of_scores) + visited * 4,
    )
