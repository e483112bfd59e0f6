"""Gradients of a bank's rows: dense, or sparse with the touched rows only."""

from __future__ import annotations

import torch
from torch import Tensor

from sparingly.ops.scatter_outer import scatter_outer
from sparingly.ops.scatter_outer.grouped import group, grouped_sums


def _slots(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(touched [n] sorted, slots like ids with touched[slots] == ids, and -1 at pads)."""
    touched, slots = torch.unique(ids, return_inverse=True)
    if touched.numel() and int(touched[0]) < 0:
        return touched[1:], slots - 1
    return touched, slots


def _plain(weights: Tensor, vectors: Tensor, ids: Tensor) -> bool:
    """True for CPU tensors of values (no fakes) that nobody differentiates further."""
    tensors = (weights, vectors, ids)
    further = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not further and all(
        type(tensor) is torch.Tensor and tensor.is_cpu and tensor.dtype != torch.float64 for tensor in tensors
    )


def of_rows_and_bias(
    weights: Tensor,
    vectors: Tensor,
    ids: Tensor,
    rows: Tensor,
    *,
    need_rows: bool,
    need_bias: bool,
    sparse: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Sum over every (token, place) of ``weights * vectors[token]``, for rows, and of ``weights``, for bias, by id.

    weights [tokens, k] (anything at pads), vectors [tokens, d], ids [tokens, k]; gradients of rows [num_rows, d] and
    of bias [num_rows]. ``sparse``: as coalesced COO tensors of the touched rows. Cost is then that of the ids given,
    whatever num_rows.
    """
    num_rows = rows.shape[0]
    if sparse and need_rows and not need_bias and _plain(weights, vectors, ids):
        touched, places, bounds = group(ids, num_rows)
        values = grouped_sums(weights, vectors, places, bounds)
        return _sparse(values.to(rows.dtype), touched, num_rows), None
    touched, slots, size = (None, ids, num_rows)
    if sparse:
        touched, slots = _slots(ids)
        size = touched.numel()
    of_rows = of_bias = None
    if need_rows:
        of_rows = scatter_outer(weights, vectors, slots, size).to(rows.dtype)
    if need_bias:
        ones = torch.ones(vectors.shape[0], 1, dtype=weights.dtype, device=weights.device)
        of_bias = scatter_outer(weights, ones, slots, size).squeeze(1)
    return _sparse(of_rows, touched, num_rows), _sparse(of_bias, touched, num_rows)


def _sparse(values: Tensor | None, touched: Tensor | None, num_rows: int) -> Tensor | None:
    if values is None or touched is None:
        return values
    return torch.sparse_coo_tensor(
        touched.unsqueeze(0), values, (num_rows, *values.shape[1:]), is_coalesced=True, check_invariants=False
    )
