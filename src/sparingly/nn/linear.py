"""A linear layer that reads the input channels that matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly.nn import _rows
from sparingly.nn._int8 import Bank, row_bytes
from sparingly.nn.sample import Option, Sample
from sparingly.nn.selective import (
    GRADIENTS,
    LEARNS,
    MANY,
    MOST_TOKENS,
    Selective,
    needs_gradient,
    threshold_options,
)
from sparingly.ops import threshold_accumulate
from sparingly.selectors.threshold import Threshold


class KeptInputs(Selective):
    """What layers share whose units are input channels: each is a row of the weight, see :func:`_rows.by_input`."""

    selector: Threshold
    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def num_units(self) -> int:
        """Input channels."""
        return _rows.sizes(self)[0]

    def operators(self) -> tuple[str, ...]:
        """See :meth:`Selective.operators`."""
        return ("threshold_accumulate",)

    def _unit_bytes(self, kind: str | None) -> tuple[int, int]:
        """An input channel's."""
        return row_bytes(_rows.sizes(self)[1], self.weight, kind), 0

    def fixed_bytes(self) -> int:
        """Bytes of the bias."""
        return 0 if self.bias is None else self.bias.nbytes

    @torch.no_grad()
    def fit(self, sample: Sample) -> list[Option]:
        """See :meth:`Selective.fit`."""
        rows = _rows.by_input(self).float()
        moved = sample.gradients @ rows.t()
        self.selector.fit(rows, None, sample.inputs, moved.square().mean(dim=0).sqrt())
        return threshold_options(self, sample.inputs, None, moved)

    def _served(self) -> Bank:
        """The rows that run, one for each input channel: [inputs, outputs]."""
        rows = _rows.by_input(self)
        return Bank(rows) if self._kind is None else self._kept("int8", lambda: Bank.int8_of_inputs(rows), self.weight)

    def _rest(self) -> Tensor | None:
        """What a token starts from, float32 [outputs]: the bias, and every channel at its centre."""
        centre = self.selector.centre
        if self.bias is None and not centre.numel():
            return None

        def make() -> Tensor:
            outputs = _rows.sizes(self)[1]
            start = torch.zeros(outputs, device=centre.device) if self.bias is None else self.bias.float()
            return start + centre @ self._served().values(torch.float32) if centre.numel() else start

        return self._kept("rest", make, self.weight, self.bias, centre)


class SelectiveInputs(KeptInputs):
    """A trained linear layer of any class, whose parameters it shares; see :class:`SelectiveLinear`."""

    in_features: int
    out_features: int
    transposed: bool
    _columns: bool

    @staticmethod
    def from_dense(layer: nn.Module, selector: Threshold) -> SelectiveInputs:
        """Share the parameters of ``layer``, a ``torch.nn.Linear`` or ``Conv1D``, and turn the weight's memory.

        What is made is an instance of the same one of the two: PEFT tells by that how a weight lies.
        """
        cls = _stand_in(layer)
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = _rows.sizes(layer)
        new.transposed = _rows.transposed(layer)
        for name in ("weight", "bias"):
            new.register_parameter(name, getattr(layer, name))
        new._begin(layer, selector)
        _rows.share_hooks(layer, new)
        new._columns = _rows.by_columns(new.weight)
        selector.prepare(new.in_features, new.weight.device)
        _rows.lay_out(new.weight, columns=not new.transposed)
        # Another weight may be put in the place of this one, as load_state_dict(assign=True) does.
        new.register_load_state_dict_post_hook(_turn)
        return new.train(layer.training)

    def dense(self) -> nn.Module:
        """The original layer with the parameters that stand here now."""
        original: Any = self._original[0]
        _rows.lay_out(self.weight, columns=self._columns)
        original.weight, original.bias = self.weight, self.bias
        _rows.share_hooks(self, original)
        return original.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] -> [..., out_features]."""
        selector, x, tokens = self.selector, input, input.numel() // self.in_features
        idle = self._idle()
        if idle is not None:
            self._note(idle, tokens)
            return self._product(x)
        many, half = tokens > MOST_TOKENS, torch.float16 in (x.dtype, self.weight.dtype)
        learns = needs_gradient(x, self.weight, self.bias)
        if learns and self._kind is not None:
            self._note(LEARNS, tokens)
            return self._product(selector.masked(x))
        if many or half or learns:
            self._note(MANY if many else _rows.HALF if half else GRADIENTS, tokens)
            return F.linear(selector.masked(x), self._served().values(self.weight.dtype).t(), self.bias)
        flat = selector.centred(x.reshape(tokens, self.in_features))
        bank, start = self._served(), self._rest()
        sums = threshold_accumulate(flat, bank.rows, selector.cut, bank.scale, bank.begin(start), self.ran)
        return bank.end(sums, start).to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, _rows.by_output(self), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class SelectiveLinear(SelectiveInputs, nn.Linear):
    """Stands in for a trained ``torch.nn.Linear`` and shares its parameters.

    Input channels that its selector does not keep count as zero. One token at a time, their weights are not read:
    the weight keeps its shape and name, but one input channel is one contiguous row of its memory. Many tokens, or
    gradients, take one dense product of the kept values: the same result to rounding, at the dense cost. With
    ``rows = "int8"`` one token and many run from the same rounded rows; gradients are those of the weights as they are.

    Made by :meth:`from_dense`; :meth:`dense` gives the original back.
    """


def _stand_in(layer: nn.Module) -> type[SelectiveInputs]:
    if isinstance(layer, nn.Linear):
        return SelectiveLinear
    if not _rows.transposed(layer):
        raise TypeError(f"layer must be a torch.nn.Linear or transformers' Conv1D, got {type(layer).__name__}")
    # Here, because transformers is optional; whoever has a Conv1D has it.
    from sparingly.nn.conv1d import SelectiveConv1D

    return SelectiveConv1D


def _turn(layer: SelectiveInputs, _keys: Any) -> None:
    _rows.lay_out(layer.weight, columns=not layer.transposed)
