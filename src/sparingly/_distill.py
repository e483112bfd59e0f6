"""The parts of a distillation: what is trained, the answers of both sides, and how far they are apart."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparingly._data import inputs as first_of
from sparingly.nn.screen_head import ScreenHead
from sparingly.nn.selective import selective_modules

_CHUNK = 1 << 22
"""Scores that are float32 at a time: 16 MiB."""


def trainable(model: nn.Module, matrices: bool) -> dict[str, nn.Parameter]:
    """The converted layers' parameters by name, only matrices if asked; none that another layer uses as well."""
    inside: set[int] = set()
    modules: set[nn.Module] = set()
    for layer in selective_modules(model).values():
        if not isinstance(layer, ScreenHead):
            within = set(layer.modules()) - set(layer.selector.modules())
            modules |= within
            inside |= {id(p) for module in within for p in module.parameters(recurse=False)}
    inside -= {id(p) for module in set(model.modules()) - modules for p in module.parameters(recurse=False)}
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in inside and parameter.is_floating_point() and (parameter.dim() == 2 or not matrices)
    }
    if not found:
        raise ValueError(
            "the model holds no selective layer whose weights can be trained; call sparingly.convert_ first"
        )
    return found


def copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 copies, trained instead of the weights, so that whatever stops the run leaves the model as it was."""
    # In one layout, which saved moments come back in: the fused optimiser pairs numbers by their place in memory.
    layout = torch.contiguous_format
    return {
        name: weight.detach().clone(memory_format=layout).float().requires_grad_() for name, weight in weights.items()
    }


def adapters(weights: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """For each matrix [rows, columns] ``:out`` [rows, rank], zero at first, and ``:in`` [rank, columns]; float32."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, weight in weights.items():
        rows, columns = weight.shape
        least = min(rank, rows, columns)
        start = torch.randn(least, columns, generator=generator) / math.sqrt(columns)
        made[f"{name}:in"] = start.to(weight.device).requires_grad_()
        made[f"{name}:out"] = torch.zeros(rows, least, device=weight.device, requires_grad=True)
    return made


def inputs(batch: Any) -> Any:
    """What goes to the model, a mapping without its ``labels``, for which a model would compute a loss of its own."""
    given = first_of(batch)
    return {key: value for key, value in given.items() if key != "labels"} if isinstance(given, Mapping) else given


def answers(model: nn.Module, weights: dict[str, Tensor], given: Any) -> tuple[Tensor, bool]:
    """The model's answers [n, ..., d] with these weights instead of its own, and whether they score classes."""
    args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else ((given,), {})
    if hasattr(getattr(model, "config", None), "use_cache"):
        kwargs["use_cache"] = False
    output = functional_call(model, weights, args, kwargs)
    if isinstance(output, Tensor):
        return output, False
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name), name == "logits"
    return next(iter(output.values() if isinstance(output, Mapping) else output)), False


def token_weights(batch: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """How much each answer counts, float32 of that shape with the sum 1; padding counts nothing."""
    weights = torch.ones(shape, device=device)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == shape:
        weights = mask.to(device).ne(0).float()
    return weights / weights.sum().clamp_min(1.0)


def divergence(given: Tensor, wanted: Tensor, is_scores: bool, weights: Tensor) -> Tensor:
    """[n, ..., d] twice -> mean KL divergence in nats, or squared error relative to ``wanted``'s mean square."""
    if is_scores:
        loss: Any = _Divergence.apply(given.flatten(0, -2), wanted.flatten(0, -2), weights.flatten())
        return loss
    error = (given.float() - wanted.float()).square().mean(-1)
    # A weight of 0 would let NaN through.
    size = wanted.float().square().mean(-1).mul(weights).masked_fill(weights == 0, 0.0).sum()
    return error.mul(weights).masked_fill(weights == 0, 0.0).sum() / size.clamp_min(1e-12)


class _Divergence(torch.autograd.Function):
    """sum of weight * KL(softmax(wanted) || softmax(given)); the gradient is made on the way, few rows in float32."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:  # pyright: ignore
        """given, wanted [tokens, classes], weights float32 [tokens] -> float32 []."""
        gradient = torch.empty_like(given)
        total = torch.zeros((), device=given.device)
        rows = max(1, _CHUNK // given.shape[1])
        for start in range(0, given.shape[0], rows):
            part = slice(start, start + rows)
            right = wanted[part].float().log_softmax(-1)
            log = given[part].float().log_softmax(-1)
            share, weight = right.exp(), weights[part, None]
            # Where a token does not count, its scores may be anything.
            total += (share * (right - log)).sum(-1, keepdim=True).mul(weight).masked_fill(weight == 0, 0.0).sum()
            gradient[part] = (log.exp_() - share).mul_(weight).masked_fill_(weight == 0, 0.0)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None


def half_precision(device: torch.device, weights: Any) -> Any:
    """bfloat16 products where the machine has instructions for them: 1.6 times the tokens per processor-second of
    float32 on SmolLM2-135M."""
    single = all(weight.dtype == torch.float32 for weight in weights)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and any(
            getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return torch.autocast(device.type, torch.bfloat16) if single and fast else contextlib.nullcontext()
