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


def plain(*tensors: Tensor | None) -> bool:
    """True for CPU tensors of values (no fakes) but float64, that nobody differentiates further; None is one."""
    given = [tensor for tensor in tensors if tensor is not None]
    further = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    kinds = (torch.Tensor, torch.nn.Parameter)
    return not further and all(
        type(tensor) in kinds and tensor.is_cpu and tensor.dtype != torch.float64 for tensor in given
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
    if sparse and need_rows and not need_bias and plain(weights, vectors, ids):
        touched, places, bounds = group(ids, num_rows)
        values = grouped_sums(weights, vectors, places, bounds)
        return sparse_rows(values.to(rows.dtype), touched, num_rows), None
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
    return sparse_rows(of_rows, touched, num_rows), sparse_rows(of_bias, touched, num_rows)


def sparse_rows(values: Tensor | None, touched: Tensor | None, num_rows: int) -> Tensor | None:
    """values [n, ...] of the rows touched [n], rising, as a sparse tensor of num_rows; without touched as they are."""
    if values is None or touched is None:
        return values
    return torch.sparse_coo_tensor(
        touched.unsqueeze(0), values, (num_rows, *values.shape[1:]), is_coalesced=True, check_invariants=False
    )
