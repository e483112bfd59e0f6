"""What the operator takes, by name."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """See :func:`sparingly.ops.mlp_rows.mlp_rows`."""

    hidden: Tensor
    up: Tensor
    bias: Tensor | None
    down: Tensor
    ids: Tensor
    weights: Tensor | None
    block: int
    activation: str
