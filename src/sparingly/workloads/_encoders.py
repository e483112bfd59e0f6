"""Sentence encoders of the BERT kind at their best: every engine gives the mean of a sentence's last states.

Dense engines are the denominators of the savings. The selective one is the best of them, ONNX Runtime, with its graph
cut where a layer skips, and a compiled call in between; so dense and selective differ in what is selected. Sentences of
a batch have one length, so that no engine pays for padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparingly.nn import _rows
from sparingly.nn.linear import SelectiveInputs
from sparingly.ops._pages import request_huge_pages
from sparingly.ops.threshold_accumulate import many

_CONTRIB = "com.microsoft"


class Engine(ABC):
    """``name``, and float32; uses one thread if PyTorch does."""

    name: str

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [batch, tokens], all real -> float32 [batch, width] of length 1."""

    def __repr__(self) -> str:
        return f"{self.name} (fp32)"


class Kept:
    """The product of a :class:`SelectiveInputs` with many tokens: only rows that some token keeps are read.

    Weights are read where the layer keeps them. While the layer is off or not fitted, every row runs.
    """

    def __init__(self, layer: SelectiveInputs):
        if layer.in_features % many.MULTIPLE or layer.out_features % many.MULTIPLE:
            raise ValueError(
                f"needs in_features and out_features divisible by {many.MULTIPLE}, "
                f"got {layer.in_features} and {layer.out_features}"
            )
        self.layer = layer
        self.rows = _rows.by_input(layer).detach()
        if self.rows.dtype != torch.float32 or not self.rows.is_contiguous():
            raise ValueError(f"needs float32 weights, one input a row, got {self.rows.dtype} {self.rows.stride()}")
        request_huge_pages(self.rows)
        self._vectors: tuple[Tensor, ...] = ()

    def _cuts(self) -> tuple[Tensor, ...]:
        """Cut, centre and what a token starts from; made anew when the setting changes."""
        selector, bias = self.layer.selector, self.layer.bias
        if not self._vectors or self._vectors[0] is not selector.cut:
            centre = selector.centre if selector.centre.numel() else torch.zeros(self.layer.in_features)
            begin = torch.zeros(self.layer.out_features) if bias is None else bias.detach().float()
            made = (selector.cut, centre, begin + centre @ self.rows)
            self._vectors = (selector.cut, *[vector.float().contiguous() for vector in made])
        return self._vectors[1:]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x float32 [..., in_features], contiguous -> [..., out_features]."""
        layer, (n, d) = self.layer, self.rows.shape
        given = torch.from_numpy(x).view(-1, n)
        if layer.off or not layer.selector.fitted:
            out = given @ self.rows if layer.bias is None else torch.addmm(layer.bias.detach(), given, self.rows)
        else:
            cut, centre, begin = self._cuts()
            out = many.run(given, self.rows, cut, begin, layer.ran, centre=centre)
        return out.numpy().reshape(*x.shape[:-1], d)


class Modules(Engine):
    """The network as transformers runs it, module by module."""

    name = "transformers"

    def __init__(self, model: Any):
        self.model = model

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        return F.normalize(self.model(input_ids=ids).last_hidden_state.float().mean(1), dim=1)


def _stacked(layers: list[Any]) -> tuple[Tensor, Tensor]:
    """Several linear layers of one input -> weight float32 [in, sum of outs] in large pages, bias."""
    weight = torch.cat([layer.weight.detach().float() for layer in layers]).t().contiguous()
    request_huge_pages(weight)
    return weight, torch.cat([layer.bias.detach().float() for layer in layers])


def _norm(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.weight.detach().float(), layer.bias.detach().float()


class _Block:
    """One layer's parameters: query, key and value as one matrix, ``kept`` where the second layer of the MLP skips."""

    def __init__(self, layer: Any):
        attention = layer.attention.self
        self.qkv = _stacked([attention.query, attention.key, attention.value])
        self.o, self.norm = _stacked([layer.attention.output.dense]), _norm(layer.attention.output.LayerNorm)
        self.up, down = _stacked([layer.intermediate.dense]), layer.output.dense
        self.kept = Kept(down) if isinstance(down, SelectiveInputs) else None
        self.down = None if self.kept else _stacked([down])
        self.norm_out = _norm(layer.output.LayerNorm)


class _Parts:
    """What every engine here reads of a ``transformers.BertModel``. Raises ValueError for another network."""

    def __init__(self, model: Any):
        config = model.config
        if getattr(config, "model_type", None) != "bert" or config.hidden_act != "gelu" or config.is_decoder:
            raise ValueError(
                f"encodes BERT networks with gelu, this one is {getattr(config, 'model_type', type(model).__name__)}"
            )
        self.heads, self.width, self.eps = config.num_attention_heads, config.hidden_size, config.layer_norm_eps
        embeddings = model.embeddings
        self.words = embeddings.word_embeddings.weight.detach().float()
        kind = embeddings.token_type_embeddings.weight.detach().float()[0]
        self.positions = embeddings.position_embeddings.weight.detach().float() + kind
        self.norm = _norm(embeddings.LayerNorm)
        self.blocks = [_Block(layer) for layer in model.encoder.layer]


