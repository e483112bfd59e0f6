"""Decoding one token at a time with a Llama-type network, dense at its best, and the same loop for a selective one.

:class:`Decoder` runs a transformers model's own modules in a loop with little around them, so that dense and selective
differ in what is selected and in nothing else.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.energy import ledger
from sparingly.nn import _attention_kernels as kernels
from sparingly.ops._pages import request_huge_pages
from sparingly.ops._views import addresses

PRECISIONS = ("fp32", "bf16", "int8")


class Engine(ABC):
    """Decodes one sequence at batch 1. ``name``, ``precision``; uses as many threads as PyTorch."""

    name: str
    precision: str

    @abstractmethod
    def prepare(self, ids: Tensor) -> Tensor:
        """Forget what was, read a prompt int64 [tokens >= 1]; logits float32 [vocabulary] after its last token."""

    @abstractmethod
    def step(self, token: int) -> Tensor:
        """One token more; logits float32 [vocabulary] after it."""

    def __repr__(self) -> str:
        return f"{self.name} ({self.precision})"


class _Plain:
    """Several ``nn.Linear`` of one input as one matrix: x float32 [tokens, in] -> float32 [tokens, sum of outs]."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.bias = None
        if any(layer.bias is not None for layer in layers):
            zeros = (torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers)
            self.bias = torch.cat([bias.detach().float() for bias in zeros])
        self._store(torch.cat([layer.weight.detach().float() for layer in layers]))

    def _store(self, weight: Tensor) -> None:
        """Input-major: MKL's matrix-vector product reads it 1.5 times as fast as the usual layout."""
        self.weight = weight.t().contiguous()
        request_huge_pages(self.weight)
        self.weight = self.weight.t()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self._product(x, residual if residual is not None else self.bias)
        return y if residual is None or self.bias is None else y.add_(self.bias)

    def _product(self, x: Tensor, added: Tensor | None) -> Tensor:
        if len(x) > 1:
            return F.linear(x, self.weight) if added is None else torch.addmm(added, x, self.weight.t())
        if added is None:
            return torch.mv(self.weight, x[0]).unsqueeze(0)
        return torch.addmv(added.view(-1), self.weight, x[0]).unsqueeze(0)


class _PlainBfloat16(_Plain):
    """bfloat16 rows; activations are rounded to bfloat16 on the way in and come out as float32."""

    def _store(self, weight: Tensor) -> None:
        self.weight = weight.bfloat16().contiguous()
        request_huge_pages(self.weight)

    def _product(self, x: Tensor, added: Tensor | None) -> Tensor:
        x = x.bfloat16()
        y = torch.mv(self.weight, x[0]).unsqueeze(0) if len(x) == 1 else F.linear(x, self.weight)
        return y.float() if added is None else added + y


_SEVEN_BITS = not torch.cpu._is_vnni_supported()
"""Where products of eight bits overflow 16, activations have to do with seven; they cost one answer in ten."""


class _PlainInt8(_Plain):
    """int8 rows with a scale each; FBGEMM quantises activations on the way in."""

    def _store(self, weight: Tensor) -> None:
        scale = (weight.abs().amax(1).clamp_min(1e-12) / 127).double()
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with _fbgemm(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao announces its successor, which needs a C++ compiler on a CPU
            quantised = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantised, None)

    def _product(self, x: Tensor, added: Tensor | None) -> Tensor:
        y = torch.ops.quantized.linear_dynamic(x, self.packed, _SEVEN_BITS)
        return y if added is None else y.add_(added)


@contextmanager
def _fbgemm():
    """At batch 1 twice as fast as oneDNN, which is the default here."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


_KINDS = {"fp32": _Plain, "bf16": _PlainBfloat16, "int8": _PlainInt8}


class _Modules:
    """Modules of one input called one after the other, as they stand, each in its own precision."""

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = [(layer, next(layer.parameters()).dtype) for layer in layers]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        parts = [layer(x.to(dtype)).float() for layer, dtype in self.layers]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return y if residual is None else residual + y


class _Block:
    """One layer's modules, as they stand."""

    def __init__(self, layer: Any, precision: str):
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _projection([attention.q_proj, attention.k_proj, attention.v_proj], precision)
        self.o = _projection([attention.o_proj], precision)
        self.norms = [_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)]
        self.mlp = _Modules([mlp])
        self.down = None
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not hasattr(mlp, "selector") and all(type(part) is nn.Linear for part in parts):
            self.gate_up, self.down = _projection(parts[:2], precision), _projection(parts[2:], precision)
            self.activation = mlp.act_fn

    def feed_forward(self, x: Tensor, normed: Tensor) -> Tensor:
        if self.down is None:
            return self.mlp(normed, x)
        gate, up = self.gate_up(normed).chunk(2, 1)
        return self.down(self.activation(gate).mul_(up), x)


def _projection(layers: Sequence[Any], precision: str) -> _Plain | _Modules:
    return _KINDS[precision](layers) if all(type(layer) is nn.Linear for layer in layers) else _Modules(layers)


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight.detach().float(), module.variance_epsilon


