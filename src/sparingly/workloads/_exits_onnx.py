"""A network with exits in ONNX Runtime, piece by piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.nn._exit_batch import pooled
from sparingly.nn._leaving import MEASURES, NO_WEIGHTS, sure_rows
from sparingly.nn.cascade import NEVER
from sparingly.nn.exits import ExitNetwork
from sparingly.workloads._onnx import session


class _Piece(nn.Module):
    """Layers, and an exit after them."""

    def __init__(self, layers: nn.Module, head: nn.Module):
        super().__init__()
        self.layers, self.head = layers, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.layers(x)
        return hidden, self.head(pooled(hidden)).softmax(1)


class _Last(nn.Module):
    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).softmax(1)


class InPieces:
    """Inputs float32 [n, ...] -> probabilities [n, classes], each input as far as it needs; on one thread.

    Leaving is by the model's measure, not a learned one, at ``thresholds``, [exits], of which :meth:`set` takes new
    ones.

    Args:
        model: exits at children of an ``nn.Sequential``, in evaluation mode.
        example: inputs, one is enough.

    Raises TypeError for another network, ImportError without ``onnx`` and ``onnxruntime``.
    """

    def __init__(self, model: ExitNetwork, example: Tensor):
        if not isinstance(model.net, nn.Sequential):
            raise TypeError(f"only exits in an nn.Sequential are cut into pieces, got {type(model.net).__name__}")
        if model.measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {model.measure!r}")
        self._kind = list(MEASURES).index(model.measure)
        children = list(model.net.named_children())
        places = [name for name, _ in children]
        ends = [places.index(name) + 1 for name in model.names[:-1]]
        self._pieces: list[Any] = []
        x, first = example[:1].detach().repeat(2, *[1] * (example.dim() - 1)), 0
        for end, head in zip(ends, model.heads, strict=True):
            layers = nn.Sequential(*[layer for _, layer in children[first:end]]).eval()
            axes = {name: {0: "n"} for name in ("x", "hidden", "y")}
            self._pieces.append(session(_Piece(layers, head).eval(), (x,), axes, outputs=2))
            with torch.no_grad():
                x = layers(x)
            first = end
        rest = nn.Sequential(*[layer for _, layer in children[first:]]).eval()
        self._pieces.append(session(_Last(rest).eval(), (x,), {"x": {0: "n"}, "y": {0: "n"}}))
        self.thresholds = model.thresholds.tolist()

    def set(self, thresholds: list[float]) -> InPieces:
        """Take other thresholds; gives itself."""
        self.thresholds = list(thresholds)
        return self

    def __call__(self, inputs: Tensor | np.ndarray) -> np.ndarray:
        hidden = inputs.numpy() if isinstance(inputs, Tensor) else inputs
        out, waiting = np.empty(0), None
        for place, piece in enumerate(self._pieces):
            found = piece.run(None, {"x": hidden})
            if place == len(self.thresholds):
                if waiting is None:
                    return found[0]
                out[waiting] = found[0]
                break
            hidden, answers = found
            if self.thresholds[place] == NEVER:
                continue
            sure = np.empty(len(answers))
            if sure_rows(answers, self._kind, NO_WEIGHTS, sure) >= 0:
                raise ValueError(f"the exit after piece {place} gave no probabilities: look for NaN in the inputs")
            leaves = sure >= self.thresholds[place]
            if waiting is None:
                if leaves.all():
                    return answers
                out, waiting = np.empty_like(answers), np.arange(len(answers))
            if leaves.any():
                out[waiting[leaves]] = answers[leaves]
                waiting, hidden = waiting[~leaves], hidden[~leaves]
            if not len(waiting):
                break
        return out