class Slim(Engine):
    """PyTorch with few calls around the matrices; layers that skip take the compiled call. A ledger sees all of it."""

    name = "pytorch, slim loop"

    def __init__(self, model: Any):
        self.parts = _Parts(model)

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        parts, (batch, tokens) = self.parts, ids.shape
        heads, width = parts.heads, parts.width
        x = (F.embedding(ids, parts.words) + parts.positions[:tokens]).view(-1, width)
        x = F.layer_norm(x, (width,), *parts.norm, parts.eps)
        for block in parts.blocks:
            qkv = torch.addmm(block.qkv[1], x, block.qkv[0]).view(batch, tokens, 3, heads, width // heads)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, width)
            x = F.layer_norm(torch.addmm(block.o[1], mixed, block.o[0]).add_(x), (width,), *block.norm, parts.eps)
            hidden = F.gelu(torch.addmm(block.up[1], x, block.up[0]))
            if block.kept is not None:
                out = torch.from_numpy(block.kept(hidden.numpy()))
            else:
                assert block.down is not None
                out = torch.addmm(block.down[1], hidden, block.down[0])
            x = F.layer_norm(out + x, (width,), *block.norm_out, parts.eps)
        return F.normalize(x.view(batch, tokens, width).mean(1), dim=1)


class _Graph:
    """An ONNX graph as it is written, node by node."""

    def __init__(self, **inputs: Any):
        self.inputs, self.nodes, self.values = inputs, [], []

    def value(self, value: Tensor | list[int]) -> str:
        from onnx import numpy_helper

        array = np.array(value, np.int64) if isinstance(value, list) else np.ascontiguousarray(value.numpy())
        name = f"v{len(self.values)}"
        self.values.append(numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        from onnx import helper

        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, [*inputs], [name], domain=domain, **attributes))
        return name

    def linear(self, x: str, layer: tuple[Tensor, Tensor]) -> str:
        return self.node("MatMul", x, self.value(layer[0]))

    def norm(self, x: str, residual: str, norm: tuple[Tensor, Tensor], eps: float, bias: Tensor | None) -> str:
        """Layer normalisation of x + residual + bias."""
        last = () if bias is None else (self.value(bias),)
        inputs = (x, residual, *map(self.value, norm), *last)
        return self.node("SkipLayerNormalization", *inputs, domain=_CONTRIB, epsilon=eps)

    def session(self, outputs: dict[str, Any]) -> Any:
        """A session on one thread that gives ``outputs`` (name -> shape)."""
        import onnxruntime
        from onnx import TensorProto, helper

        kinds = {"ids": TensorProto.INT64}
        info = helper.make_tensor_value_info
        given, made = (
            [info(name, kinds.get(name, TensorProto.FLOAT), shape) for name, shape in of.items()]
            for of in (self.inputs, outputs)
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_CONTRIB, 1)]
        graph = helper.make_graph(self.nodes, "encoder", given, made, self.values)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Onnx(Engine):
    """ONNX Runtime with its fused operators (attention, norm with residual, gelu with bias), one thread.

    A layer that skips ends one graph and begins the next; the compiled call is made in between. Raises ImportError
    without ``onnx`` and ``onnxruntime``, ValueError for another network than :class:`Slim` takes.
    """

    name = "onnxruntime"

    def __init__(self, model: Any):
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise ImportError('the dense engines need onnx and onnxruntime: pip install "sparingly[bench]"') from error
        parts = _Parts(model)
        self.kept: list[Kept] = []
        self.sessions: list[Any] = []
        graph = _Graph(ids=["batch", "tokens"])
        x = _embedded(graph, parts)
        for block in parts.blocks:
            x, hidden = _attended(graph, block, x, parts)
            if block.kept is None:
                assert block.down is not None
                x = graph.norm(graph.linear(hidden, block.down), x, block.norm_out, parts.eps, block.down[1])
                continue
            units = block.kept.rows.shape[0]
            shape = ["batch", "tokens", parts.width]
            self.sessions.append(graph.session({hidden: ["batch", "tokens", units], x: shape}))
            self.kept.append(block.kept)
            graph = _Graph(added=shape, residual=shape)
            x = graph.norm("added", "residual", block.norm_out, parts.eps, None)
        mean = graph.node("ReduceMean", x, graph.value([1]), keepdims=0)
        pooled = graph.node("LpNormalization", mean, axis=1, p=2)
        self.sessions.append(graph.session({pooled: ["batch", parts.width]}))

    def embed(self, ids: Tensor) -> Tensor:
        feeds: dict[str, np.ndarray] = {"ids": ids.numpy()}
        for session, kept in zip(self.sessions, self.kept, strict=False):
            hidden, residual = session.run(None, feeds)
            feeds = {"added": kept(hidden), "residual": residual}
        return torch.from_numpy(self.sessions[-1].run(None, feeds)[0])


def _embedded(graph: _Graph, parts: _Parts) -> str:
    """Words and positions, normalised."""
    zero, one, two = (graph.value([number]) for number in range(3))
    tokens = graph.node("Slice", graph.node("Shape", "ids"), one, two)
    positions = graph.node("Slice", graph.value(parts.positions), zero, tokens, zero)
    words = graph.node("Gather", graph.value(parts.words), "ids")
    both = graph.node("Add", words, positions)
    return graph.node("LayerNormalization", both, *map(graph.value, parts.norm), epsilon=parts.eps)


def _attended(graph: _Graph, block: _Block, x: str, parts: _Parts) -> tuple[str, str]:
    """A layer as far as its gelu: (what its second half is added to, the activations)."""
    qkv = (graph.value(part) for part in block.qkv)
    mixed = graph.node("Attention", x, *qkv, "", domain=_CONTRIB, num_heads=parts.heads)
    x = graph.norm(graph.linear(mixed, block.o), x, block.norm, parts.eps, block.o[1])
    return x, graph.node("BiasGelu", graph.linear(x, block.up), graph.value(block.up[1]), domain=_CONTRIB)
