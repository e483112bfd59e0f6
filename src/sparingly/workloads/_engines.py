"""Dense output layers at their best: every engine here scores all classes and returns the best k.

They are the denominators of the savings, so each gets what made it cheapest in processor time. Milliseconds per token
by :func:`best_engine`, 288,992 classes of 256 trained weights, one thread of a virtual EPYC 9004 with AVX-512, other
work running beside it:

==============================================  =======  ========  =========
engine                                          batch 1  batch 64  batch 256
==============================================  =======  ========  =========
pytorch, fp32 (``linear``, ``topk``)            46       4.3       3.2
pytorch tuned, fp32 (other layout, huge pages)  15       3.9       2.9
onnxruntime, fp32 (``Gemm``)                    16       2.1       1.8
pytorch, int8 (``quantize_dynamic``)            14       1.6       1.2
onnxruntime, int8 (``MatMulNBits``)             5.5      1.7       1.3
onnxruntime, int8 (``DynamicQuantizeMatMul``)   9.2      0.62      0.58
pytorch, bf16                                   32       1.8       1.6
==============================================  =======  ========  =========

A second thread made none of them cheaper per token beyond noise. At batch 1 the fp32 ones read the weights at 20 GB/s,
about what one thread gets from memory there in order, so there is little left to give. Splitting the classes into
blocks whose scores stay in the cache made none of them cheaper.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparingly.ops._pages import request_huge_pages

__all__ = ["Best", "Engine", "best_by_batch", "best_engine", "dense_engines"]

PRECISIONS = ("fp32", "int8", "bf16")
MAX_SCORE_BYTES = 2 << 30
"""Batches whose scores of all classes would be larger are not tried: cost per token is flat long before."""

_MIN_SAMPLE_NS = 20_000_000
_BLOCK = 128  # classes per block in :func:`best_scores`
_NO_CLASS = np.float32(-3e38)  # bias of the classes that fill the last block; finite, as an infinity gives NaN in int8


class OutputLayer(Protocol):
    """``torch.nn.Linear``, ``sparingly.SelectiveHead`` or anything else with these two."""

    weight: Any  # Tensor [num_classes, in_features]
    bias: Any  # Tensor [num_classes] or None


def best_scores(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``scores.topk(k)`` of [tokens, classes], 7 times as fast: the best k lie in the k blocks with the best maxima."""
    tokens, classes = scores.shape
    blocks = classes // _BLOCK
    if blocks < k:
        whole = scores.topk(k)
        return whole.values, whole.indices
    tops = scores[:, : blocks * _BLOCK].view(tokens, blocks, _BLOCK).amax(2).topk(k).indices
    candidates = (tops.unsqueeze(2) * _BLOCK + torch.arange(_BLOCK)).view(tokens, -1)
    rest = torch.arange(blocks * _BLOCK, classes).expand(tokens, -1)
    candidates = torch.cat([candidates, rest], 1)
    best = scores.gather(1, candidates).topk(k)
    return best.values, candidates.gather(1, best.indices)


def quantise(weight: Tensor, largest: int = 127) -> tuple[Tensor, Tensor]:
    """Symmetric int8 rows: (int8 [N, d] in -largest..largest, float32 scales [N]), row = int8 * scale."""
    scale = weight.abs().amax(1).clamp_min(1e-12) / largest
    return (weight / scale.unsqueeze(1)).round_().clamp_(-largest, largest).to(torch.int8), scale


LARGEST_CODE = 127 if torch.cpu._is_vnni_supported() else 63
"""Of the weights of DynamicQuantizeMatMul: without VNNI its sums of two products stop at 32,767, for which
``quantize_dynamic`` has ``reduce_range``."""


