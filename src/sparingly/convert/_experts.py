"""Recognise modules that keep the weights of all experts of a mixture in one parameter, by what they compute."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from sparingly.convert._families import EXPERT_CALLS
from sparingly.convert._match import distance
from sparingly.convert._observe import counts_experts, dtype_device, runnable
from sparingly.nn._expert_form import (
    CALLS,
    LAYOUTS,
    ExpertForm,
    combine,
    dense_hidden,
    mixture,
    weights_of,
)

OTHER = "experts in one parameter, but its forward is no weighted sum of down(act(up(x))) or down(act(gate(x)) * up(x))"
ONE_LAYER = "one layer of all experts by itself, whose activation is computed elsewhere"
MOVED = "accelerate moves its weights while it runs (offloading)"

_TOKENS = 3


def expert_form(module: nn.Module) -> ExpertForm | str | None:
    """How a module keeps its experts, tested on random input; or why not, as a text; None if it holds no experts."""
    cubes = {n: p for n, p in module._parameters.items() if p is not None and not _lazy(p) and p.dim() == 3}
    stacked = None if module._parameters else _stacked(module)
    if stacked is not None:
        cubes = {name: p.view(stacked, -1, p.shape[1]) for name, p in module.named_parameters()}
    several = all(p.shape[0] > 1 for p in cubes.values())
    if len(cubes) == 1 and several and hasattr(module, "num_experts"):
        return ONE_LAYER
    if not 2 <= len(cubes) <= 3 or not _possible(cubes):
        return None
    reason = _unfit(module, cubes)
    form = None if reason else _fitting(module, cubes, stacked)
    # Others may be anything: the gates of a recurrent network by heads, tokens and positions of a vision model.
    return form or ((reason or OTHER) if several and counts_experts(module) else None)


def _fitting(module: nn.Module, cubes: Mapping[str, Tensor], stacked: int | None) -> ExpertForm | None:
    try:
        arguments = tuple(inspect.signature(module.forward).parameters)
    except ValueError:  # something compiled
        return None
    call = EXPERT_CALLS.get(len(arguments))
    if call is None:
        return None
    probe, base = _Probe(module), ExpertForm(call, arguments, "", "", stacked=stacked, activation="")
    found = (probe.fitted(form) for form in _forms(module, cubes, base))
    form = next((form for form in found if form is not None), None)
    return None if form is None else _roles(module, form)


def _possible(cubes: Mapping[str, Tensor]) -> bool:
    """True if the sizes are those of up [experts, m, n] and down [experts, n, m / 1 or 2], in some order."""
    sizes = [tuple(sorted(p.shape[1:])) for p in cubes.values()]
    if len(cubes) == 3:
        return len(set(sizes)) == 1
    return any(
        {a, b} >= {n} and (a * b == n * m or a * b == 2 * n * m)
        for (a, b), own in itertools.permutations(sizes)
        for n, m in itertools.permutations(own)
    )


def _unfit(module: nn.Module, cubes: Mapping[str, Tensor]) -> str | None:
    for name, weight in cubes.items():
        if not weight.is_floating_point() or weight.dtype.itemsize == 1:
            return f"experts in one parameter, but {name} is {weight.dtype} (quantised): convert before quantising"
        if type(weight) not in (nn.Parameter, Tensor) or type(weight.data) is not Tensor:
            return f"experts in one parameter, but {name} is a {type(weight.data).__name__}, not a plain tensor"
    if "parametrizations" in module._modules:
        return "its weights are computed from others (parametrisation): remove the parametrisation first"
    if hasattr(module, "_hf_hook"):
        return MOVED
    return None if runnable(module) else "its weights are on the meta device: load them first"


def _forms(module: nn.Module, cubes: Mapping[str, Tensor], base: ExpertForm) -> Iterator[ExpertForm]:
    """Every way in which the parameters could be put together, the usual ones first."""
    own = _activations(module)
    norms = [None, *(name for name, child in module.named_children() if _has_parameters(child) and not base.stacked)]
    # Both kinds of weights are mostly turned alike.
    turns = ((False, False), (True, True), (False, True), (True, False))
    for names, transposed in itertools.product(itertools.permutations(cubes), turns):
        first, down = names[0], names[-1]
        rows, width = _turned(cubes[first], transposed[0])
        out, units = _turned(cubes[down], transposed[1])
        if out != width and base.call == "sorted":
            continue
        form = replace(base, up=first, down=down, transposed=transposed)
        if len(names) == 3 and rows == units and cubes[names[1]].shape == cubes[first].shape:
            shaped = [replace(form, gate=first, up=names[1])]
        elif len(names) == 2 and rows == 2 * units:
            shaped = [replace(form, gate=first, layout=layout) for layout in LAYOUTS]
        elif len(names) == 2 and rows == units:
            shaped = [form]
        else:
            continue
        for form, norm in itertools.product(shaped, norms):
            for biases in _biases(module, form):
                for activation in [None, *own] if form.fused and hasattr(module, "_apply_gate") else own:
                    yield replace(form, activation=activation, biases=biases, norm=norm)


def _turned(weight: Tensor, transposed: bool) -> tuple[int, int]:
    _, rows, columns = weight.shape
    return (columns, rows) if transposed else (rows, columns)


def _lazy(parameter: Tensor) -> bool:
    return isinstance(parameter, UninitializedParameter)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _stacked(module: nn.Module) -> int | None:
    """How many experts lie one after another in all parameters of a module's children, or None."""
    parameters = list(module.parameters())
    counts = [v for n, v in vars(module).items() if "experts" in n and type(v) is int and v > 1]
    if not counts or not 2 <= len(parameters) <= 3 or any(_lazy(p) or p.dim() != 2 for p in parameters):
        return None
    if any(p.shape[0] % counts[0] for p in parameters) or any(isinstance(m, nn.Linear) for m in module.modules()):
        return None
    return counts[0]


