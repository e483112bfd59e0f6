"""What a run of gated_rows puts on the ledger."""

from __future__ import annotations

from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._record import row_bytes, tensor_bytes


def record(
    visited: int,
    passed: int,
    up: Tensor,
    down: Tensor,
    of_up: tuple[Tensor | None, ...],
    of_down: tuple[Tensor | None, ...],
    read: tuple[Tensor | None, ...],
    sums: Tensor,
    *,
    copied: int = 0,
) -> None:
    """Record ``visited`` rows of up and ``passed`` of down: one entry of ``up``'s dtype, and where ``down`` has
    another, one of that.

    ``of_up``, ``of_down``: vectors [n] of which an element goes with each row. ``read``: tensors that pass whole, the
    gate first. ``copied``: bytes of temporaries, written once and read once. Comparisons with the cut and the
    multiplications by the gate are ``other`` operations.
    """
    assert read[0] is not None
    work = {
        "macs": visited * up.shape[1],
        "other": read[0].numel() + visited,
        "bytes_read": visited * row_bytes(up, *of_up) + tensor_bytes(*read) + copied,
        "bytes_written": copied,
    }
    rest = {
        "macs": passed * down.shape[1],
        "bytes_read": passed * row_bytes(down, *of_down),
        "bytes_written": tensor_bytes(sums),
    }
    if up.dtype == down.dtype:
        rest = {name: amount + rest.get(name, 0) for name, amount in work.items()}
    else:
        ledger.record("sparingly::gated_rows", dtype=up.dtype, **work)
    ledger.record("sparingly::gated_rows", dtype=down.dtype, **rest)
