"""Noise of several kinds and strengths in pictures and in labels, the same at each call."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STRENGTHS: dict[str, tuple[float, ...]] = {
    "gaussian": (0.1, 0.2, 0.3, 0.4, 0.5),
    "impulse": (0.05, 0.1, 0.2, 0.3, 0.4),
    "occlusion": (4, 8, 12, 16, 20),
}
"""Standard deviation as a share of the pixels' range; share of pixels that turn black or white; side of a black square
in pixels."""

KINDS = [(kind, strength) for kind, strengths in STRENGTHS.items() for strength in strengths]


def disturbed(images: Tensor, kind: str, strength: float) -> Tensor:
    """images uint8 [n, 784] -> float32 [n, 784], 0..255, with noise of a kind and strength of :data:`STRENGTHS`."""
    random = torch.Generator().manual_seed(round(1000 * strength))
    pixels = images.float()
    if kind == "gaussian":
        return (pixels + 255 * strength * torch.randn(pixels.shape, generator=random)).clamp(0, 255)
    if kind == "impulse":
        hit = torch.rand(pixels.shape, generator=random) < strength
        return torch.where(hit, 255.0 * torch.randint(2, pixels.shape, generator=random), pixels)
    if kind != "occlusion":
        raise ValueError(f"kind must be one of {', '.join(STRENGTHS)}, got {kind!r}")
    first = torch.randint(0, 28 - int(strength) + 1, (len(pixels), 2, 1), generator=random)
    inside = (torch.arange(28) >= first) & (torch.arange(28) < first + int(strength))
    return pixels.masked_fill((inside[:, 0, :, None] & inside[:, 1, None, :]).flatten(1), 0.0)


def wrong_labels(labels: Tensor, part: float, classes: int = 10) -> Tensor:
    """``part`` of labels int64 [n] replaced by one of the other classes at random."""
    random = np.random.default_rng(0)
    changed = labels.clone()
    chosen = random.permutation(len(labels))[: round(part * len(labels))]
    moved = torch.from_numpy(random.integers(1, classes, len(chosen)))
    changed[chosen] = (changed[chosen] + moved) % classes
    return changed
