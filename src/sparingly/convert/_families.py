"""What is known of model families, as data: names of attributes, activations, and what inputs they take.

Nothing here is needed for a network that can be run: `_match` then compares the numbers that flow through it. Names
serve where nothing can be run (a part of a model that the example does not reach).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Names:
    """Attribute paths of one multi-layer perceptron, relative to the module that holds it."""

    up: str
    down: str
    gate: str | None = None
    activation: str | None = None


# One row per naming; in brackets some of the families that use it.
MLP_NAMES = (
    Names("up_proj", "down_proj", "gate_proj", "act_fn"),  # Llama, Mistral, Qwen, Gemma, OLMo, DeepSeek
    Names("w3", "w2", "w1", "act_fn"),  # Mixtral before transformers 5, LFM2, Meta's own Llama
    Names("wi_1", "wo", "wi_0", "act"),  # T5 v1.1, mT5, UMT5, LongT5
    Names("linear_v", "linear_1", "linear", "act_fn"),  # Grok-like naming
    Names("v1_proj", "w2_proj", "w1_proj", "activation_fn"),  # DBRX
    Names("fc1_1", "fc2", "fc1_0"),
    Names("c_fc_1", "c_proj", "c_fc_0", "act"),  # EXAONE
    Names("up_proj", "down_proj", None, "act_fn"),  # Nemotron, Starcoder-like
    Names("c_fc", "c_proj", None, "act"),  # GPT-2, GPT-Neo, StarCoder2, ImageGPT
    Names("fc_in", "fc_out", None, "act"),  # GPT-J, CodeGen
    Names("dense_h_to_4h", "dense_4h_to_h", None, "act"),  # GPT-NeoX, Falcon, Persimmon, BLOOM
    Names("up_proj", "down_proj", None, "act"),  # MPT
    Names("wi", "wo", None, "act"),  # T5
    Names("fc1", "fc2", None, "activation_fn"),  # OPT, BART, Whisper, XGLM, CLIP, SigLIP
    Names("lin1", "lin2", None, "activation"),  # DistilBERT, SAM
    Names("linear1", "linear2", None, "activation"),  # torch.nn.TransformerEncoderLayer, FNet-like
    Names("linear_1", "linear_2", None, "activation_function"),  # Funnel
    Names("layer_1", "layer_2", None, "activation_function"),  # XLNet
    Names("ffn", "ffn_output", None, "activation"),  # ALBERT
    Names("w_1", "w_2", None, "activation"),
    Names("pwconv1", "pwconv2", None, "act"),  # ConvNeXt
    Names("intermediate.dense", "output.dense", None, "intermediate.intermediate_act_fn"),  # BERT and its kin
    Names("intermediate_query.dense", "output_query.dense", None, "intermediate_query.intermediate_act_fn"),  # Q-Former
    Names("intermediate_dense", "output_dense", None, "intermediate_act_fn"),  # wav2vec 2.0, HuBERT
)

# Halves of one matrix: (fused, down, activation).
FUSED_NAMES = (
    ("gate_up_proj", "down_proj", "activation_fn"),  # Phi-3, GLM
    ("Wi", "Wo", "act"),  # ModernBERT
    ("weights_in", "weights_out", None),  # DINOv2
    ("input_linear", "output_linear", "activation"),  # Granite's shared experts
)

# How many arguments the forward of a module of all experts takes -> how they say which expert serves which token.
EXPERT_CALLS = {
    3: "routed",  # tokens, ids and weights of each token's experts: Mixtral and most
    2: "shared",  # tokens and weights of all experts: Inkling's shared experts
    1: "sorted",  # a row for each expert and token, zeros for what is not routed: Llama 4
}

ATTENTION_WORDS = ("attention", "attn")
ROUTER_NAMES = frozenset({"router", "gate", "shared_expert_gate", "gate_network", "mlp_router"})


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x) (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)² (So et al., Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


def leaky_relu_tenth(x: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.1."""
    return F.leaky_relu(x, 0.1)


