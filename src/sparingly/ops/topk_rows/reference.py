"""Best k among the selected rows in plain PyTorch; also serves float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops._arrays import accumulator, check_range
from sparingly.ops._record import record_rows, tensor_bytes


def reference(
    hidden: Tensor, rows: Tensor, ids: Tensor, k: int, scale: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`sparingly.ops.topk_rows.topk_rows`."""
    visited = check_range(ids, rows.shape[0])
    dtype = accumulator(hidden, rows)
    valid = ids >= 0
    token, place = valid.nonzero(as_tuple=True)
    row = ids[token, place]
    gathered = rows[row].to(dtype)
    spread = hidden[token].to(dtype)
    values = (spread * gathered).sum(-1)
    if scale is not None:
        values = values * scale[row].to(dtype)
    if bias is not None:
        values = values + bias[row].to(dtype)
    every = torch.full(ids.shape, -torch.inf, dtype=dtype, device=hidden.device)
    every[token, place] = values
    # Two stable sorts: by score (NaN first), then pads last; equal scores keep the order of ids.
    scores, order = every.sort(dim=1, descending=True, stable=True)
    classes = ids.gather(1, order)
    last = (classes < 0).to(torch.int8).sort(dim=1, stable=True).indices
    scores, classes = scores.gather(1, last)[:, :k], classes.gather(1, last)[:, :k]
    short = k - scores.shape[1]
    if short > 0:
        scores = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
        classes = torch.nn.functional.pad(classes, (0, short), value=-1)
    scores, classes = scores.contiguous(), classes.contiguous()
    record_rows(
        "topk_rows",
        visited,
        rows,
        scale,
        bias,
        read=(hidden, ids),
        written=(scores, classes),
        copied=tensor_bytes(gathered, spread, every),
        other=visited,
    )
    return scores, classes