def _normed(x: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    """x [tokens, d] over its root mean square, times the norm's weight."""
    return F.rms_norm(x, x.shape[1:], *norm)


def _normed_one(x: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    """:func:`_normed` of one token, contiguous."""
    out = torch.empty_like(x)
    kernels.rms_norm(x.shape[1], norm[1], *addresses(x, norm[0], out))
    return out


class Decoder(Engine):
    """A Llama-type network (Llama, Mistral, Qwen2 of transformers) with few calls around its matrices.

    Query, key and value are one matrix, gate and up another; the cache of keys and values is one tensor, written in
    place; norms and attention are one compiled call each. A layer whose modules are not plain ``nn.Linear`` (selective
    ones) is called as it stands, so that only these differ from the dense decoder. Plain weights are copied in the
    layout that is fastest; later changes of them are not seen. While a ledger counts, PyTorch's own operations run
    between the matrices, so that it sees them.

    Parameters
    ----------
    model
        A ``transformers`` model in evaluation mode, float32. Raises ValueError for another architecture.
    precision
        Of the plain weights, "fp32", "bf16" or "int8"; activations and cache are float32.
    max_tokens
        Prompt and continuation together.
    """

    name = "pytorch, slim loop"

    def __init__(self, model: Any, precision: str = "fp32", max_tokens: int = 512):
        if precision not in _KINDS:
            raise ValueError(f"precision must be one of {tuple(_KINDS)}, got {precision!r}")
        _check(model, max_tokens)
        config, first = model.config, model.model.layers[0].self_attn
        self.precision, self.max_tokens = precision, max_tokens
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.width, self.scaling = first.head_dim, first.scaling
        self.embedding = model.model.embed_tokens
        self.blocks = [_Block(layer, precision) for layer in model.model.layers]
        self.norm, self.head = _norm(model.model.norm), _projection([model.lm_head], precision)
        positions = torch.arange(max_tokens).unsqueeze(0)
        cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
        self.cos, self.sin = cos[0].float().contiguous(), sin[0].float().contiguous()  # [positions, width]
        self.cache = torch.zeros(len(self.blocks), 2, self.shared, max_tokens, self.width)
        request_huge_pages(self.cache)
        self.length = 0

    def prepare(self, ids: Tensor) -> Tensor:
        self.length = 0
        return self._run(ids)[0]

    def step(self, token: int) -> Tensor:
        return self._run(torch.tensor([token]))[0]

    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 [tokens, vocabulary] after each token of a prompt int64 [tokens >= 1]."""
        self.length = 0
        return self._run(ids, every=True)

    @torch.inference_mode()
    def _run(self, ids: Tensor, every: bool = False) -> Tensor:
        start, end = self.length, self.length + len(ids)
        if not start < end <= self.max_tokens:
            raise ValueError(f"at least one token and at most max_tokens ({self.max_tokens}) in all, got up to {end}")
        if start and len(ids) > 1:
            raise ValueError("a prompt is read whole: more than one token at a time only at the beginning")
        compiled = len(ids) == 1 and not ledger.active()
        attend, normed = (self._attend_one, _normed_one) if compiled else (self._attend, _normed)
        with without_onednn(len(ids) == 1):
            x = self.embedding(ids).float()
            for block, cache in zip(self.blocks, self.cache, strict=True):
                mixed = attend(block.qkv(normed(x, block.norms[0])), cache)
                x = block.o(mixed, x)
                x = block.feed_forward(x, normed(x, block.norms[1]))
            self.length = end
            return self.head(normed(x if every else x[-1:], self.norm)).float()

    def _attend_one(self, qkv: Tensor, cache: Tensor) -> Tensor:
        """qkv [1, (heads + 2 * shared) * width] -> [1, heads * width]; key and value go to ``cache``."""
        qkv = qkv.contiguous()
        out, position = qkv.new_empty(1, self.heads * self.width), self.length
        sizes = self.heads, self.shared, self.width, self.max_tokens, position
        places = addresses(qkv, self.cos[position], self.sin[position], cache, out)
        kernels.attend(sizes, self.scaling, places)
        return out

    def _attend(self, qkv: Tensor, cache: Tensor) -> Tensor:
        """:meth:`_attend_one` of any number of tokens."""
        tokens, heads, shared, width = len(qkv), self.heads, self.shared, self.width
        start, end = self.length, self.length + tokens
        qkv = qkv.view(tokens, heads + 2 * shared, width).transpose(0, 1)
        turned, value = qkv[: heads + shared], qkv[heads + shared :]
        low, high = turned.chunk(2, 2)
        turned = turned * self.cos[start:end] + torch.cat([-high, low], 2) * self.sin[start:end]
        cache[0, :, start:end], cache[1, :, start:end] = turned[heads:], value
        keys, values = cache[:, :, :end].unsqueeze(1).unbind(0)
        query, causal = turned[:heads].unsqueeze(0), tokens > 1
        mixed = F.scaled_dot_product_attention(
            query, keys, values, is_causal=causal, scale=self.scaling, enable_gqa=True
        )
        return mixed[0].transpose(0, 1).reshape(tokens, heads * width)


_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")


def _check(model: Any, max_tokens: int) -> None:
    layers = getattr(getattr(model, "model", None), "layers", None)
    names = {type(layer).__name__ for layer in layers} if layers is not None else {type(model).__name__}
    if not names <= {*_LAYERS}:
        raise ValueError(f"decodes networks of {', '.join(_LAYERS)}; this one has {', '.join(sorted(names))}")
    window = getattr(model.config, "sliding_window", None)
    if window and window < max_tokens:
        raise ValueError(f"attention sees a sliding window of {window} tokens: max_tokens must not be more")


@contextmanager
def without_onednn(whether: bool = True):
    """At batch 1 PyTorch's own bfloat16 product reads 2.5 times as fast as oneDNN's; prompts are faster with it."""
    before = bool(torch.backends.mkldnn.enabled)
    if whether:
        torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