def leaky_relu_fifth(x: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.2."""
    return F.leaky_relu(x, 0.2)


Activation = Callable[[Tensor], Tensor]

# Elementwise functions that are tried where a model has no activation module of its own. The identity is left out on
# purpose: a linear layer that follows another is no MLP, and a single token's attention output equals its values.
ACTIVATIONS: tuple[Activation, ...] = (
    F.silu,
    F.relu,
    F.gelu,
    gelu_tanh,
    relu_squared,
    quick_gelu,
    torch.sigmoid,
    torch.tanh,
    F.mish,
    F.leaky_relu,
    leaky_relu_tenth,
    leaky_relu_fifth,
    F.elu,
    F.selu,
    F.softplus,
    F.hardswish,
    F.hardsigmoid,
    F.hardtanh,
    F.relu6,
    F.softsign,
    F.logsigmoid,
    torch.sin,
    torch.exp,
    torch.square,
    torch.abs,
)


def _sides(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or getattr(config, "input_size", None) or 64
    if isinstance(size, dict):
        size = tuple(size.values())[:2]
    if isinstance(size, (tuple, list)):
        return int(size[0]), int(size[-1])
    return int(size), int(size)


def _ids(config: Any) -> Tensor:
    vocab = getattr(config, "vocab_size", None) or 16
    # Small ids are often special (padding, separators), on which models compute masks.
    low = min(4, int(vocab) - 1)
    return torch.randint(low, int(vocab), (2, 8))


def _pixels(config: Any) -> Iterator[Tensor]:
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    height, width = _sides(config)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    if isinstance(frames, int):
        yield torch.randn(1, frames, channels, height, width)
    yield torch.randn(1, channels, height, width)
    yield torch.randn(1, channels, 224, 224)


def _waves(config: Any) -> Iterator[Tensor]:
    bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if isinstance(bins, int) and isinstance(length, int):
        yield torch.randn(1, length, bins)
    yield torch.randn(1, 8000)
    yield torch.randn(1, 1, 8000)


def _features(config: Any) -> Iterator[Tensor]:
    mel = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", None) or 80
    positions = getattr(config, "max_source_positions", None)
    if isinstance(positions, int):
        yield torch.randn(1, mel, 2 * positions)
    width = getattr(config, "input_feat_per_channel", None) or getattr(config, "input_dim", None) or mel
    yield torch.randn(1, 64, width)
    yield torch.randn(1, mel, 64)


# What the main input of a transformers model may look like, by its name: candidates, tried in turn.
MAIN_INPUTS: dict[str, Callable[[Any], Iterator[Tensor]]] = {
    "input_ids": lambda config: iter((_ids(config),)),
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_values": _waves,
    "input_features": _features,
    "inputs_embeds": lambda config: iter((torch.randn(2, 8, int(getattr(config, "hidden_size", 64))),)),
}


def model_inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Candidate keyword arguments of one small forward of a transformers model, from its configuration.

    They are random; some may not fit, so a caller tries them in turn. Nothing is yielded for a main input that no row
    of MAIN_INPUTS knows.
    """
    import inspect

    config = model.config
    names = set(inspect.signature(type(model).forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    mains = [name for name in (*([main] if isinstance(main, str) else main), *MAIN_INPUTS) if name in names]
    for main in dict.fromkeys(name for name in mains if name in MAIN_INPUTS):
        part = config
        if main != "input_ids" and hasattr(config, "vision_config") and "pixel" in main:
            part = config.vision_config
        elif main == "input_ids" and hasattr(config, "get_text_config"):
            part = config.get_text_config()
        for value in MAIN_INPUTS[main](part):
            kwargs: dict[str, Any] = {main: value}
            if "use_cache" in names:
                kwargs["use_cache"] = False
            if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
                kwargs["decoder_input_ids"] = _ids(part)
            yield from _with_images(config, names, kwargs)


def _with_images(config: Any, names: set[str], kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """First text and images together (CLIP asks for both), then text alone, then with boxes of a layout model."""
    if "input_ids" in kwargs and "pixel_values" in names:
        for pixels in _pixels(getattr(config, "vision_config", config)):
            yield {**kwargs, "pixel_values": pixels.expand(2, *pixels.shape[1:]).contiguous()}
    yield kwargs
    if "input_ids" in kwargs and "bbox" in names:
        yield {**kwargs, "bbox": torch.zeros(2, 8, 4, dtype=torch.long)}
