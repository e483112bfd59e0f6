"""What each of PyTorch's operations does to its operands: one counting rule per kind of operation.

A new operation is one row in a table below; pointwise operations and reductions need none, PyTorch tags them.
Operations that are no MACs are counted per element by their leading term (a softmax as 4, a layer norm as 6);
they never decide a comparison, where MACs and bytes do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sparingly.energy._grouped import grouped_mm

__all__ = ["Call", "Cost", "Rule", "rule_for", "tensor_bytes"]


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory behind ``tensor``: an expanded dimension counts once, a sparse COO tensor its non-zeros."""
    if tensor.layout == torch.sparse_coo:
        return tensor_bytes(tensor._indices()) + tensor_bytes(tensor._values())
    if tensor.layout != torch.strided:
        return tensor.element_size() * tensor.numel()
    count = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    if not tensor.numel():
        return 0
    # Overlapping windows (unfold, as_strided) cannot read more than their storage holds.
    return min(count * tensor.element_size(), tensor.untyped_storage().nbytes())


def _numel(tensor: torch.Tensor) -> int:
    return tensor._values().numel() if tensor.layout == torch.sparse_coo else tensor.numel()


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _total_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct operands: ``x * x`` reads x once."""
    seen: dict[Any, int] = {}
    for t in tensors:
        strided = t.layout == torch.strided
        key = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype) if strided else id(t)
        seen[key] = tensor_bytes(t)
    return sum(seen.values())


@dataclass(slots=True)
class Call:
    """One operation as it ran: its schema's arguments by name, and its result."""

    values: dict[str, Any]
    written_names: tuple[str, ...]
    out_names: tuple[str, ...]
    out: Any

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor operand in schema order, out= buffers left out."""
        return [t for name, v in self.values.items() if name not in self.out_names for t in _tensors(v)]

    @property
    def written(self) -> list[torch.Tensor]:
        """Results, and operands that were changed in place."""
        return [*_tensors(self.out), *(t for name in self.written_names for t in _tensors(self.values.get(name)))]

    @property
    def result(self) -> torch.Tensor:
        """The first tensor written."""
        return self.written[0]

    def read_bytes(self, *without: str) -> int:
        """Bytes of all operands except those named and out= buffers."""
        skip = {*without, *self.out_names}
        return _total_bytes(t for name, v in self.values.items() if name not in skip for t in _tensors(v))

    def written_bytes(self) -> int:
        """Bytes of results and of operands changed in place."""
        return _total_bytes(self.written)


class Cost(NamedTuple):
    """What one call did; ``read`` and ``written`` in bytes, None where every operand or result is gone through.

    ``dtype`` names the arithmetic where it is not that of the first operand.
    """

    macs: int = 0
    other: int = 0
    read: int | None = None
    written: int | None = None
    dtype: str | None = None


Rule = Callable[[Call], Cost]


def _pointwise(per_element: int = 1) -> Rule:
    def rule(call: Call) -> Cost:
        return Cost(other=per_element * sum(_numel(t) for t in {id(t): t for t in call.written}.values()))

    return rule


def _over_input(per_element: int = 1) -> Rule:
    def rule(call: Call) -> Cost:
        return Cost(other=per_element * max((_numel(t) for t in call.tensors), default=0))

    return rule


def _sort(call: Call) -> Cost:
    """Comparisons of a sort of ``n`` elements along one dimension: n log2 n."""
    x = call.tensors[0]
    dim = call.values.get("dim", -1)
    length = x.shape[dim if isinstance(dim, int) else -1] if x.dim() else 1
    return Cost(other=x.numel() * max(1, math.ceil(math.log2(max(length, 2)))))


def _fill(call: Call) -> Cost:
    return Cost(read=0)


def _copy(call: Call) -> Cost:
    return Cost(read=tensor_bytes(call.values["src"]))


def _foreach_copy(call: Call) -> Cost:
    return Cost(read=call.read_bytes("self"))


def free(call: Call) -> Cost:
    return Cost(read=0, written=0)


def _one_element(call: Call) -> Cost:
    return Cost(read=call.tensors[0].element_size(), written=0)


def _matmul(left: str, right: str) -> Rule:
    """left [..., m, n] @ right [..., n, p] or [n]: one MAC per pair that meets, plus one add per bias or C element."""

    def rule(call: Call) -> Cost:
        a, b = call.values[left], call.values[right]
        if a.layout == torch.sparse_coo:
            return Cost(macs=a._values().numel() * (b.shape[-1] if b.dim() > 1 else 1))
        columns = b.shape[-1] if b.dim() > 1 else 1
        extra = _numel(call.result) if "self" in call.values and left != "self" else 0
        return Cost(macs=a.numel() * columns, other=extra)

    return rule


def _packed_linear(call: Call) -> Cost:
    """quantized::linear_*: int8 weights inside a packed object; x [..., n] -> [..., p]."""
    x, out = call.tensors[0], call.result
    weight_bytes = x.shape[-1] * out.shape[-1]
    macs = x.numel() * out.shape[-1]
    return Cost(macs, other=x.numel() + out.numel(), read=tensor_bytes(x) + weight_bytes, dtype="int8")


def _conv_macs(call: Call, result: torch.Tensor, source: torch.Tensor) -> int:
    """weight [out, in/groups, *kernel]; a transposed one starts from the input's elements."""
    per_element = math.prod(call.values["weight"].shape[1:])
    return (source if call.values["transposed"] else result).numel() * per_element


