"""A pointwise convolution that multiplies, for each pixel, with the input channels that matter there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly.nn import _rows
from sparingly.nn.linear import KeptInputs
from sparingly.nn.selective import GRADIENTS, needs_gradient
from sparingly.ops import threshold_accumulate
from sparingly.selectors.threshold import Threshold

DTYPES = (torch.float32, torch.bfloat16)
DTYPE = "weights or inputs are neither float32 nor bfloat16: one dense product of the selected values"


class SelectiveConv(KeptInputs, nn.Conv2d):
    """Stands in for a trained ``torch.nn.Conv2d`` with a 1x1 kernel and shares its parameters.

    A pixel is a token, its input channels are the units. With :class:`sparingly.selectors.Zeros` what runs is exactly
    what is not zero, as after a ReLU. That spares multiplications, not weights: some pixel of an image needs each row,
    which all pixels together read once.

    Pixels are rows of memory in ``channels_last``, where nothing is copied. A contiguous [n, channels, height, width]
    is copied once before the product, and its result once after it, so that the layout stays what it was.

    Made by :meth:`from_dense`; :meth:`dense` gives the original back.
    """

    reads_together = True
    takes_int8 = False
    in_channels: int
    out_channels: int
    _strides: tuple[int, ...]

    @staticmethod
    def from_dense(layer: nn.Conv2d, selector: Threshold) -> SelectiveConv:
        """Share the parameters of ``layer`` and turn the weight's memory. ValueError if it is not pointwise."""
        reason = not_pointwise(layer)
        if reason is not None:
            raise ValueError(f"layer must be a pointwise nn.Conv2d, got {layer}: {reason}")
        new = SelectiveConv.__new__(SelectiveConv)
        nn.Module.__init__(new)
        new.__dict__.update({name: getattr(layer, name) for name in (*nn.Conv2d.__constants__, "transposed")})
        for name in ("weight", "bias"):
            new.register_parameter(name, getattr(layer, name))
        new._begin(layer, selector)
        _rows.share_hooks(layer, new)
        new._strides = new.weight.stride()
        selector.prepare(new.in_channels, new.weight.device)
        _turn(new)
        # Another weight may be put in the place of this one, as load_state_dict(assign=True) does.
        new.register_load_state_dict_post_hook(_turn)
        return new.train(layer.training)

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """The original layer with the parameters that stand here now."""
        original: Any = self._original[0]
        if self.weight.stride() != self._strides:
            self.weight.data = torch.empty_strided(
                self.weight.shape, self._strides, dtype=self.weight.dtype, device=self.weight.device
            ).copy_(self.weight)
        original.weight, original.bias = self.weight, self.bias
        _rows.share_hooks(self, original)
        return original.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """input [n, in_channels, height, width], or without n -> [n, out_channels, height, width], its layout kept.

        Raises ValueError for another shape.
        """
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            raise ValueError(
                f"input must be [n, {self.in_channels}, height, width] or [{self.in_channels}, height, width], "
                f"got {list(input.shape)}"
            )
        if input.dim() == 3:
            return self(input.unsqueeze(0)).squeeze(0)
        pixels = input.permute(0, 2, 3, 1)
        tokens = input.numel() // self.in_channels
        idle = self._idle()
        if idle is not None:
            self._note(idle, tokens)
            return self._product(pixels)
        selector, weight = self.selector, self.weight
        served = input.dtype in DTYPES and weight.dtype in DTYPES
        if not served or needs_gradient(input, weight, self.bias):
            self._note(GRADIENTS if served else DTYPE, tokens)
            return self._product(selector.masked(pixels))
        flat = selector.centred(pixels.reshape(tokens, self.in_channels))
        sums = threshold_accumulate(flat, _rows.by_input(self), selector.cut, None, self._rest(), self.ran)
        return _image(sums.to(input.dtype).view(*pixels.shape[:3], self.out_channels), pixels)

    def _product(self, pixels: Tensor) -> Tensor:
        return _image(F.linear(pixels, _rows.by_output(self), self.bias), pixels)

    def observed(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, None]:
        """What the layer was called with -> [pixels, in_channels] (see :func:`sparingly.nn.sample.gather`)."""
        return self.as_rows((inputs[0] if inputs else named["input"]).detach()), None

    @staticmethod
    def as_rows(image: Tensor) -> Tensor:
        """[n, channels, height, width], or without n -> [pixels, channels]."""
        return image.movedim(-3, -1).flatten(0, -2)

    def _apply(self, fn: Any, recurse: bool = True) -> SelectiveConv:
        # model.to(memory_format=torch.channels_last) turns weights, too.
        super()._apply(fn, recurse)
        _turn(self)
        return self


def not_pointwise(layer: nn.Module) -> str | None:
    """Why a layer is no product of each pixel's channels with one matrix, or None."""
    if not isinstance(layer, nn.Conv2d):
        return f"it is a {type(layer).__name__}, not an nn.Conv2d"
    height, width = layer.kernel_size
    if (height, width) != (1, 1):
        return f"its kernel is {height}x{width}: only convolutions with a 1x1 kernel are a product of single pixels"
    if tuple(layer.stride) != (1, 1):
        return f"its stride is {tuple(layer.stride)}, not 1"
    if layer.groups != 1:
        return f"its channels are in {layer.groups} groups, not in one"
    if not isinstance(layer.padding, str) and any(layer.padding):
        return f"it pads by {tuple(layer.padding)}, not by 0"
    return None


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    """[n, height, width, channels] -> [n, channels, height, width], in the layout that the pixels ``like`` came in."""
    image = pixels.permute(0, 3, 1, 2)
    return image if like.is_contiguous() else image.contiguous()


@torch.no_grad()
def _turn(layer: SelectiveConv, _keys: Any = None) -> None:
    """One input channel becomes one contiguous row of the weight's memory; values and shape stay."""
    if not _rows.by_input(layer).is_contiguous():
        layer.weight.data = layer.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
