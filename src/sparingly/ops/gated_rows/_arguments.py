"""The operands of gated_rows by name: its kernels take them in this order."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """As in :func:`sparingly.ops.gated_rows.gated_rows`."""

    gate: Tensor
    hidden: Tensor
    up: Tensor
    down: Tensor
    cut: Tensor
    cut_out: Tensor | None
    up_bias: Tensor | None
    up_scale: Tensor | None
    down_scale: Tensor | None
    bias: Tensor | None
    ran: Tensor
