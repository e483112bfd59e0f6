"""What a layer saw and how much its outputs matter, gathered from a few runs of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparingly.nn._modes import frozen

GRADIENT_CALLS = 8


class Sample(NamedTuple):
    """inputs float [n, in_features] of a layer, gradients [n, out_features] of the loss with respect to its outputs."""

    inputs: Tensor
    gradients: Tensor


class Option(NamedTuple):
    """One setting of a selective layer: what it is expected to cost.

    loss: nats per token that the whole network loses by it; size_bytes: weights read per token.
    """

    setting: int
    loss: float
    size_bytes: float


def probe_loss(output: Any, generator: torch.Generator) -> Tensor:
    """A scalar whose gradients say how much each output matters.

    For scores of classes: cross entropy against a class drawn from the model's own distribution, so that the squared
    gradient estimates the Fisher information, which is the curvature of the loss (Martens, New Insights and
    Perspectives on the Natural Gradient Method, JMLR 2020, section 5). For anything else: a random projection, whose
    squared gradient is that of the output's change.

    Raises TypeError for an output without a floating tensor.
    """
    scores = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if scores is not None:
        flat = scores.flatten(0, -2).float()
        with torch.no_grad():
            drawn = torch.multinomial(flat.softmax(-1), 1, generator=generator).squeeze(1)
        return nn.functional.cross_entropy(flat, drawn, reduction="sum")
    value = _first_floating(getattr(output, "last_hidden_state", output))
    if value is None:
        raise TypeError(f"the model's output must hold a floating tensor, got {type(output).__name__}")
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
    return (value.float() * noise.to(value.device)).sum()


def _first_floating(output: Any) -> Tensor | None:
    """The first floating tensor in an output, however it is nested."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((found for found in map(_first_floating, parts) if found is not None), None)


def gather(
    model: nn.Module, calls: Sequence[Callable[[], Any]], layers: Mapping[str, nn.Module], tokens: Mapping[str, int]
) -> dict[str, Sample]:
    """Run ``calls`` (functions of no arguments that run the model) -> what each layer saw in about ``tokens`` tokens.

    A layer whose number of tokens is negative gets so many inputs without gradients; a layer that no call reached (an
    expert that no token went to) is left out. Selective layers have to answer densely meanwhile.

    Of a layer that needs more than its first argument, the inputs are what its ``observed(inputs, named)`` gives: one
    row for each row of its output, and which of them are worth keeping (int64), or None for all. One whose tokens are
    not what stands before the last dimension says with ``as_rows(output)`` how they become rows.
    """
    generator = torch.Generator().manual_seed(0)
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    calls = list(calls)
    shallow = {name: layer for name, layer in layers.items() if tokens[name] < 0}
    deep = {name: layer for name, layer in layers.items() if tokens[name] >= 0}
    # Gradients take most of the time: a few calls are enough for them, all calls for inputs alone.
    some = range(0, len(calls), max(1, len(calls) // GRADIENT_CALLS))[:GRADIENT_CALLS] if deep else range(0)
    rest = [place for place in range(len(calls)) if place not in some] if shallow else []

    def watch(name: str, layer: nn.Module, among: int) -> Any:
        share = max(1, -(-abs(tokens[name]) // max(1, among)))
        observed, as_rows = getattr(layer, "observed", _first_input), getattr(layer, "as_rows", _rows_of)

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            flat, useful = observed(inputs, named)
            places = _places(flat.shape[0] if useful is None else useful.shape[0], share)
            places = places if useful is None else useful[places.to(useful.device)]
            if tokens[name] < 0:
                kept[name].append((flat[places].float(), flat.new_empty(0)))
                return output
            # A gradient arrives even where nothing before it needs one; a leaf itself must not be changed in place.
            output = output if output.requires_grad else output.detach().requires_grad_().clone()

            def arrived(gradient: Tensor) -> None:
                rows = as_rows(gradient)[places].float()
                kept[name].append((flat[places].float(), rows))

            output.register_hook(arrived)
            return output

        return layer.register_forward_hook(hook, with_kwargs=True)

    with frozen(model):
        for watched, places, gradients in ((layers, some, True), (shallow, rest, False)):
            handles = [
                watch(name, layer, len(calls) if name in shallow else len(some)) for name, layer in watched.items()
            ]
            try:
                # Inside inference mode no gradient would be recorded.
                with torch.inference_mode(False), torch.set_grad_enabled(gradients):
                    for place in places:
                        output = calls[place]()
                        if gradients:
                            probe_loss(output, generator).backward()
            finally:
                for handle in handles:
                    handle.remove()
    return {
        name: Sample(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
        for name, parts in kept.items()
        if parts
    }


def _first_input(inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, None]:
    return _rows_of((inputs[0] if inputs else next(iter(named.values()))).detach()), None


def _rows_of(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _places(count: int, wanted: int) -> Tensor:
    """``wanted`` of ``count`` places, evenly spread."""
    return torch.linspace(0, count - 1, min(wanted, count)).round().long()
