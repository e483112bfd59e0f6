"""A trained output layer that scores all classes roughly and the best ones exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly.nn._int8 import Bank, row_bytes
from sparingly.nn.sample import Option, Sample
from sparingly.nn.selective import GRADIENTS, OFF, STALE, UNFITTED, Selective, needs_gradient
from sparingly.ops._views import LIKE
from sparingly.selectors.screen import Fitted, Screen, screen_states

DEVICE = "the screen is compiled for CPUs: one dense product elsewhere"
DTYPE = "the screen takes contiguous float32 and bfloat16 weights: one dense product"

MEASURED_TOKENS = 256
"""Inputs on which :meth:`ScreenHead.fit` measures what each setting costs."""
HELD_OUT = 8
"""One input in so many is not fitted to, but measured on."""


class ScreenHead(Selective, nn.Linear):
    """Stands in for a trained ``torch.nn.Linear`` over many classes, such as a language model's ``lm_head``.

    The result is the logits of every class, so that sampling and ``generate()`` work: exact ones for the classes that
    its :class:`Screen` keeps; for the rest the expected weight in the softmax, so that their mass is right on average.
    The parameters are those of the layer, the same objects: a weight that is tied to an embedding stays tied.

    One dense product runs instead, and is counted with its reason in ``why_dense``, where gradients are recorded,
    before :meth:`Screen.fit`, once the weights are other ones than then, and for tensors that the compiled screen does
    not take. However many tokens come at once, each is screened: on the CPU that stays cheaper than the dense product.

    With ``rows = "int8"`` exact logits are those of int8 rows; a dense product is always that of the weight as it is.

    Attributes:
        always: screen on every device and dtype, in PyTorch where there is no compiled screen; same results.

    Logits of a token that is not finite are NaN.
    """

    selector: Screen
    always: bool
    sample_tokens = 16384
    sample_gradients = False

    @classmethod
    def from_dense(cls, layer: nn.Linear, selector: Screen) -> ScreenHead:
        """Share the parameters of ``layer``. Raises TypeError for another layer or selector, ValueError for a selector
        that is fitted to another number of classes."""
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"layer must be a torch.nn.Linear, got {type(layer).__name__}")
        if not isinstance(selector, Screen):
            raise TypeError(f"selector must be a Screen, got {type(selector).__name__}")
        if selector.num_units not in (-1, layer.out_features):
            raise ValueError(f"selector must be fitted to {layer.out_features} classes, got {selector.num_units}")
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = layer.in_features, layer.out_features
        new.always = False
        for name in ("weight", "bias"):
            new.register_parameter(name, getattr(layer, name))
        new._begin(layer, selector.to(layer.weight.device))
        return new.train(layer.training)

    def dense(self) -> nn.Module:
        """The original layer with the parameters that stand here now."""
        (original,) = self._original
        original.weight, original.bias = self.weight, self.bias
        return original.train(self.training)

    @property
    def num_units(self) -> int:
        """Classes."""
        return self.out_features

    def _unit_bytes(self, kind: str | None) -> tuple[int, int]:
        """A class's."""
        bias = 0 if self.bias is None else self.bias.element_size()
        return row_bytes(self.in_features, self.weight, kind) + bias, 0

    def fixed_bytes(self) -> int:
        """Bytes of the screen: all of it is read for each token."""
        return sum(part.nbytes for part in self.selector.parts()) if self.selector.fitted else 0

    def _fitted_to(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

    @torch.no_grad()
    def fit(self, sample: Sample) -> list[Option]:
        """Fit the screen to ``sample.inputs`` -> what each of its settings costs, cheapest first.

        The loss of a setting is the divergence of its softmax from the exact one, mean over inputs that the screen was
        not fitted to: exactly the cross entropy that is lost if the model is right about the data. The sample's
        gradients are not looked at and may be empty.
        """
        inputs = sample.inputs
        held_out = torch.arange(inputs.shape[0], device=inputs.device) % HELD_OUT == HELD_OUT - 1
        self.selector.fit(self.weight, self.bias, inputs[~held_out])
        # Screens do not take float16 inputs; its weights they do.
        weight = self.weight.float() if self.weight.dtype == torch.float16 else self.weight
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        rows, scale, _ = Bank(weight) if self._kind is None else self._served()
        test = (inputs[held_out] if held_out.any() else inputs)[:MEASURED_TOKENS].to(weight.dtype)
        exact = F.linear(test, weight, bias).float().log_softmax(dim=1)

        def cost(setting: int) -> tuple[float, float, float]:
            screened = self.selector.logits(test, rows, bias, scale).float().log_softmax(dim=1)
            loss = F.kl_div(screened, exact, reduction="batchmean", log_target=True)
            kept = min(setting, self.num_units)
            return float(loss), kept, kept

        return self._options(cost)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features], hidden states -> logits [..., out_features] in their dtype."""
        hidden, selector, tokens = input, self.selector, input.numel() // self.in_features
        reason = self._why_dense(hidden)
        if reason is not None:
            self._note(reason, tokens)
            return F.linear(hidden, self.weight, self.bias)
        flat = hidden.reshape(tokens, self.in_features)
        if torch.compiler.is_compiling():
            keep = min(selector.setting, self.num_units)
            buffers = (selector.projection, selector.offset, selector.codes, selector.shift)
            logits = _screen_logits(flat, *self._served()[:2], self.bias, *buffers, keep)
        else:
            logits = self._screened(flat)
        self._count(tokens, tokens * min(selector.setting, self.num_units))
        return logits.to(hidden.dtype).view(*hidden.shape[:-1], self.out_features)

    def _screened(self, hidden: Tensor) -> Tensor:
        """hidden [tokens, in_features] -> logits [tokens, out_features], float32."""
        rows, scale, _ = self._served()
        return self.selector.logits(hidden, rows, self.bias, scale)

    def _served(self) -> Bank:
        """The rows [out_features, in_features] of which exact logits are."""
        weight = self.weight
        return Bank(weight) if self._kind is None else self._kept("int8", lambda: Bank.int8(weight), weight)

    def _count(self, tokens: int, units: int) -> None:
        # Of the 200 us that a token takes, two additions to elements of a tensor would be 8.
        ran = self.ran.numpy() if self.ran.is_cpu and not torch.compiler.is_compiling() else self.ran
        ran[0] += tokens
        ran[1] += units

    def _why_dense(self, hidden: Tensor) -> str | None:
        weight, bias, selector = self.weight, self.bias, self.selector
        if self.off:
            return OFF
        if needs_gradient(hidden, weight, bias):
            return GRADIENTS
        if not selector.fitted_shape:
            return UNFITTED
        if not self._fit_holds(selector, weight, bias):
            return STALE
        if self.always:
            return None
        if not (hidden.is_cpu and weight.is_cpu):
            return DEVICE
        return None if weight.dtype in LIKE and hidden.dtype in LIKE and weight.is_contiguous() else DTYPE

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


@torch.library.custom_op("sparingly::screen_logits", mutates_args=())
def _screen_logits(
    hidden: Tensor,
    rows: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    projection: Tensor,
    offset: Tensor,
    codes: Tensor,
    shift: Tensor,
    keep: int,
) -> Tensor:
    """:meth:`Screen.logits` as one operator, so that ``torch.compile`` and ``torch.export`` see through it."""
    return screen_states(Fitted(projection, offset, codes, shift), hidden, rows, scale, bias, keep)


@_screen_logits.register_fake
def _(hidden, rows, scale, bias, projection, offset, codes, shift, keep):
    return hidden.new_empty((hidden.shape[0], rows.shape[0]), dtype=torch.float32)