def _activations(module: nn.Module) -> list[str]:
    """Attributes, also of children, that could hold the activation."""
    names = [name for name, child in module.named_modules() if name and not _has_parameters(child)]
    return names + [n for n, f in vars(module).items() if callable(f) and not isinstance(f, (nn.Module, Tensor, type))]


def _biases(module: nn.Module, form: ExpertForm) -> Iterator[tuple[str | None, str | None, str | None]]:
    """Which parameters [experts, out] are the biases of up, down and gate: by their names, else by their sizes."""
    flat = {name: p.shape[1] for name, p in module._parameters.items() if p is not None and p.dim() == 2}
    if not flat:
        yield (None, None, None)
        return
    weights = weights_of(form, module)
    rows = {form.gate or form.up: weights.first.shape[1], form.up: weights.first.shape[1]}
    rows[form.down] = weights.down.shape[1]
    for chosen in itertools.permutations(flat):
        pairs = dict(zip(rows, chosen, strict=False))
        if len(flat) != len(rows) or any(flat[bias] != rows[name] for name, bias in pairs.items()):
            continue
        # Those that say so by their names come first; where all are zero, numbers cannot tell.
        if all(bias.startswith(name) for name, bias in pairs.items()) or not any(
            bias.startswith(name) for bias in flat for name in rows
        ):
            yield (pairs[form.up], pairs[form.down], pairs[form.gate] if form.gate else None)


