"""Recognise multi-layer perceptrons from what flowed through linear layers."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from sparingly.convert._families import ACTIVATIONS, Activation
from sparingly.convert._observe import Call, Log, Watcher, dtype_device, sizes

NEAR = 3  # the same, where the function is not known
WINDOW = 8  # how many calls back the layers are looked for that made an input
OWN_MODULES = 96  # above so many modules, the nearest common container is no MLP, and its activations are not tried
LEAST_TOKENS = 2
LEAST_REPEATS = 12  # values that another one must equal, before an unknown function is believed

# Largest difference from our own formula, relative to the largest value. The same formula gives equal numbers in one
# dtype, another one of the same function differs by an ulp or two. A fresh BatchNorm1d (eps 1e-5) differs by 5e-6.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

DROPOUT = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Match:
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where there is a gate.

    `activation` is None where the function is elementwise but not known. `fused` as in `Place`, then gate == up.
    """

    up: str
    down: str
    gate: str | None
    activation: Activation | None
    fused: str | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the linear layers, each once."""
        return tuple(dict.fromkeys(n for n in (self.gate, self.up, self.down) if n))


def common(names: Iterable[str]) -> str:
    """Name of the smallest module that holds all of these."""
    parts = [name.split(".")[:-1] for name in names]
    same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in same)


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference by the largest wanted value; NaN and inf must agree."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.double(), want.double()
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)):
        return float("inf")
    scale = want[finite].abs().max() if finite.any() else torch.tensor(0.0)
    return float(((got - want)[finite].abs().max() if finite.any() else 0.0) / scale) if scale > 0 else float("inf")


def find_matches(watcher: Watcher, known: Mapping[str, Match]) -> dict[str, Match]:
    """Name of the down layer -> match, for all calls in the watcher's log; those known already stay."""
    matches, calls = dict(known), watcher.log.calls
    acts = _Activations(watcher)
    for at, call in enumerate(calls):
        if call.name in matches or call.x.shape[0] < 1:
            continue
        before = [c for c in calls[max(0, at - WINDOW) : at] if c.tokens == call.tokens and c.name != call.name]
        match = _match(call, before[::-1], acts)
        if match is not None:
            matches[call.name] = match
    return matches


def _match(down: Call, before: list[Call], acts: _Activations) -> Match | None:
    """The best match of one call with those before it, latest first; a known function before an unknown one."""
    width, best, least = down.x.shape[1], None, TOLERANCE.get(down.x.dtype, 3e-6)
    wanted, scale = _few(down.x), float(down.x.abs().max())
    for match, first, second in _structures(down, before, width):
        times = [1.0] * len(wanted) if second is None else _few(second)
        for act in acts.around(match, first):
            value, few = acts.apply(act, first)
            # A few numbers first: nearly every candidate fails here, at a tenth of the time.
            if value is None or any(abs(f * t - w) > least * scale for f, t, w in zip(few, times, wanted, strict=True)):
                continue
            error = distance(down.x, value if second is None else value * second)
            if error == 0:
                return replace(match, activation=act)
            if error < least:
                best, least = replace(match, activation=act), error
    if best is None:
        for match, first, second in _structures(down, before[:NEAR], width):
            if match.fused is None and is_function_of(down.x, first, second):
                return match
    return best


