"""What an operator's run puts on the ledger: the work of the rows that were really visited."""

from __future__ import annotations

from torch import Tensor

from sparingly.energy import ledger


def row_bytes(rows: Tensor, *vectors: Tensor | None) -> int:
    """Bytes of one row and of its elements in the optional vectors [num_rows] (scale, bias)."""
    size = rows.shape[1] * rows.element_size()
    return size + sum(vector.element_size() for vector in vectors if vector is not None)


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of whole tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def record_rows(
    name: str,
    visited: int,
    rows: Tensor,
    *vectors: Tensor | None,
    read: tuple[Tensor, ...],
    written: tuple[Tensor, ...],
    copied: int = 0,
    other: int = 0,
    distinct: int | None = None,
) -> None:
    """Record ``visited`` rows of d multiply-accumulates each; ``distinct``: how many were read, if not each anew.

    ``read``, ``written``: tensors that pass whole. ``copied``: bytes of temporaries, written once and read once (a
    reference gathers rows before it multiplies them; a kernel does not). ``other``: operations that are no MACs.
    """
    if not ledger.active():
        return
    came = visited if distinct is None else distinct
    ledger.record(
        f"sparingly::{name}",
        dtype=rows.dtype,
        macs=visited * rows.shape[1],
        other=other,
        bytes_read=came * row_bytes(rows, *vectors) + tensor_bytes(*read) + copied,
        bytes_written=tensor_bytes(*written) + copied,
    )
