"""Watch one forward of a network, leaving it as it was: what goes into and comes out of each linear layer.

While a forward is watched, each linear layer's output is replaced by random values from a few levels. What the next
layer reads is then a known function of known numbers: an activation is recognised without its name, whatever the
weights are (zeros, NaN, so small that GELU and its approximation look alike), and attention cannot pass for one.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from sparingly.convert._families import model_inputs

ROWS = 16  # tokens that are kept of each call: enough that attention over them is not by chance the identity
CALLS = 4  # calls that are kept of each layer


def conv1d_type() -> type | None:
    """The Conv1D of transformers (a linear layer with weight [in, out]), or None if nobody has imported it."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def is_linear(module: nn.Module) -> bool:
    """True for what computes x @ W + b: nn.Linear, Conv1D, and (quantised or wrapped) look-alikes."""
    conv = conv1d_type()
    if isinstance(module, nn.Linear) or (conv is not None and isinstance(module, conv)):
        return True
    features = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(type(f) is int for f in features) and hasattr(module, "weight")


def sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # pyright: ignore[reportArgumentType]
    return int(module.nx), int(module.nf)  # pyright: ignore[reportArgumentType]


def is_selective(module: nn.Module) -> bool:
    """True for a module of this package that is selective already."""
    return hasattr(module, "why_dense")


def unfit(module: nn.Module) -> str | None:
    """Why a linear layer, or a pointwise convolution, cannot be replaced, or None."""
    name, conv = type(module).__name__, conv1d_type()
    if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
        return "its weight is not initialised yet (lazy module): run the model once first"
    if hasattr(module, "base_layer"):
        return f"it is wrapped by an adapter ({name}): convert first, or merge the adapter"
    if "parametrizations" in module._modules or ("weight" not in module._parameters and hasattr(module, "weight_g")):
        return "its weight is computed from others (parametrisation): remove the parametrisation first"
    plain = next((kind for kind in (nn.Linear, nn.Conv2d) if isinstance(module, kind)), conv)
    if plain is None or not isinstance(module, plain):
        return f"it is a {type(module).__module__}.{name}, not an nn.Linear"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter of its own"
    if weight.layout is not torch.strided:
        return f"its weight has layout {weight.layout}, not torch.strided"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype} (quantised), not floating: convert the model before quantising it"
    if type(weight) not in (nn.Parameter, Tensor) or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor (quantised?)"
    if weight.is_meta:
        return "its weight is on the meta device: load the weights first"
    if weight.dtype.itemsize == 1:
        return f"its weight is {weight.dtype}: float32, bfloat16 or float16 are needed"
    if type(module).forward is not plain.forward and not _computes_plainly(module):
        return f"{name} has a forward of its own, which is more than x @ weight + bias"
    if hasattr(module, "_hf_hook"):
        return "accelerate moves its weights while it runs (offloading)"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which a replacement would lose: remove them first"
    return None


def _computes_plainly(module: nn.Module) -> bool:
    """True for a subclass of nn.Linear (Falcon's) or, pointwise, of nn.Conv2d (EfficientNet's, which pads first) that
    computes the same: no other weights, equal on random input."""
    names = set(module._parameters) | set(module._buffers)
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or names != {"weight", "bias"}:
        return False
    pixels = isinstance(module, nn.Conv2d)
    shape = (2, module.in_channels, 3, 3) if pixels else (2, 3, module.in_features)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(module.weight)
    try:
        got = module(x)
    except Exception:  # another signature: it is something else
        return False
    want = (nn.functional.conv2d if pixels else nn.functional.linear)(x, module.weight, module.bias)
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-2, atol=1e-3)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode without gradients; afterwards, also after an error, it is as before.

    Kept: every module's attributes (training flags, parameters, buffers and their values, hooks, caches) and the states
    of the random generators of PyTorch, Python and NumPy. Values of parameters are not kept: a forward does not write
    them.
    """
    modules = list(model.modules())
    attributes = [(m, dict(m.__dict__), _containers(m)) for m in modules]
    buffers = [(b, b.detach().clone(), b._version) for b in model.buffers() if not _unready(b)]
    python, numpy = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            for module in modules:
                module.__dict__["training"] = False
            yield
    finally:
        for module, before, inner in attributes:
            for container, items in inner:
                _restore(container, items)
            if module.__dict__.keys() != before.keys() or any(module.__dict__[k] is not v for k, v in before.items()):
                module.__dict__.clear()
                module.__dict__.update(before)
        with torch.no_grad():
            for buffer, value, version in buffers:
                if buffer._version != version:
                    buffer.copy_(value)
        random.setstate(python)
        np.random.set_state(numpy)


def _unready(tensor: Tensor) -> bool:
    return isinstance(tensor, (UninitializedParameter, UninitializedBuffer)) or tensor.is_meta


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """A module's own dictionaries and lists (parameters, buffers, children, hooks, caches) with a flat copy of each."""
    return [(v, copy.copy(v)) for v in module.__dict__.values() if isinstance(v, (dict, list, set))]