def _few(x: Tensor) -> list[float]:
    """Four values of x [rows, n], in different rows where there are several."""
    rows, n = x.shape
    return [float(x[i * (rows - 1) // 3, i * (n - 1) // 3]) for i in range(4)]


def _structures(down: Call, before: list[Call], width: int) -> Iterator[tuple[Match, Tensor, Tensor | None]]:
    """Ways in which earlier outputs could have made an input: what the activation reads, and what multiplies it."""
    full = [c for c in before if c.y.shape[1] == width and c.y.dtype == down.x.dtype]
    for c in full:
        yield Match(c.name, down.name, None, None), c.y, None
    for c in before:
        if c.y.shape[1] == 2 * width and c.y.dtype == down.x.dtype:
            a, b = c.y.chunk(2, dim=-1)
            yield Match(c.name, down.name, c.name, None, "gate_up"), a, b
            yield Match(c.name, down.name, c.name, None, "up_gate"), b, a
    for a, b in itertools.permutations(full, 2):
        if a.name != b.name:
            yield Match(b.name, down.name, a.name, None), a.y, b.y


def is_function_of(x: Tensor, first: Tensor, second: Tensor | None) -> bool:
    """True if each channel of x [rows, n] (by second, if given) is a function of the same channel of first, not affine.

    first has few distinct values, so that rows that agree in one channel of it must agree in that channel of x.
    """
    if second is not None:
        x = torch.where(second == 0, 0, x / second)
    levels, ids = torch.unique(first, return_inverse=True)
    if len(levels) > 64 or not torch.isfinite(x).all():
        return False
    channels = torch.arange(x.shape[1], device=x.device)
    groups, groups_of = torch.unique(ids + len(levels) * channels, return_inverse=True)
    flat, index = x.double().flatten(), groups_of.flatten()
    empty = torch.zeros(len(groups), dtype=flat.dtype, device=x.device)
    high = empty.scatter_reduce(0, index, flat, "amax", include_self=False)
    low = empty.scatter_reduce(0, index, flat, "amin", include_self=False)
    spread = float((high - low).max())
    if x.numel() - len(groups) < LEAST_REPEATS or spread > 2 * TOLERANCE.get(x.dtype, 3e-6) * float(x.abs().max()):
        return False
    y, z = x.double(), first.double()
    y, z = y - y.mean(0), z - z.mean(0)
    rest = y - z * (y * z).sum(0) / (z * z).sum(0).clamp_min(1e-12)
    bent = rest.abs().amax(0) > 1e-3 * y.abs().amax(0)
    return bool(bent.float().mean() > 0.5)


class _Activations:
    """The functions that are tried: those that lie in the nearest common container, then the known ones."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self._own: dict[str, list[Activation]] = {}
        self._elementwise: dict[tuple[int, int], bool] = {}
        self._values: dict[tuple[int, int], tuple[Tensor, Tensor | None, list[float]]] = {}

    def around(self, match: Match, sample: Tensor) -> list[Activation]:
        """Candidates for one match, whose activation reads values like sample."""
        where = common(match.layers)
        if where not in self._own:
            self._own[where] = list(_callables(self.watcher, where))
        return [f for f in self._own[where] if self._fits(f, sample)] + list(ACTIVATIONS)

    def apply(self, act: Activation, x: Tensor) -> tuple[Tensor | None, list[float]]:
        """act(x), computed once for one tensor, and a few of its values; None if it raises or changes the shape."""
        key = (id(act), id(x))
        if key not in self._values:
            y = _call(act, x)
            # x is kept too, so that no other tensor gets its id.
            self._values[key] = (x, y, [] if y is None else _few(y))
            while len(self._values) > 1024:
                self._values.pop(next(iter(self._values)))
        return self._values[key][1:]

    def _fits(self, act: Activation, sample: Tensor) -> bool:
        key = (id(act), sample.shape[1])
        if key not in self._elementwise:
            self._elementwise[key] = is_elementwise(act, sample)
        return self._elementwise[key]


def _call(act: Activation, x: Tensor) -> Tensor | None:
    try:
        y = act(x.clone())
    except Exception:  # a candidate may be any callable attribute: one that does not take a tensor is none
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype else None


def is_elementwise(act: Activation, sample: Tensor) -> bool:
    """True if each value of act(x) depends on its own input alone, and act is not affine."""
    x = sample[:4].clone()
    other = x.flip(0).roll(1, dims=1) + 0.25
    left = torch.arange(x.shape[1], device=x.device) % 2 == 0
    mixed = _call(act, torch.where(left, x, other))
    a, b = _call(act, x), _call(act, other)
    if mixed is None or a is None or b is None or not torch.equal(mixed, torch.where(left, a, b)):
        return False
    zero, both = _call(act, torch.zeros_like(x)), _call(act, x + other)
    if zero is None or both is None:
        return False
    return distance(both + zero, a + b) > 1e-4


def _callables(watcher: Watcher, where: str) -> Iterator[Activation]:
    """Modules without linear layers inside a container, and functions among its modules' attributes."""
    container = watcher.modules[where]
    inside = list(itertools.islice(container.named_modules(), OWN_MODULES + 1))
    if len(inside) > OWN_MODULES:
        return
    for name, module in inside[1:]:
        full = f"{where}.{name}" if where else name
        if full not in watcher.linears and not watcher.inner.get(full) and not isinstance(module, DROPOUT):
            yield module
    for _, module in inside:
        for value in vars(module).values():
            if callable(value) and not isinstance(value, (nn.Module, Tensor, type)) and not inspect.ismethod(value):
                yield cast(Activation, value)


def formula(watcher: Watcher, match: Match, x: Tensor) -> Tensor:
    """What the match says that its container computes of x."""
    assert match.activation is not None
    up, down = watcher.modules[match.up], watcher.modules[match.down]
    hidden = up(x)
    if match.fused:
        a, b = hidden.chunk(2, dim=-1)
        hidden = match.activation(a) * b if match.fused == "gate_up" else match.activation(b) * a
    elif match.gate:
        hidden = match.activation(watcher.modules[match.gate](x)) * hidden
    else:
        hidden = match.activation(hidden)
    return down(hidden)


def exact_container(watcher: Watcher, match: Match, log: Log) -> str | None:
    """Name of the module that computes exactly this match, in training too, and may stand for it; or None.

    It must hold these layers and no other weights, take one tensor and give one, and compute what `formula` does on
    random input: [2, 3, d] and large enough that activations differ from each other.
    """
    where = common(match.layers)
    container = watcher.modules[where]
    if match.activation is None or not where or set(watcher.inner[where]) != set(match.layers):
        return None
    if not log.plain.get(where, True) or _other_weights(watcher, container, match):
        return None
    if where not in log.plain and any(name in log.counts for name in match.layers):
        return None  # its layers run, but not by calling it
    dtype, device = dtype_device(watcher.modules[match.up])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, sizes(watcher.modules[match.up])[0], generator=generator).to(device, dtype)
    with torch.no_grad():
        spread = watcher.modules[match.up](x).float().std()
        x = x * float(3 / spread) if spread > 1e-3 and torch.isfinite(spread) else x
        try:
            want = formula(watcher, match, x.clone())
            equal = all(_equal(container, x, want, training) for training in (False, True))
        except Exception:  # e.g. the container wants more arguments: then it is not this function of x alone
            return None
    return where if equal else None


def _equal(container: nn.Module, x: Tensor, want: Tensor, training: bool) -> bool:
    modules = list(container.modules())
    for module in modules:
        module.__dict__["training"] = training
    try:
        got = container(x.clone())
    finally:
        for module in modules:
            module.__dict__["training"] = False
    if not isinstance(got, Tensor) or got.dtype != want.dtype:
        return False
    # Two more products than the activation: a few more roundings.
    return distance(got, want) < 4 * TOLERANCE.get(want.dtype, 3e-6) or bool((got == want).all())


def _other_weights(watcher: Watcher, container: nn.Module, match: Match) -> bool:
    known = [watcher.modules[name] for name in match.layers]
    if isinstance(match.activation, nn.Module):
        known.append(match.activation)
    ours = {id(t) for m in known for t in (*m.parameters(), *m.buffers())}
    return any(id(t) not in ours for t in (*container.parameters(), *container.buffers()))
