"""Decoding with a converted Llama-type network, one compiled call for each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparingly.energy import ledger
from sparingly.nn._step_plan import LEDGER, StepPlan, Unplanned, Watch
from sparingly.nn.screen_head import ScreenHead
from sparingly.workloads._decoders import Decoder, _Block, without_onednn

THREADS = "more than one thread: operators share rows out, one compiled call does not"


class PlannedDecoder(Decoder):
    """A :class:`Decoder` that takes a token through all layers of a converted network in one compiled call.

    For what ``sp.convert_(model)`` and ``sp.calibrate`` leave: query, key, value, output and gate are fitted
    :class:`SelectiveLinear`, the MLP a gated :class:`SelectiveMLP` with silu and a fitted :class:`Threshold`; weights
    all float32, all bfloat16 or all with int8 rows, one thread. A fitted :class:`ScreenHead` is called as it is.
    Prompts, any other network, and tokens that a ledger counts take the modules' path of :class:`Decoder`;
    ``why_modules`` says why.
    Activations are float32 throughout, also where the weights are bfloat16, which the modules' path rounds between.
    Int8 rows are those that the modules keep; where the weights change through ``.data``, which PyTorch does not count,
    they stay as they were.

    Weights and thresholds are read where the modules keep them. A setting or ``off`` that changes is noticed with the
    next token; weights, modules and hooks of a layer with the next prompt. Modules' ``ran`` counts go on; forward hooks
    are a reason for the modules' path. The weights of a layer are moved side by side into memory of 2 MB pages, where
    the system grants them (their values, shapes and strides stay): 2 to 10 % of a token.

    Parameters as of :class:`Decoder`; ``precision`` is that of plain ``nn.Linear``, so of an output layer without a
    screen.
    """

    name = "selective, one compiled call"

    def __init__(self, model: Any, precision: str = "fp32", max_tokens: int = 512):
        super().__init__(model, precision, max_tokens)
        self.layers, self.lm_head = list(model.model.layers), model.lm_head
        self._plan: StepPlan | None = None
        self._reason: str | None = None
        self._watch = Watch(self.layers)

    @property
    def why_modules(self) -> str | None:
        """Why the next token would take the modules' path, or None if it is one compiled call."""
        return self._why(self._watch.changed())

    def _why(self, changed: bool) -> str | None:
        if changed:
            self._build()
        if ledger.active():
            return LEDGER
        return THREADS if torch.get_num_threads() > 1 else self._reason

    @torch.inference_mode(False)
    @torch.no_grad()
    def _build(self) -> None:
        before, self._watch = self._watch, Watch(self.layers)
        if before.modules != self._watch.modules:
            self.blocks = [_Block(layer, self.precision) for layer in self.layers]
        self._plan, self._reason = None, None
        try:
            self._plan = StepPlan(self.layers, (self.heads, self.shared, self.width), float(self.scaling))
        except Unplanned as reason:
            self._reason = str(reason)
        self._watch.remember()

    @torch.inference_mode()
    def _run(self, ids: Tensor, every: bool = False) -> Tensor:
        watch = self._watch
        reason = self._why(watch.changed() if self.length == 0 else watch.switched())
        if reason is not None or len(ids) != 1 or self.length >= self.max_tokens:
            return super()._run(ids, every)
        assert self._plan is not None
        with without_onednn():
            # A copy: the embedding of one token may be a view, and this is written to.
            x = self.embedding(ids).to(torch.float32, copy=True).contiguous()
            self._plan.run(x, self.length, self.cos[self.length], self.sin[self.length], self.cache)
            self.length += 1
            return self._logits(F.rms_norm(x, x.shape[1:], *self.norm))

    def _logits(self, x: Tensor) -> Tensor:
        head = self.lm_head
        hooked = head._forward_hooks or head._forward_pre_hooks
        if not isinstance(head, ScreenHead) or hooked or head._why_dense(x) is not None:
            return self.head(x).float()
        head._count(1, min(head.selector.setting, head.num_units))
        return head._screened(x)
