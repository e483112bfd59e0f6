"""An output layer that runs only the classes that an input needs."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sparingly.energy import count
from sparingly.nn._candidates import draw
from sparingly.nn._checks import check_hidden, check_target, missing_rows
from sparingly.nn._int8 import int8_rows
from sparingly.nn._softmax import sampled_softmax
from sparingly.nn.tune import TuneReport, check_promise, walk_down
from sparingly.selectors import Dense, Graph, Selector
from sparingly.selectors._exact import exact_scores, exact_topk
from sparingly.selectors.base import FIT_KEY

DENSE_BELOW = 8192
"""With fewer classes than this the default selector is :class:`Dense`: nothing finds them for less."""

UNFITTED = "the selector is not fitted; call refresh()"
RELOADED = "weights were loaded without the selector's state; call refresh()"
TOO_FEW = "the selector named fewer than k classes"
UNTUNED = "no setting kept the agreement that tune() was asked for"

# Counting is for a figure per token: a few tokens are enough, and counting is slow.
_COUNTED_TOKENS = 64


class SelectiveHead(nn.Module):
    """A classifier over many classes that trains and answers for the cost of a few of them.

    Stands in for ``torch.nn.Linear`` and the softmax after it. ``head.loss`` trains on a sample of classes,
    ``head.topk`` answers from those that the selector names, ``head(hidden)`` scores all of them.

    Args:
        in_features: width of the input.
        num_classes: how many classes there are.
        bias: whether each class has a bias.
        selector: how classes are found for an input. None: :class:`Dense` under 8192 classes, else :class:`Graph`.
        negatives: how many wrong classes the tokens of a batch share in a training step. Up to half of them are hard
            ones, where the selector has some, the rest is random.

    Attributes:
        weight: [num_classes, in_features], one class a row, as in ``torch.nn.Linear``. bias: [num_classes] or None.
        selector: the selector.
        exact: True if answers come from all classes, because :meth:`tune` found no setting good enough.
        fallbacks: reason -> number of tokens that :meth:`topk` answered from all classes though a selector was there.
        scale: float32 [num_classes] in a head made by :meth:`int8`, else None.

    The idea to compute only some neurons of a wide layer, in training too: Chen, Medini, Farwell, Gobriel, Tai,
    Shrivastava, SLIDE: In Defense of Smart Algorithms over Hardware Acceleration for Large-Scale Deep Learning
    Systems, MLSys 2020. Hard negatives that the batch shares: Dahiya et al., NGAME, WSDM 2023::

        @inproceedings{chen2020slide, title={SLIDE: In Defense of Smart Algorithms over Hardware Acceleration for
          Large-Scale Deep Learning Systems}, author={Chen, Beidi and Medini, Tharun and Farwell, James and Gobriel,
          Sameh and Tai, Charlie and Shrivastava, Anshumali}, booktitle={MLSys}, year={2020}}
        @inproceedings{dahiya2023ngame, title={NGAME: Negative Mining-aware Mini-batching for Extreme Classification},
          author={Dahiya, Kunal and Gupta, Nilesh and Saini, Deepak and Soni, Akshay and Wang, Yajun and Dave, Kushal
          and Jiao, Jian and K, Gururaj and Dey, Prasenjit and Singh, Amit and others}, booktitle={WSDM}, year={2023}}
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    target_counts: Tensor
    target_total: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        selector: Selector | None = None,
        negatives: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if in_features < 1 or num_classes < 1:
            raise ValueError(f"in_features and num_classes must be at least 1, got {in_features} and {num_classes}")
        if negatives < 0:
            raise ValueError(f"negatives must not be negative, got {negatives}")
        self.in_features, self.num_classes, self.negatives = in_features, num_classes, negatives
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self.register_buffer("scale", None)
        # Integers, so that .to(torch.bfloat16) leaves them: a count kept in bfloat16 would stop at 256.
        self.register_buffer("target_counts", torch.zeros(num_classes, dtype=torch.int64, device=device))
        self.register_buffer("target_total", torch.zeros((), dtype=torch.int64, device=device))
        self.selector = _default_selector(num_classes) if selector is None else selector
        if self.selector.num_units not in (-1, num_classes):
            raise ValueError(f"selector must be fitted to {num_classes} classes, got {self.selector.num_units}")
        self.exact = False
        self.fallbacks: dict[str, int] = {}
        self._stale = False
        self._float_bias: tuple[Any, Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``torch.nn.Linear`` does."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, selector: Selector | None = None, negatives: int = 1024
    ) -> SelectiveHead:
        """A head that shares the parameters of an existing layer; :meth:`refresh` makes its answers selective."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        if not linear.weight.is_floating_point():
            raise TypeError(f"linear must have floating weights, got {linear.weight.dtype}")
        head = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            selector=selector,
            negatives=negatives,
            device="meta",
        )
        head.adopt(linear.weight, linear.bias)
        return head

    def to_linear(self) -> nn.Linear:
        """A ``torch.nn.Linear`` that shares the parameters. Raises RuntimeError for an int8 head."""
        self._no_int8("to_linear")
        linear = nn.Linear(self.in_features, self.num_classes, bias=self.bias is not None, device="meta")
        linear.weight = self.weight
        if self.bias is not None:
            linear.register_parameter("bias", self.bias)  # pyright: ignore[reportArgumentType]
        return linear

    def adopt(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        """Use these tensors, without a copy, and forget which classes were targets.

        weight [num_classes, in_features], bias [num_classes] as parameters; or, int8 with ``scale`` [num_classes]
        float32, as buffers, for inference only.
        """
        for name, value in (("weight", weight), ("bias", bias)):
            delattr(self, name)
            if scale is None:
                self.register_parameter(name, value if isinstance(value, nn.Parameter) else _parameter(value))
            else:
                self.register_buffer(name, value)
        self.scale = scale
        self.target_counts = torch.zeros(self.num_classes, dtype=torch.int64, device=weight.device)
        self.target_total = torch.zeros((), dtype=torch.int64, device=weight.device)

    @torch.no_grad()
    def int8(self) -> SelectiveHead:
        """A copy for inference whose rows are int8 with a scale each; it shares this head's selector as it is now.

        Rows are rounded to nearest, the largest element of each to 127. ``loss``, ``refresh`` and ``to_linear`` of
        the copy raise RuntimeError. ``topk``, ``tune`` and the dense answer work, and are those of the rounded rows.
        """
        self._no_int8("int8")
        scale = torch.empty(self.num_classes, dtype=torch.float32, device=self.weight.device)
        rows = torch.empty(self.weight.shape, dtype=torch.int8, device=self.weight.device)
        # In blocks: a float32 copy of the whole bank would be four times what is made.
        for part in torch.arange(self.num_classes, device=self.weight.device).split(65536):
            block = slice(int(part[0]), int(part[-1]) + 1)
            rows[block], scale[block] = int8_rows(self.weight[block])
        head = SelectiveHead(
            self.in_features,
            self.num_classes,
            bias=self.bias is not None,
            selector=self.selector,
            negatives=self.negatives,
            device="meta",
        )
        head.adopt(rows, None if self.bias is None else self.bias.detach().float().clone(), scale)
        head.exact, head._stale = self.exact, self._stale
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [tokens, in_features] -> scores of every class, [tokens, num_classes]: exact, at the dense cost."""
        check_hidden(hidden, self.in_features)
        if self.scale is not None:
            return exact_scores(hidden, self.weight, self.bias, self.scale)
        return nn.functional.linear(hidden, self.weight, self.bias)

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Estimate of the mean softmax cross entropy, a scalar, from the right classes and shared negatives alone.

        Args:
            hidden: [tokens, in_features], float32, bfloat16 or float64, at least one token.
            target: int64 [tokens], or [tokens, m] padded with -1 for several right classes; at least one each.

        The gradients of ``weight`` and ``bias`` are coalesced sparse tensors of the classes that took part, which
        ``sparingly.optimizer`` takes. In training mode the selector may add a loss of its own (to learn its routing),
        and the targets are counted for the correction of the next steps.

        Raises:
            ValueError, TypeError: a shape or dtype does not fit, hidden holds NaN or infinity (names the first such
                token), a token has no right class, or the loss is not finite.
            IndexError: a target is out of range.
            RuntimeError: the head is int8. Nothing has been changed, whatever was raised.
        """
        self._no_int8("loss")
        check_hidden(hidden, self.in_features, finite=True)
        right = check_target(target, hidden.shape[0], self.num_classes)
        hard = routing = None
        if self.selector.fitted and not self._stale:
            seen = hidden.detach()
            hard = self.selector.negatives(seen, right, self.negatives // 2) if self.negatives > 1 else None
            routing = self.selector.routing_loss(seen, right) if self.training else None
        spare = self.negatives - (0 if hard is None else hard.shape[0])
        candidates = draw(right, self.num_classes, spare, hard, self.target_counts, self.target_total)
        loss = sampled_softmax(hidden, self.weight, self.bias, candidates)
        if routing is not None:
            loss = loss + routing
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()}: scores overflowed, or weights are not finite")
        if self.training:
            with torch.no_grad():
                wanted = right[candidates.right]
                self.target_counts.index_add_(0, wanted, torch.ones_like(wanted))
                self.target_total += wanted.shape[0]
        return loss

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k best classes among those that the selector names, best first. Not differentiable.

        Args:
            hidden: [tokens, in_features], float32, bfloat16 or float64.
            k: how many, in 1..num_classes.

        Returns:
            scores [tokens, k], float32, and classes [tokens, k], int64.

        A token is answered from all classes instead, and counted in ``fallbacks`` (a warning tells the first time of
        each reason), if the selector is not fitted or weights were loaded without its state, if it named fewer than k
        classes for that token, or if :meth:`tune` found no setting good enough.

        Raises ValueError or TypeError for a bad shape, dtype or k, and for NaN or infinity in hidden.
        """
        check_hidden(hidden, self.in_features, finite=True)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be in 1..num_classes ({self.num_classes}), got {k}")
        reason = self._why_exact()
        if reason is not None:
            self._note(reason, hidden.shape[0])
            return self._exact(hidden, k)
        return self._selected(hidden, k)

    def refresh(self, hidden: Tensor | None = None) -> None:
        """Fit the selector to the current weights: after training, and after loading other weights.

        Args:
            hidden: [n, in_features], inputs like those to come, some per class: from them :class:`Graph` learns which
                classes compete, and then finds the best one in a third of the time at the same agreement.

        Raises ValueError or TypeError if a weight is not finite or hidden does not fit; the old fit then stays. What
        :meth:`tune` found out does not hold for the new fit.
        """
        self._no_int8("refresh")
        if hidden is not None:
            check_hidden(hidden, self.in_features, finite=True)
        self.selector.fit(self.weight.detach(), None if self.bias is None else self.bias.detach(), hidden)
        self._stale = False

    @torch.no_grad()
    def tune(self, hidden: Tensor, agreement: float = 0.99, confidence: float = 0.95) -> TuneReport:
        """Set the selector to its cheapest setting that keeps a promise on these inputs.

        Args:
            hidden: [tokens, in_features], inputs like those to come, that training has not seen.
            agreement: how often the top-1 of :meth:`topk` has to be the exact top-1, between 0 and 1.
            confidence: with what confidence that has to hold, between 0 and 1.

        Settings are tested from the dearest down and the first failure ends it, so that the confidence holds for the
        setting that is kept (see :func:`sparingly.nn.tune.walk_down`). If the dearest fails already, ``exact`` is set
        and :meth:`topk` answers from all classes from then on; a later call that finds a setting clears it.

        Raises ValueError if so few tokens could never keep the promise, RuntimeError if the selector is not fitted.
        """
        check_hidden(hidden, self.in_features, finite=True)
        check_promise(hidden.shape[0], agreement, confidence)
        if self._stale or not self.selector.fitted:
            raise RuntimeError(f"cannot tune: {RELOADED if self._stale else UNFITTED}")
        best = self._exact(hidden, 1)[1]
        before = self.selector.setting

        def measure(setting: int) -> tuple[int, float]:
            self.selector.setting = setting
            with count() as ledger:
                self._selected(hidden[:_COUNTED_TOKENS], 1, note=False)
            rows = ledger.macs / self.in_features / min(hidden.shape[0], _COUNTED_TOKENS)
            return int((self._selected(hidden, 1, note=False)[1] == best).sum()), rows

        settings = self.selector.settings() or [before]
        chosen = None
        try:
            tried, chosen = walk_down(settings, measure, hidden.shape[0], agreement, confidence)
        finally:
            self.selector.setting = before if chosen is None else chosen
        self.exact = chosen is None
        return TuneReport(tuple(tried), chosen, hidden.shape[0], agreement, confidence)

    def extra_repr(self) -> str:
        kind = ", int8" if self.scale is not None else ""
        bias = self.bias is not None
        return f"{self.in_features}, {self.num_classes}, bias={bias}, negatives={self.negatives}{kind}"

    def _selected(self, hidden: Tensor, k: int, note: bool = True) -> tuple[Tensor, Tensor]:
        """From the selector, tokens with too few classes from all of them."""
        scores, classes = self.selector.topk(hidden, self.weight, self._bias(), k, self.scale)
        missing = missing_rows(classes)
        if missing is not None:
            scores[missing], classes[missing] = self._exact(hidden[missing], k)
            if note:
                self._note(TOO_FEW, missing.shape[0])
        return scores, classes

    def _exact(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return exact_topk(hidden, self.weight, self._bias(), k, self.scale)

    def _why_exact(self) -> str | None:
        if self.exact:
            return UNTUNED
        if self._stale:
            return RELOADED
        return None if self.selector.fitted else UNFITTED

    def _note(self, reason: str, tokens: int) -> None:
        if reason not in self.fallbacks:
            warnings.warn(f"answers come from all {self.num_classes} classes: {reason}", stacklevel=3)
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + tokens

    def _no_int8(self, what: str) -> None:
        if self.scale is not None:
            raise RuntimeError(f"{what} needs floating weights; this head is int8, for inference only")

    def _bias(self) -> Tensor | None:
        """The bias as the operators take it; a converted copy is kept until the bias changes."""
        bias = self.bias
        if bias is None or bias.dtype in (torch.float32, torch.float64):
            return bias
        key = (bias.data_ptr(), bias.device, bias._version)
        if self._float_bias is None or self._float_bias[0] != key:
            self._float_bias = (key, bias.detach().float())
        return self._float_bias[1]

    def _apply(self, fn: Any, recurse: bool = True) -> SelectiveHead:
        """As a module does, but the scales of int8 rows stay float32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.scale is not None and self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" in state_dict:
            self._stale = f"{prefix}selector.{FIT_KEY}" not in state_dict


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value)


def _default_selector(num_classes: int) -> Selector:
    return Dense() if num_classes < DENSE_BELOW else Graph()
