"""A whole trained network as one compiled call, for one input at a time."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparingly.energy import ledger
from sparingly.nn import _program_kernels as kernels
from sparingly.nn import _rows
from sparingly.nn.bag import SelectiveBag
from sparingly.nn.ffn import SelectiveFFN
from sparingly.nn.linear import SelectiveLinear
from sparingly.ops._arrays import check_finite
from sparingly.ops._pages import request_huge_pages
from sparingly.ops.mlp_rows._activations import NUMBERS
from sparingly.selectors import Experts, Ferns, ProductKey, Tree, Zeros

Row = list[int]

_FUNCTIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}
_NOTHING = (nn.Identity, nn.Dropout, nn.Flatten)
ALLOWED = (
    "Linear, SelectiveLinear with Zeros, LayerNorm, SelectiveFFN with ProductKey, Experts or Tree, SelectiveBag with "
    "Ferns, ReLU, GELU, SiLU, Dropout, Identity, Flatten, and sums of two results"
)


def compile_plan(model: nn.Module) -> CompiledPlan:
    """``model`` in evaluation mode as one compiled call on one thread, without PyTorch in between.

    For small networks at batch 1: the calls between the layers cost more there than the layers. It reads the model's
    own parameters, so in-place changes show; make it again after ``.to()`` or after replacing a parameter or a layer.

    Args:
        model: float32 on the CPU, from one tensor [tokens, d] to another, made of Linear, LayerNorm over the last
            dimension, :class:`SelectiveFFN`, :class:`SelectiveBag`, :class:`SelectiveLinear` that leaves out zeros,
            activations, and residual sums; ``forward`` must be one straight line, as ``torch.fx`` traces it.

    Raises TypeError or ValueError, naming the part and saying what is allowed, for any other model.
    """
    return CompiledPlan(model)


class CompiledPlan:
    """See :func:`compile_plan`. While a ledger counts, the model itself runs, so that it sees what that does; the
    work is the same."""

    def __init__(self, model: nn.Module):
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        program = _Program(model)
        self._model, self._keep, self._room = model, program.keep, program.room
        self.in_features, self.out_features = program.in_features, program.out_features
        self._table = np.zeros((len(program.rows), kernels.COLUMNS), np.int64)
        for step, row in enumerate(program.rows):
            self._table[step, : len(row)] = row
        self._epsilons = np.array(program.eps, np.float32)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a plan is a plan of a copy: the table holds addresses."""
        return compile_plan, (self._model,)

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [tokens, d] -> [tokens, n], float32, detached. Raises ValueError or TypeError for another x, or
        one that is not finite."""
        if ledger.active():
            with torch.no_grad():
                return self._model(x)
        if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != self.in_features or not x.is_cpu:
            got = f"{list(x.shape)}, {x.dtype}, {x.device}"
            raise ValueError(f"x must be float32 [tokens, {self.in_features}] on the CPU, got {got}")
        x = x.contiguous()
        tokens = x.shape[0]
        out = np.empty((tokens, self.out_features), np.float32)
        if not kernels.run(self._table, self._epsilons, x.data_ptr(), tokens, out, self._room):
            check_finite("x", x)
        return torch.from_numpy(out)


class _Program:
    """What a model does, step by step.

    rows and eps: an instruction's columns and number (see :mod:`sparingly.nn._program_kernels`); room: float32 places
    of the workspace; keep: the parameters whose addresses the rows hold.
    """

    in_features: int
    out_features: int

    def __init__(self, model: nn.Module):
        self.keep: list[Tensor] = []
        self.rows: list[Row] = []
        self.eps: list[float] = []
        self.room = 0
        self._sizes: dict[fx.Node, int] = {}
        self._places: dict[fx.Node, int] = {}
        # A layer by itself would be traced into: in a sequence it is a step.
        whole = model if next(model.children(), None) is not None else nn.Sequential(model)
        self._modules = dict(whole.named_modules())
        for node in _Tracer().trace(whole).nodes:
            self._add(node)

    def _add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self._places:
                raise ValueError(f"the model must have one input, got another one: {node.name!r}")
            self.in_features = self._first_width(node)
            self._result(node, self.in_features)
        elif node.op == "output":
            last = node.args[0]
            if not isinstance(last, fx.Node) or last not in self._places:
                raise ValueError(f"the model must give one tensor, got {last!r}")
            if not self.rows or self.rows[-1][kernels.TO] != self._places[last]:
                raise ValueError(f"the model's last step must give its result, got that of {last.name!r}")
            self.out_features = self._sizes[last]
        elif node.op == "call_module":
            self._module(node, self._modules[str(node.target)])
        elif node.target in (operator.add, torch.add, "add") and _known(node.args) and not node.kwargs:
            operands: Any = node.args  # Nodes, as was asked.
            one, other = operands
            if self._sizes[one] != self._sizes[other]:
                raise ValueError(f"{node.name!r} adds {self._sizes[one]} and {self._sizes[other]} values")
            self._step(kernels.ADD, node, one, self._sizes[one], [self._places[other]])
        elif node.target in _FUNCTIONS and _known(node.args) and _plain(node.kwargs):
            self._activation(node, _FUNCTIONS[node.target])
        else:
            raise TypeError(f"{node.name!r} ({node.target}) cannot be compiled; allowed are {ALLOWED}")

    def _first_width(self, node: fx.Node) -> int:
        """How wide the input is: what the first module with a width takes."""
        waiting = list(node.users)
        while waiting:
            user = waiting.pop(0)
            module = self._modules.get(str(user.target)) if user.op == "call_module" else None
            width = module and _width(module)
            if width:
                return width
            waiting += list(user.users)
        raise ValueError(f"no part of the model says how wide its input is; allowed are {ALLOWED}")

    def _result(self, node: fx.Node, size: int) -> int:
        self._sizes[node], self._places[node] = size, self.room
        # Each result begins at a cache line of the workspace.
        self.room += -(-size // 16) * 16
        return self._places[node]

    def _step(self, do: int, node: fx.Node, source: fx.Node, size: int, rest: Row, eps: float = 0.0) -> None:
        self.rows.append([do, self._places[source], self._result(node, size), self._sizes[source], size, *rest])
        self.eps.append(eps)

    def _activation(self, node: fx.Node, name: str) -> None:
        (source,) = node.all_input_nodes
        self._step(kernels.ACTIVATE, node, source, self._sizes[source], [NUMBERS[name]])

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        (source,) = node.all_input_nodes
        if module._forward_hooks or module._forward_pre_hooks:
            raise TypeError(f"{node.target!s} has hooks, which a compiled call does not run: remove them first")
        takes = _width(module)
        if takes not in (None, self._sizes[source]):
            raise ValueError(f"{node.name!r} takes {takes} values, got {self._sizes[source]}")
        if isinstance(module, SelectiveFFN):
            do, rest = self._ffn(str(node.target), module)
            self._step(do, node, source, module.d_model, rest)
        elif isinstance(module, SelectiveBag):
            rest, size = self._bag(str(node.target), module), module.groups * module.dim
            self._step(kernels.FERNS, node, source, size, rest, module.gain)
        elif isinstance(module, SelectiveLinear):
            self._step(kernels.KEPT, node, source, module.out_features, self._kept(str(node.target), module))
        elif type(module) is nn.Linear:
            weights = [self._at(module.weight), self._at(module.bias)]
            self._step(kernels.LINEAR, node, source, module.out_features, weights)
        elif type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            weights = [self._at(module.weight), self._at(module.bias)]
            self._step(kernels.NORM, node, source, self._sizes[source], weights, module.eps)
        elif type(module) in _MODULES and getattr(module, "approximate", "none") == "none":
            self._activation(node, _MODULES[type(module)])
        elif isinstance(module, _NOTHING):
            self._sizes[node], self._places[node] = self._sizes[source], self._places[source]
        else:
            raise TypeError(f"{node.target!s}, a {type(module).__name__}, cannot be compiled; allowed are {ALLOWED}")

    def _ffn(self, name: str, module: SelectiveFFN) -> tuple[int, Row]:
        selector = module.selector
        if type(selector) is ProductKey:
            keys = (selector.left, selector.right)
            do, width = kernels.PRODUCT_KEY, selector.heads * selector.setting
            choice = [selector.heads, selector.key_dim, *(one.shape[1] for one in keys)]
            choice += [self._at(one) for one in (selector.query, *keys)]
        elif type(selector) is Experts:
            do, width = kernels.EXPERTS, selector.setting
            choice = [selector.num_units, self._at(selector.vectors), self._at(selector.bias)]
        elif type(selector) is Tree:
            do, width = kernels.TREE, selector.width
            choice = [selector.trees, width // selector.trees]
        else:
            got = type(selector).__name__
            raise TypeError(f"{name} must select by ProductKey, Experts or Tree to be compiled, got {got}")
        layer = [module.num_units, module.block, NUMBERS[module.activation], width]
        return do, [*layer, *(self._at(one) for one in (module.up, module.bias, module.down)), *choice]

    def _kept(self, name: str, module: SelectiveLinear) -> Row:
        selector = module.selector
        if not isinstance(selector, Zeros) or module.off or module.rows is not None:
            raise TypeError(f"{name} must leave out zeros (the selector Zeros), from its weights as they are")
        return [self._at(_rows.by_input(module)), self._at(module.bias), self._at(selector.cut)]

    def _bag(self, name: str, module: SelectiveBag) -> Row:
        selector = module.selector
        if not isinstance(selector, Ferns):
            got = type(selector).__name__
            raise TypeError(f"{name} must select by Ferns to be compiled, got {got}")
        asked = selector.setting
        if asked % module.groups:
            raise ValueError(f"{name}: groups ({module.groups}) must divide the ferns that are asked, got {asked}")
        tests = (self._at(one, one.dtype) for one in selector.asked())
        return [selector.ferns, selector.tests, asked, module.groups, module.dim, *tests, self._at(module.weight)]

    def _at(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        """The address of a parameter, which lives as long as the plan does; 0 for None."""
        if tensor is None:
            return 0
        value = tensor.detach()
        if value.dtype != dtype or not value.is_cpu or not value.is_contiguous():
            raise TypeError(f"parameters must be {dtype}, contiguous, on the CPU, got {value.dtype} on {value.device}")
        request_huge_pages(value)
        self.keep.append(value)
        return value.data_ptr()


def _width(module: nn.Module) -> int | None:
    """How many values a module takes, if it is one that says so."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, SelectiveFFN):
        return module.d_model
    if isinstance(module, SelectiveBag):
        return getattr(module.selector, "in_features", None)
    return module.normalized_shape[-1] if isinstance(module, nn.LayerNorm) else None


def _known(args: tuple[Any, ...]) -> bool:
    """True for operands that are all results of the network's own."""
    return bool(args) and all(isinstance(one, fx.Node) for one in args)


def _plain(options: dict[str, Any]) -> bool:
    """True for options of an activation by which it is what its name says."""
    return all(value in (False, "none") for value in options.values())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, (SelectiveFFN, SelectiveBag, SelectiveLinear))
        return own or super().is_leaf_module(m, module_qualified_name)