def _convolution(call: Call) -> Cost:
    bias = call.result.numel() if call.values.get("bias") is not None else 0
    return Cost(macs=_conv_macs(call, call.result, call.values["input"]), other=bias)


def _convolution_backward(call: Call) -> Cost:
    grad = call.values["grad_output"]
    to_input, to_weight, to_bias = call.values["output_mask"]
    macs = _conv_macs(call, grad, call.values["input"]) * (int(to_input) + int(to_weight))
    return Cost(macs=macs, other=grad.numel() if to_bias else 0)


def _attention(per_qk: int, per_v: int) -> Rule:
    """query [b, h, q, d], key [b, h, k, d], value [b, h, k, v]. Causal kernels skip blocks above the diagonal."""

    def rule(call: Call) -> Cost:
        query, key, value = (call.values[name] for name in ("query", "key", "value"))
        rows, columns = query.shape[-2], key.shape[-2]
        pairs = sum(min(i + 1, columns) for i in range(rows)) if call.values.get("is_causal") else rows * columns
        pairs *= math.prod(query.shape[:-2])
        return Cost(macs=pairs * (per_qk * query.shape[-1] + per_v * value.shape[-1]), other=4 * pairs)

    return rule


def _rows_read(index: torch.Tensor, row_bytes: int) -> int:
    return tensor_bytes(index) + index.numel() * row_bytes


def _embedding(call: Call) -> Cost:
    weight, indices = call.values["weight"], call.values["indices"]
    return Cost(read=_rows_read(indices, weight.shape[1] * weight.element_size()))


def _embedding_bag(call: Call) -> Cost:
    weight, indices = call.values["weight"], call.values["indices"]
    read = _rows_read(indices, weight.shape[1] * weight.element_size()) + tensor_bytes(call.values["offsets"])
    return Cost(other=indices.numel() * weight.shape[1], read=read, written=tensor_bytes(call.result))


def _embedding_backward(call: Call) -> Cost:
    """A dense gradient is zeroed and then added to, row by row; a sparse one holds the rows read."""
    grad, indices = call.tensors[0], call.values["indices"]
    touched = indices.numel() * grad.shape[-1] * grad.element_size()
    dense = call.result.layout == torch.strided
    return Cost(
        other=indices.numel() * grad.shape[-1],
        read=tensor_bytes(grad) + tensor_bytes(indices) + (touched if dense else 0),
        written=tensor_bytes(call.result) + (touched if dense else 0),
    )