class _Probe:
    """What a module answers to a few random tokens, beside what a form says that it should."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.answers: dict[tuple[int, int, bool], tuple[tuple[Tensor, ...], Any]] = {}

    @torch.no_grad()
    def fitted(self, form: ExpertForm) -> ExpertForm | None:
        """The form, if the module computes what it says, for experts that have weights and for those that have none."""
        weights = weights_of(form, self.module)
        experts, width = weights.down.shape[0], weights.first.shape[2]
        beyond = weights.first.shape[0] > experts
        form = replace(form, beyond="input") if beyond else form
        if not self._same(form, experts, width, beyond=False) or (
            beyond and not self._same(form, experts, width, True)
        ):
            return None
        if form.activation is None and form.gate is not None and not _unit_by_unit(self.module, form):
            return None
        return form

    def _same(self, form: ExpertForm, experts: int, width: int, beyond: bool) -> bool:
        inputs, got = self._answer(form.call, experts, width, beyond)
        if not isinstance(got, Tensor) or got.numel() != inputs[0].numel():
            return False
        try:
            routed = CALLS[form.call](experts, *inputs)
            want = mixture(form, self.module, self.module, routed, dense_hidden(form, self.module)).view(got.shape)
        except Exception:  # an attribute that is no activation, or sizes that do not go together
            return False
        return distance(got, want) < (1e-4 if got.dtype.itemsize > 2 else 0.05)

    def _answer(self, call: str, experts: int, width: int, beyond: bool) -> tuple[tuple[Tensor, ...], Any]:
        key = (experts, width, beyond)
        if key not in self.answers:
            inputs = _inputs(self.module, call, experts, width, beyond)
            try:
                self.answers[key] = (inputs, self.module.forward(*(part.clone() for part in inputs)))
            except Exception:  # another signature
                self.answers[key] = (inputs, None)
        return self.answers[key]


def _inputs(module: nn.Module, call: str, experts: int, width: int, beyond: bool) -> tuple[Tensor, ...]:
    dtype, device = dtype_device(module)
    generator = torch.Generator().manual_seed(4)
    x = (4 * torch.randn(_TOKENS, width, generator=generator)).to(device, dtype)
    if call == "sorted":
        rows = x.repeat(experts, 1)
        rows[1::2] = 0
        return (rows,)
    chosen = experts if call == "shared" else min(2, experts)
    weights = torch.rand(_TOKENS, chosen, generator=generator).to(device, dtype)
    if call == "shared":
        return x, weights
    ids = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(_TOKENS)])
    if beyond:
        ids[0, 0] = experts
    return x, ids.to(device), weights


def _unit_by_unit(module: nn.Module, form: ExpertForm) -> bool:
    """True if what the module's own gating gives of each unit depends on that unit's gate and up alone, as a product of
    a function of one and a function of the other."""
    dtype, device = dtype_device(module)
    generator = torch.Generator().manual_seed(6)
    gate, up = (
        torch.randn(4, weights_of(form, module).down.shape[2], generator=generator).to(device, dtype) for _ in "gu"
    )
    order = torch.randperm(gate.shape[1], generator=generator).to(device)
    if gate.shape[1] > 1 and torch.equal(order, torch.arange(gate.shape[1], device=device)):
        order = order.flip(0)
    try:
        got = combine(form, module, gate, up)
        mixed = combine(form, module, gate[:, order], up[:, order])
        crossed = combine(form, module, gate.flip(0), up) * combine(form, module, gate, up.flip(0))
    except Exception:  # a gating of another form
        return False
    close = 1e-4 if dtype.itemsize > 2 else 0.05
    return distance(mixed, got[:, order]) < close and distance(got * got.flip(0), crossed) < close


@torch.no_grad()
def _roles(module: nn.Module, form: ExpertForm) -> ExpertForm:
    """Of a gating of the module's own: the half that bends more is the gate, and the value of the other at which the
    gate's activation stands alone."""
    if form.activation is not None or form.gate is None:
        return form
    dtype, device = dtype_device(module)
    x = torch.linspace(-2, 2, 9, dtype=dtype, device=device)[:, None]

    def bend(gate: Tensor, up: Tensor) -> float:
        y = combine(form, module, gate, up).float()[:, 0]
        return float((y[:-2] - 2 * y[1:-1] + y[2:]).abs().sum() / y.abs().sum().clamp_min(1e-6))

    one = torch.ones_like(x)
    if form.layout != "interleaved" and bend(x, one) < bend(one, x):
        form = replace(form, layout="up_gate" if form.layout == "gate_up" else "gate_up")
    alone = combine(form, module, x, torch.zeros_like(x))
    return replace(form, neutral=0.0) if float(alone.abs().max()) > 1e-3 else form
