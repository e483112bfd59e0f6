"""Product with the inputs that pass their cut in plain PyTorch; also serves float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops._arrays import accumulator
from sparingly.ops._record import record_rows, tensor_bytes


def reference(x: Tensor, rows: Tensor, cut: Tensor, scale: Tensor | None, bias: Tensor | None, ran: Tensor) -> Tensor:
    """See :func:`sparingly.ops.threshold_accumulate.threshold_accumulate`."""
    dtype = accumulator(x, rows)
    token, row = (~(x.to(dtype).abs() < cut.to(dtype))).nonzero(as_tuple=True)
    weight = x[token, row].to(dtype)
    if scale is not None:
        weight = weight * scale[row].to(dtype)
    terms = weight.unsqueeze(1) * rows[row].to(dtype)
    sums = torch.zeros(x.shape[0], rows.shape[1], dtype=dtype, device=rows.device)
    if bias is not None:
        sums += bias
    sums.index_add_(0, token, terms)
    ran[0] += x.shape[0]
    ran[1] += token.numel()
    record_rows(
        "threshold_accumulate",
        token.numel(),
        rows,
        scale,
        read=(x, cut) if bias is None else (x, cut, bias),
        written=(sums,),
        copied=2 * tensor_bytes(terms),
        other=x.numel(),
    )
    return sums