def _gather(call: Call) -> Cost:
    """Reads as many elements of the source as it returns, and the index."""
    out, source = call.result, next(iter(call.tensors))
    index = _total_bytes(call.tensors[1:])
    return Cost(read=out.numel() * source.element_size() + index)


def _scatter(accumulate: bool) -> Rule:
    """In place: writes as many elements as the index names (and reads them, to add). Otherwise copies first."""

    def rule(call: Call) -> Cost:
        target = call.tensors[0]
        source = next((call.values[n] for n in ("source", "src", "values") if n in call.values), None)
        index = call.values.get("index", call.values.get("indices"))
        adds = accumulate or bool(call.values.get("accumulate"))
        if isinstance(source, torch.Tensor) and source.dim():
            count = source.numel()
        else:
            count = max((t.numel() for t in _tensors(index)), default=0)
        touched = count * target.element_size()
        copied = 0 if call.written_names else tensor_bytes(target)
        read = call.read_bytes("self") + copied + (touched if adds else 0)
        return Cost(other=count if adds else 0, read=read, written=touched + copied)

    return rule


def _nll(call: Call) -> Cost:
    """Picks one score per row."""
    scores, target = call.tensors[0], call.values["target"]
    count = target.numel()
    read = count * scores.element_size() + tensor_bytes(target)
    return Cost(other=count, read=read, written=tensor_bytes(call.result))


def _nll_backward(call: Call) -> Cost:
    return Cost(other=call.values["target"].numel(), read=_total_bytes([call.tensors[0], call.values["target"]]))


def _fused_optimizer(per_element: int) -> Rule:
    """One pass over parameters, gradients and state."""

    def rule(call: Call) -> Cost:
        written = _total_bytes(t for n in call.written_names if n != "grads" for t in _tensors(call.values.get(n)))
        return Cost(other=per_element * sum(t.numel() for t in call.values["self"]), written=written)

    return rule


_PER_ELEMENT: dict[str, int] = {"addcmul": 2, "addcdiv": 2, "lerp": 2, "gelu_backward": 2, "clone": 0, "_to_copy": 0}

_RULES: dict[str, Rule] = {
    "mm": _matmul("self", "mat2"),
    "bmm": _matmul("self", "mat2"),
    "_grouped_mm": lambda call: Cost(*grouped_mm(call.values)),
    "_int_mm": _matmul("self", "mat2"),
    "_scaled_mm": _matmul("self", "mat2"),
    "mv": _matmul("self", "vec"),
    "dot": _matmul("self", "tensor"),
    "vdot": _matmul("self", "other"),
    "addmm": _matmul("mat1", "mat2"),
    "_addmm_activation": _matmul("mat1", "mat2"),
    "addmv": _matmul("mat", "vec"),
    "baddbmm": _matmul("batch1", "batch2"),
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_backward,
    "_embedding_bag": _embedding_bag,
    "_embedding_bag_forward_only": _embedding_bag,
    "_embedding_bag_backward": _embedding_backward,
    "_embedding_bag_dense_backward": _embedding_backward,
    "nll_loss_forward": _nll,
    "nll_loss_backward": _nll_backward,
    "copy": _copy,
    "_local_scalar_dense": _one_element,
    "item": _one_element,
    "sort": _sort,
    "argsort": _sort,
    "unique_dim": _sort,
    "_unique2": _sort,
    "_coalesce": _sort,
    "_fused_adamw": _fused_optimizer(12),
    "_fused_adam": _fused_optimizer(12),
    "_fused_sgd": _fused_optimizer(2),
    "_fused_adagrad": _fused_optimizer(6),
}


