"""Recognise multi-layer perceptrons by the names of their attributes, and experts that lie in one parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly.convert._families import ATTENTION_WORDS, EXPERT_NAMES, FUSED_NAMES, MLP_NAMES, Activation
from sparingly.convert._match import Match, distance
from sparingly.convert._observe import dtype_device, runnable


def within(name: str, upper: str) -> bool:
    """True if a module's name is upper or lies inside it."""
    return name == upper or name.startswith(upper + ".")


def above(name: str) -> list[str]:
    """Names of the modules that hold this one, nearest first, down to ""."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


def is_attention(modules: Mapping[str, nn.Module], name: str) -> bool:
    """True for a layer inside an attention module, by the names of modules or by the classes of the two that hold it.

    A class whose name also says that it is a layer (DecoderLayerWithAttention) holds an MLP too: it does not count.
    """
    if any(word in part.lower() for part in name.split(".")[:-1] for word in ATTENTION_WORDS):
        return True
    classes = [type(modules[upper]).__name__.lower() for upper in above(name)[:2] if upper]
    return any(word in c for c in classes for word in ATTENTION_WORDS if "layer" not in c)


def named_matches(holder: str) -> list[tuple[Match, str | None]]:
    """What the names of the table would be within this module, each with the name of its activation."""
    dot = f"{holder}." if holder else ""
    rows = [
        (
            Match(dot + r.up, dot + r.down, dot + r.gate if r.gate else None, None),
            dot + r.activation if r.activation else None,
        )
        for r in MLP_NAMES
    ]
    fused = [(Match(dot + u, dot + d, dot + u, None, "gate_up"), dot + a if a else None) for u, d, a in FUSED_NAMES]
    return rows + fused


def attribute(model: nn.Module, path: str) -> Any:
    """model.a.b.c, or None where there is none that can be called."""
    value: Any = model
    for part in path.split("."):
        # Members of a ModuleList are named by their number.
        value = getattr(value, "_modules", {}).get(part) or getattr(value, part, None)
    return value if callable(value) else None


def cube(module: nn.Module, name: str) -> bool:
    """True if the module has a parameter of this name with three dimensions."""
    weight = module._parameters.get(name)
    return weight is not None and weight.dim() == 3


def expert_names(module: nn.Module) -> tuple[str, str, str] | None:
    """The row of EXPERT_NAMES whose two weights this module has, if possible one with its activation too; or None."""
    rows = [r for r in EXPERT_NAMES if cube(module, r[0]) and cube(module, r[1])]
    return next((r for r in rows if hasattr(module, r[2])), rows[0] if rows else None)


def expert_form(module: nn.Module, names: tuple[str, str, str]) -> tuple[bool, Activation] | None:
    """(gated, activation) if experts(x, ids, weights) sums weighted MLPs without biases, tested on random input."""
    up, down, act = (getattr(module, name, None) for name in names)
    if act is None or up is None or down is None or not runnable(module) or len(list(module.parameters())) > 2:
        return None
    experts, outputs, units = down.shape
    gated = up.shape[1] == 2 * units
    if up.shape != (experts, (2 if gated else 1) * units, outputs) or not up.is_floating_point():
        return None
    dtype, device = dtype_device(module)
    generator = torch.Generator().manual_seed(4)
    x = (4 * torch.randn(3, outputs, generator=generator)).to(device, dtype)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(len(x))]).to(device)
    weights = torch.rand(ids.shape, generator=generator).to(device, dtype)
    want = torch.zeros_like(x)
    try:
        for t, k in ((t, k) for t in range(ids.shape[0]) for k in range(ids.shape[1])):
            hidden = F.linear(x[t], up[ids[t, k]])
            a, b = hidden.chunk(2, -1) if gated else (hidden, None)
            want[t] += weights[t, k] * F.linear(act(a) if b is None else act(a) * b, down[ids[t, k]])
        got = module(x, ids, weights)
    except Exception:  # another signature, of the experts or of their activation: not this form
        return None
    close = isinstance(got, Tensor) and distance(got, want) < (1e-4 if dtype.itemsize > 2 else 0.05)
    return (gated, act) if close else None