def _restore(container: Any, items: Any) -> None:
    if isinstance(container, list):
        if len(container) != len(items) or any(a is not b for a, b in zip(container, items, strict=True)):
            container[:] = items
    elif isinstance(container, set):
        if container != items:
            container.clear()
            container.update(items)
    elif list(container) != list(items) or any(container[k] is not v for k, v in items.items()):
        container.clear()
        container.update(items)


@dataclass
class Call:
    """One call of a linear layer: up to ROWS rows of what it read, x [rows, in], and gave, y [rows, out]."""

    name: str
    x: Tensor
    y: Tensor
    tokens: int


@dataclass
class Log:
    """What was seen: calls in order, layers called, whether containers take one tensor and give one, and how many ids
    (of experts) modules without linear layers got for each token."""

    calls: list[Call] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    plain: dict[str, bool] = field(default_factory=dict)
    per_token: dict[str, int] = field(default_factory=dict)

    def ran(self, name: str) -> bool:
        """True if the module of this name was called."""
        return name in self.counts or name in self.plain


class Watcher:
    """Runs modules of one model while all its linear layers are watched; to be used inside `unchanged`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.linears = {name: m for name, m in self.modules.items() if is_linear(m)}
        self.inner = inner_linears(self.modules, self.linears)
        self.log = Log()
        self.error: str | None = None

    def run(self, call: Callable[[], Any]) -> bool:
        """Calls `call()` and logs what ran; False (and `error`) if it raises, also with outputs as they are."""
        for substitute in (True, False):
            log = Log()
            try:
                with self._spies(log, substitute), _eager():
                    call()
            except Exception as error:  # a user's forward may raise anything; the reason is kept and reported
                self.error = self.error or f"{type(error).__name__}: {str(error)[:200]}"
                continue
            self.log.calls += log.calls
            self.log.counts.update(log.counts)
            self.log.per_token.update(log.per_token)
            for name, plain in log.plain.items():
                self.log.plain[name] = self.log.plain.get(name, True) and plain
            return True
        return False

    @contextmanager
    def _spies(self, log: Log, substitute: bool) -> Iterator[None]:
        """Instances get a forward of their own for a while: hooks would switch off the fast path of
        nn.TransformerEncoderLayer, and so hide that it never calls its linear layers."""
        generator = torch.Generator().manual_seed(20)
        with ExitStack() as stack:
            for name, module in self.modules.items():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                if name in self.linears:
                    spy = _linear_spy(name, module.forward, log, generator if substitute else None)
                elif len(self.inner.get(name, ())) >= 2:
                    spy = _container_spy(name, module.forward, log)
                elif isinstance(module, nn.Conv2d):
                    spy = _call_spy(name, module.forward, log)
                elif counts_experts(module):
                    spy = _experts_spy(name, module.forward, log)
                else:
                    continue
                stack.callback(_put_back, module, module.__dict__.get("forward"))
                module.__dict__["forward"] = spy
            yield


def _eager() -> AbstractContextManager[Any]:
    """Compiled models run eagerly; nothing to do, and no slow import, where nobody has imported the compiler."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward


