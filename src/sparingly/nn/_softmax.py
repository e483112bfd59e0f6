"""Softmax cross entropy over the candidates of a step, with gradients for their rows and no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparingly.nn._candidates import Candidates


class _SampledSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, candidates: Candidates) -> Tensor:
        ids, places = candidates.ids, candidates.places
        wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        rows, inputs = weight.index_select(0, ids).to(wide), hidden.to(wide)
        shift = -candidates.log_inclusion.to(wide)
        if bias is not None:
            shift += bias.index_select(0, ids)
        # One buffer [tokens, candidates] from here on: scores, then the softmax, then its gradient.
        table = torch.addmm(shift, inputs, rows.T)
        # Of its own right class a token is certain; and no right class is a negative of its own token.
        own = table.gather(1, places) + candidates.log_inclusion[places]
        table.scatter_(1, places, float("-inf"))
        peak = table.amax(dim=1, keepdim=True).clamp_min_(torch.finfo(wide).min)
        mass = table.sub_(peak).exp_().sum(dim=1, keepdim=True)
        gap = peak + mass.log() - own
        share = candidates.right / (candidates.right.sum(dim=1, keepdim=True) * places.shape[0])
        if any(ctx.needs_input_grad[:3]):
            slope = torch.sigmoid(gap) * share
            table.mul_(slope.sum(dim=1, keepdim=True) / mass.clamp_min_(torch.finfo(wide).tiny))
            table.scatter_add_(1, places, -slope)
            ctx.save_for_backward(inputs, rows, ids, table)
            ctx.hidden_dtype, ctx.weight, ctx.bias = hidden.dtype, _meta(weight), _meta(bias)
        return (torch.nn.functional.softplus(gap) * share).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, rows, ids, table = ctx.saved_tensors
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        grad = grads[0]
        of_hidden = of_weight = of_bias = None
        # The factor goes onto the small operand; table serves both products and may be needed for another backward.
        if need_hidden:
            of_hidden = (table @ rows).mul_(grad).to(ctx.hidden_dtype)
        if need_weight:
            of_weight = _row_sparse(ids, (table.T @ inputs).mul_(grad), ctx.weight)
        if need_bias:
            of_bias = _row_sparse(ids, table.sum(dim=0).mul_(grad), ctx.bias)
        return of_hidden, of_weight, of_bias, None


def _meta(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _row_sparse(ids: Tensor, values: Tensor, like: tuple[torch.Size, torch.dtype]) -> Tensor:
    """A coalesced sparse tensor of that shape and dtype which holds ``values`` [n, ...] at the rows ``ids`` [n]."""
    shape, dtype = like
    return torch.sparse_coo_tensor(ids.unsqueeze(0), values.to(dtype), shape, is_coalesced=True, check_invariants=False)


def sampled_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, candidates: Candidates) -> Tensor:
    """Estimate of the softmax cross entropy over all classes, from the candidates alone; a scalar.

    hidden [tokens, d]; weight [num_classes, d]; bias [num_classes]. For a token with several right classes: the mean
    of their cross entropies, each without the other right ones in its denominator. Gradients of weight and bias are
    coalesced sparse tensors of the candidates' rows. Sums are float32 (float64 if an operand is).

    A negative's score is lowered by the log of its chance to be a candidate, which makes the expectation of the
    estimated denominator the true one. Source: Jean, Cho, Memisevic, Bengio, On Using Very Large Target Vocabulary
    for Neural Machine Translation, ACL 2015, section 3.1; Bengio and Senecal, Adaptive Importance Sampling to
    Accelerate Training of a Neural Probabilistic Language Model, IEEE Transactions on Neural Networks 2008::

        @inproceedings{jean2015large, title={On Using Very Large Target Vocabulary for Neural Machine Translation},
          author={Jean, S{\\'e}bastien and Cho, Kyunghyun and Memisevic, Roland and Bengio, Yoshua}, booktitle={ACL},
          year={2015}}
    """
    if not torch.is_autocast_enabled(hidden.device.type):
        return _SampledSoftmax.apply(hidden, weight, bias, candidates)  # pyright: ignore[reportReturnType]
    with torch.autocast(hidden.device.type, enabled=False):
        return _SampledSoftmax.apply(hidden, weight, bias, candidates)  # pyright: ignore[reportReturnType]