class Engine(ABC):
    """Answers with the ``k`` best of all classes. ``name``, ``precision``; uses as many threads as PyTorch."""

    name: str
    precision: str

    def __init__(self, layer: OutputLayer, k: int = 5):
        self.weight = layer.weight.detach().float().contiguous()
        self.classes = len(self.weight)
        self.bias = torch.zeros(len(self.weight)) if layer.bias is None else layer.bias.detach().float()
        self.k = k

    @abstractmethod
    def answer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden float32 [tokens, d] -> (scores float32 [tokens, k], classes int64 [tokens, k]), best first."""

    def __repr__(self) -> str:
        return f"{self.name} ({self.precision})"


class Torch(Engine):
    """PyTorch as everybody writes it: ``linear`` and ``topk``."""

    name, precision = "pytorch", "fp32"

    @torch.inference_mode()
    def answer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        best = F.linear(hidden, self.weight, self.bias).topk(self.k)
        return best.values, best.indices


class TorchTuned(Engine):
    """PyTorch with the weights as [d, N] in 2 MB pages (MKL's matrix-vector product is slow for the other layout)."""

    name, precision = "pytorch tuned", "fp32"

    def __init__(self, layer: OutputLayer, k: int = 5):
        super().__init__(layer, k)
        self.weight = self.weight.t().contiguous()
        request_huge_pages(self.weight)

    @torch.inference_mode()
    def answer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return best_scores(torch.addmm(self.bias, hidden, self.weight), self.k)


class TorchBfloat16(Engine):
    """PyTorch with bfloat16 weights, inputs and scores (float32 scores would take as long again)."""

    name, precision = "pytorch", "bf16"

    def __init__(self, layer: OutputLayer, k: int = 5):
        super().__init__(layer, k)
        self.weight, self.bias = self.weight.bfloat16(), self.bias.bfloat16()

    @torch.inference_mode()
    def answer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores, classes = best_scores(F.linear(hidden.bfloat16(), self.weight, self.bias), self.k)
        return scores.float(), classes


class TorchInt8(Engine):
    """PyTorch's dynamic quantisation, int8 per channel, with oneDNN's kernels (faster than FBGEMM's from batch 16)."""

    name, precision = "pytorch quantize_dynamic", "int8"

    def __init__(self, layer: OutputLayer, k: int = 5):
        super().__init__(layer, k)
        linear = torch.nn.Linear(self.weight.shape[1], self.weight.shape[0], device="meta")
        linear.weight, linear.bias = torch.nn.Parameter(self.weight), torch.nn.Parameter(self.bias)
        quantization = torch.ao.quantization
        with self._kernels(), _quiet():
            self._linear = quantization.quantize_dynamic(
                torch.nn.Sequential(linear),
                {torch.nn.Linear: quantization.qconfig.per_channel_dynamic_qconfig},
                torch.qint8,
            )
        del self.weight, self.bias

    @staticmethod
    @contextmanager
    def _kernels():
        before = torch.backends.quantized.engine
        if "onednn" in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = "onednn"
        try:
            yield
        finally:
            torch.backends.quantized.engine = before

    @torch.inference_mode()
    def answer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        with self._kernels():
            return best_scores(self._linear(hidden), self.k)


@contextmanager
def _quiet():
    """torch.ao.quantization announces its successor, which needs a C++ compiler on a CPU."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class OnnxRuntime(Engine):
    """ONNX Runtime, one session per thread count, with the choice of the best k in the graph.

    Waiting threads do not spin: that would be charged as processor time. ``kind`` is a key of :data:`ONNX_KINDS`.
    Raises ImportError without ``onnx`` and ``onnxruntime``.
    """

    def __init__(self, layer: OutputLayer, k: int = 5, kind: str = "gemm"):
        super().__init__(layer, k)
        self.name, self.precision = ONNX_KINDS[kind]
        if self.classes < k * _BLOCK:
            raise ValueError(f"needs at least {k * _BLOCK} classes for the best {k}, got {self.classes}")
        self._graph, self._initializers = _onnx_graph(kind, self.weight, self.bias, k)
        del self.weight, self.bias
        self._sessions: dict[int, Any] = {}

    def _session(self, threads: int) -> Any:
        if threads not in self._sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.log_severity_level = 3
            # Not inside the model: it could not be larger than 2 GB, and every session would hold a copy.
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._initializers.values()]
            options.add_external_initializers(list(self._initializers), values)
            session = onnxruntime.InferenceSession(self._graph, options, providers=["CPUExecutionProvider"])
            self._sessions[threads] = session, values
        return self._sessions[threads][0]

    def answer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        feeds = {"hidden": hidden.detach().numpy()}
        scores, blocks = self._session(torch.get_num_threads()).run(None, feeds)
        best = torch.from_numpy(scores).view(len(hidden), -1).topk(self.k)
        block = torch.from_numpy(blocks).gather(1, best.indices // _BLOCK)
        return best.values, block * _BLOCK + best.indices % _BLOCK


ONNX_KINDS = {
    "gemm": ("onnxruntime Gemm", "fp32"),
    "dynamic": ("onnxruntime DynamicQuantizeMatMul", "int8"),
    "nbits": ("onnxruntime MatMulNBits", "int8"),
}
"""Kind -> (name, precision). "dynamic" is what ``quantize_dynamic(per_channel=True)`` becomes when it is optimised."""


def _scoring(kind: str, weight: Tensor, bias: Tensor) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """The operator that scores, its attributes, and its inputs after ``hidden`` in order (blank: one left out)."""
    if kind == "gemm":
        return "Gemm", {"transB": 1}, {"weight": weight.numpy(), "bias": bias.numpy()}
    rows, scale = quantise(weight, LARGEST_CODE if kind == "dynamic" else 127)
    if kind == "dynamic":
        columns = rows.t().contiguous().numpy()
        inputs = {"weight": columns, "scale": scale.numpy(), "": np.empty(0), "bias": bias.numpy()}
        return "DynamicQuantizeMatMul", {"domain": "com.microsoft"}, inputs
    classes, d = weight.shape
    size = next((s for s in (256, 128, 64, 32, 16) if d % s == 0), None)
    if size is None:
        raise ValueError(f"MatMulNBits needs in_features divisible by 16, got {d}")
    # accuracy_level 4: the input is quantised to int8 as well. Stored with an offset of 128.
    attributes = {"domain": "com.microsoft", "K": d, "N": classes, "bits": 8, "block_size": size, "accuracy_level": 4}
    shifted = (rows.view(torch.uint8) ^ 128).view(classes, d // size, size).numpy()
    scales = scale.repeat_interleave(d // size).numpy()
    inputs = {"weight": shifted, "scale": scales, "": np.empty(0), " ": np.empty(0), "bias": bias.numpy()}
    return "MatMulNBits", attributes, inputs


def _onnx_graph(kind: str, weight: Tensor, bias: Tensor, k: int) -> tuple[bytes, dict[str, np.ndarray]]:
    """The model without its weights, and the weights: hidden -> scores [tokens, k, 128] of the best blocks, blocks."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise ImportError('the dense engines need onnx and onnxruntime: pip install "sparingly[bench]"') from error
    spare = -len(weight) % _BLOCK
    weight = F.pad(weight, (0, 0, 0, spare)).contiguous()
    bias = F.pad(bias, (0, spare), value=float(_NO_CLASS)).contiguous()
    operator, attributes, inputs = _scoring(kind, weight, bias)
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node(operator, ["hidden", *(name.strip() for name in inputs)], ["scores"], **attributes),
        node("Reshape", ["scores", "shape"], ["by_block"]),
        node("ReduceMax", ["by_block", "last"], ["maxima"], keepdims=0),
        node("TopK", ["maxima", "k"], ["unused", "blocks"]),
        node("Unsqueeze", ["blocks", "last"], ["places"]),
        node("GatherND", ["by_block", "places"], ["best"], batch_dims=1),
    ]
    numbers = {"shape": [0, len(weight) // _BLOCK, _BLOCK], "last": [2], "k": [k]}
    initializers = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    arrays = {name: array for name, array in inputs.items() if name.strip()}
    for name, array in arrays.items():
        tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor.external_data.add(key="location", value="given to the session")
        initializers.append(tensor)
    graph = helper.make_graph(
        nodes,
        "dense",
        [info("hidden", TensorProto.FLOAT, ["tokens", weight.shape[1]])],
        [info("best", TensorProto.FLOAT, ["tokens", k, _BLOCK]), info("blocks", TensorProto.INT64, ["tokens", k])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(), arrays


def dense_engines(layer: OutputLayer, precision: str = "fp32", k: int = 5) -> list[Engine]:
    """Every engine of a precision ("fp32", "int8" or "bf16") for a ``Linear`` or a head; weights are copied or shared.

    Raises ValueError for another precision, ImportError without ``onnx`` or ``onnxruntime``.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if precision == "bf16":
        return [TorchBfloat16(layer, k)]
    if precision == "fp32":
        return [Torch(layer, k), TorchTuned(layer, k), OnnxRuntime(layer, k, "gemm")]
    return [TorchInt8(layer, k), OnnxRuntime(layer, k, "dynamic"), OnnxRuntime(layer, k, "nbits")]


@dataclass(frozen=True)
class Best:
    """The cheapest engine for one batch size: ``cpu_s`` processor-seconds per token, ``wall_s`` seconds per token."""

    engine: Engine
    threads: int
    batch: int
    cpu_s: float
    wall_s: float
    tried: dict[str, float]  # "engine (precision), threads" -> processor-seconds per token, all candidates


def _sample(engine: Engine, batches: Iterator[Tensor], threads: int) -> tuple[float, float]:
    """Processor and wall seconds per token, over as many batches as take _MIN_SAMPLE_NS."""
    torch.set_num_threads(threads)
    cpu, wall, tokens = time.process_time_ns(), time.perf_counter_ns(), 0
    while tokens == 0 or time.process_time_ns() - cpu < _MIN_SAMPLE_NS:
        hidden = next(batches)
        engine.answer(hidden)
        tokens += len(hidden)
    return (time.process_time_ns() - cpu) * 1e-9 / tokens, (time.perf_counter_ns() - wall) * 1e-9 / tokens


def best_engine(
    engines: Sequence[Engine],
    hidden: Tensor,
    threads: Sequence[int] = (1, 2),
    *,
    batch: int | None = None,
    rounds: int = 7,
    seed: int = 0,
) -> Best:
    """The engine and thread count that answer for the least processor time per token.

    ``hidden`` float32 [tokens, d] is answered ``batch`` tokens at a time, by default all at once; each call takes the
    next ones, because asking the same again would find all that a search reads in the cache. The candidates take
    turns in a new random order each round, so that drift of the machine hits them alike; the median over rounds
    counts. One that took 1.5 times the best one's time in the first round is left out of the rest.
    Raises ValueError if there are fewer tokens than ``batch``.
    """
    size = len(hidden) if batch is None else batch
    if not 1 <= size <= len(hidden):
        raise ValueError(f"batch must be in 1..{len(hidden)}, the number of hidden states, got {size}")
    parts = hidden[: len(hidden) // size * size].split(size)
    rng, before = np.random.default_rng(seed), torch.get_num_threads()
    candidates = [(engine, cycle(parts), count) for engine in engines for count in threads]
    samples: list[list[tuple[float, float]]] = [[] for _ in candidates]
    try:
        for engine, batches, count in candidates:  # Sessions and caches are made by the first call.
            torch.set_num_threads(count)
            engine.answer(next(batches))
        live = list(range(len(candidates)))
        for _ in range(rounds):
            for number in rng.permutation(live):
                samples[number].append(_sample(*candidates[number]))
            least = min(samples[number][0][0] for number in live)
            live = [number for number in live if samples[number][0][0] <= 1.5 * least]
    finally:
        torch.set_num_threads(before)
    medians = [np.median(taken, axis=0) for taken in samples]
    winner = min(live, key=lambda number: medians[number][0])
    tried = {f"{e!r}, {n} threads": float(m[0]) for (e, _, n), m in zip(candidates, medians, strict=True)}
    cpu_s, wall_s = medians[winner].tolist()
    return Best(candidates[winner][0], candidates[winner][2], size, cpu_s, wall_s, tried)


def best_by_batch(
    engines: Sequence[Engine],
    hidden: Tensor,
    batches: Sequence[int] = (1, 16, 64, 256, 1024),
    threads: Sequence[int] = (1, 2),
    rounds: int = 5,
) -> dict[int, Best]:
    """:func:`best_engine` for each batch size; ``hidden`` is repeated if it has too few tokens.

    Batches whose scores would take more than MAX_SCORE_BYTES are left out, the first one never.
    """
    results: dict[int, Best] = {}
    classes = max(engine.classes for engine in engines)
    for batch in batches:
        if results and batch * classes * 4 > MAX_SCORE_BYTES:
            continue
        states = hidden.repeat(-(-batch // len(hidden)), 1)
        results[batch] = best_engine(engines, states, threads, batch=batch, rounds=rounds)
    return results