def inner_linears(modules: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """For each module's name, the names of the linear layers inside it (not itself)."""
    inner: dict[str, list[str]] = {name: [] for name in modules}
    for name in linears:
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            inner.setdefault(parent, []).append(name)
    return inner


def _linear_spy(name: str, forward: Any, log: Log, generator: torch.Generator | None) -> Any:
    @functools.wraps(forward)
    def spy(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        kept = x.detach().reshape(-1, x.shape[-1])[:ROWS].clone() if isinstance(x, Tensor) and x.dim() else None
        y = forward(*args, **kwargs)
        if kept is None or not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        y = y if generator is None else levels_like(y, generator)
        seen = log.counts.get(name, 0)
        log.counts[name] = seen + 1
        if seen < CALLS:
            rows = y.detach().reshape(-1, y.shape[-1])
            log.calls.append(Call(name, kept, rows[:ROWS].clone(), rows.shape[0]))
        return y

    return spy


def _call_spy(name: str, forward: Any, log: Log) -> Any:
    @functools.wraps(forward)
    def spy(*args: Any, **kwargs: Any) -> Any:
        log.counts[name] = log.counts.get(name, 0) + 1
        return forward(*args, **kwargs)

    return spy


def _container_spy(name: str, forward: Any, log: Log) -> Any:
    @functools.wraps(forward)
    def spy(*args: Any, **kwargs: Any) -> Any:
        y = forward(*args, **kwargs)
        given = [v for v in (*args, *kwargs.values()) if v is not None]
        plain = len(given) == 1 and isinstance(given[0], Tensor) and isinstance(y, Tensor)
        log.plain[name] = log.plain.get(name, True) and plain and len(args) == 1
        return y

    return spy


def counts_experts(module: nn.Module) -> bool:
    """True for a module with an attribute such as ``num_experts``."""
    return any("experts" in name for name in vars(module))


def _experts_spy(name: str, forward: Any, log: Log) -> Any:
    @functools.wraps(forward)
    def spy(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() > 1:
                log.per_token[name] = value.shape[-1]
        return forward(*args, **kwargs)

    return spy


def levels_like(y: Tensor, generator: torch.Generator) -> Tensor:
    """Random values like y, each one of 24 levels between about -8 and 8 (past the knees of ReLU6 and hard swish)."""
    levels = torch.linspace(-8, 8, 24) + 0.4 * (torch.rand(24, generator=generator) - 0.5)
    ids = torch.randint(24, y.shape, generator=generator)
    return levels.to(y.dtype)[ids].to(y.device)


def runnable(module: nn.Module) -> bool:
    """False if weights are not there (meta device, lazy)."""
    return not any(_unready(t) for t in (*module.parameters(), *module.buffers()))


def is_transformers(module: nn.Module) -> bool:
    """True for a model of transformers."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    return base is not None and isinstance(module, base)


def dtype_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Where the first floating parameter of a module lies (float32 on the CPU if it has none)."""
    for p in module.parameters():
        if p.is_floating_point() and p.dtype.itemsize > 1:
            return p.dtype, p.device
    return torch.float32, torch.device("cpu")


def move(value: Any, module: nn.Module) -> Any:
    """A copy of an example, tensors cloned, on the module's device, floating ones in its dtype."""
    dtype, device = dtype_device(module)
    if isinstance(value, Tensor):
        return value.detach().clone().to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {k: move(v, module) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(move(v, module) for v in value)
    return value


def call_with(module: nn.Module, example: Any) -> Any:
    """module(example), a tuple or list as positional arguments, a mapping as keyword arguments."""
    example = move(example, module)
    if isinstance(example, Mapping):
        return module(**example)
    if isinstance(example, (tuple, list)):
        return module(*example)
    return module(example)


def required_inputs(module: nn.Module) -> int:
    """How many positional arguments without a default a module's forward has, at least 1."""
    given = inspect.signature(module.forward).parameters.values()
    return max(1, sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given))


def guesses(module: nn.Module) -> Iterator[Any]:
    """Examples for a module that nobody gave one for: from its configuration, or from its first layer with weights."""
    if is_transformers(module):
        yield from model_inputs(module)
        return
    first = next((m for m in module.modules() if m._parameters and next(iter(m.parameters()), None) is not None), None)
    if first is None:
        return
    if isinstance(first, nn.Embedding):
        yield torch.randint(min(4, first.num_embeddings - 1), first.num_embeddings, (2, 8))
    elif isinstance(first, nn.Conv2d):
        for side in (32, 64, 224):
            yield torch.randn(2, first.in_channels, side, side)
        yield torch.randn(2, first.in_channels, 28, 28)
    elif isinstance(first, nn.Conv1d):
        yield torch.randn(2, first.in_channels, 256)
    else:
        linear = next((m for m in module.modules() if is_linear(m)), None)
        width = getattr(first, "embed_dim", None) or getattr(first, "input_size", None)
        width = width or getattr(first, "num_features", None) or (linear and sizes(linear)[0])
        if isinstance(width, int):
            inputs = range(required_inputs(module))
            yield tuple(torch.randn(2, 8, width) for _ in inputs)
            yield tuple(torch.randn(ROWS, width) for _ in inputs)
