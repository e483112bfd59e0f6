"""What scattering puts on the ledger: each visit reads a slot's row, adds a vector to it and writes it back."""

from __future__ import annotations

from torch import Tensor

from sparingly.energy import ledger
from sparingly.ops._record import tensor_bytes


def record(visited: int, weights: Tensor, vectors: Tensor, slots: Tensor, sums: Tensor, *, copied: int = 0) -> None:
    """Record ``visited`` additions into rows of sums [num_slots, d], all of which were first set to 0."""
    if not ledger.active():
        return
    touched = visited * sums.shape[1] * sums.element_size()
    ledger.record(
        "sparingly::scatter_outer",
        dtype=sums.dtype,
        macs=visited * vectors.shape[1],
        bytes_read=touched + tensor_bytes(weights, vectors, slots) + copied,
        bytes_written=touched + tensor_bytes(sums) + copied,
    )