_FILLS = """
zeros ones full zeros_like ones_like full_like fill zero new_zeros new_ones new_full arange eye linspace scalar_tensor
rand randn randint randperm rand_like randn_like randint_like normal uniform bernoulli random exponential
tril_indices triu_indices
"""
_FREE = """
empty empty_like empty_strided new_empty new_empty_strided resize lift lift_fresh _unsafe_view set is_same_size
sym_size sym_numel sym_stride _nnz is_coalesced _coalesced is_pinned _sparse_coo_tensor_unsafe
_sparse_coo_tensor_with_dims_and_tensors _indices _values indices values _empty_affine_quantized
"""
_MOVES = """
cat stack repeat flip roll contiguous constant_pad_nd tril triu slice_backward select_backward _pin_memory
repeat_interleave slice_scatter select_scatter to_dense _to_dense view_copy unfold im2col col2im pixel_shuffle
diagonal_backward as_strided_copy split_with_sizes_copy
"""
_ONE_PER_INPUT = """
topk kthvalue mode median nanmedian cumsum cumprod cummax cummin masked_select nonzero bincount searchsorted bucketize
multinomial argmax argmin histc equal isin count_nonzero logcumsumexp mean sum masked_scatter sparse_mask
max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d max_pool2d_with_indices_backward
avg_pool2d_backward _adaptive_avg_pool2d_backward upsample_nearest2d upsample_bilinear2d native_dropout
native_dropout_backward quantize_per_tensor
"""
_TWO_PER_INPUT = "norm linalg_vector_norm logsumexp _foreach_norm var std var_mean std_mean"
_SOFTMAXES = "_safe_softmax _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data"
_NORMS = """
native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
_batch_norm_with_update _batch_norm_no_update cudnn_batch_norm _fused_rms_norm
"""
_NORM_BACKWARDS = """
native_layer_norm_backward native_group_norm_backward native_batch_norm_backward batch_norm_backward
_fused_rms_norm_backward cudnn_batch_norm_backward
"""
_ATTENTION = """
_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
_scaled_dot_product_cudnn_attention
"""
_ATTENTION_BACKWARD = """
_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention_backward
_scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward
"""
_GROUPS: tuple[tuple[Rule, str], ...] = (
    (_attention(1, 1), _ATTENTION),
    # The backward kernels recompute the scores: QK, dS.K and dS.Q at the query width, dO.V and P.dO at the value width.
    (_attention(3, 2), _ATTENTION_BACKWARD),
    (_gather, "index index_select gather take _unsafe_index"),
    (_scatter(False), "scatter index_copy index_fill index_put _index_put_impl _unsafe_index_put"),
    (_scatter(True), "scatter_add index_add scatter_reduce index_reduce"),
    (_fill, _FILLS),
    (free, _FREE),
    (_over_input(0), _MOVES),
    (_over_input(1), _ONE_PER_INPUT),
    (_over_input(2), _TWO_PER_INPUT),
    (_over_input(4), _SOFTMAXES),
    (_over_input(6), _NORMS),
    (_over_input(10), _NORM_BACKWARDS),
)
for _rule, _names in _GROUPS:
    _RULES.update(dict.fromkeys(_names.split(), _rule))

_PACKED = frozenset({"quantized::linear", "quantized::linear_dynamic", "quantized::linear_relu_dynamic"})


def rule_for(func: Any) -> Rule | None:
    """The counting rule of an overload such as ``torch.ops.aten.mm.default``, or None when there is none."""
    full_name: str = func._schema.name
    namespace, _, name = full_name.partition("::")
    if func.is_view or torch.Tag.inplace_view in func.tags or namespace in ("prim", "profiler"):
        return free
    if full_name in _PACKED:
        return _packed_linear
    if namespace != "aten":
        return None
    stem = name if name in _RULES else name.rstrip("_")
    if stem in _RULES:
        return _RULES[stem]
    plain = stem.removeprefix("_foreach_")
    if plain in ("copy", "zero"):
        return _foreach_copy if plain == "copy" else _fill
    if torch.Tag.pointwise in func.tags or plain != stem:
        return _pointwise(_PER_ELEMENT.get(plain, 1))
    return _over_input(1) if torch.Tag.reduction in func.tags else None
