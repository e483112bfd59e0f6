"""The selective stand-in of transformers' own linear layer."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparingly.nn.linear import SelectiveInputs


class SelectiveConv1D(SelectiveInputs, Conv1D):
    """As :class:`sparingly.nn.SelectiveLinear`, for transformers' ``Conv1D``, whose weight is [in, out] (GPT-2's)."""

    @property
    def nx(self) -> int:
        """Input channels, as ``Conv1D`` calls them."""
        return self.in_features

    @property
    def nf(self) -> int:
        """Outputs, as ``Conv1D`` calls them."""
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return super().forward(x)

    __repr__ = nn.Module.__repr__  # Conv1D's own wants plain attributes.
