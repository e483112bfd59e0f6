"""One registry for the operators, their kernels and the reasons why a kernel did not run.

An :class:`Op` is a ``torch.library`` custom operator whose body is the PyTorch reference. Device kernels stand beside
it. A kernel that does not apply says why, the reference runs instead, and the reason is kept where
:func:`fallbacks` finds it.

A kernel takes the operator's arguments without ``sparse_grad``, which only concerns the gradient:
``kernel(*args, **keyword_only)`` and ``unsupported(*args) -> str | None``, the latter without keyword-only ones.
Arguments have passed the operator's ``check`` (shapes, dtypes) before either is called.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Kernel = Callable[..., Any]
Reason = Callable[..., "str | None"]


@dataclass
class Fallback:
    """How often the reference ran in a kernel's place, and the reason of the last time."""

    count: int
    reason: str


_ops: dict[str, Op] = {}
_fallbacks: dict[tuple[str, str], Fallback] = {}
_lock = threading.Lock()


def registered() -> list[tuple[str, str, bool, str | None]]:
    """Every (op, device, available, reason why not), for ``sparingly info``. Imports no GPU library but Triton."""
    return [(op.name, device, *op.available(device)) for op in _ops.values() for device in op.devices()]


def fallbacks() -> dict[tuple[str, str], Fallback]:
    """For each (op, device) whose kernel did not apply: how often, and why the last time."""
    with _lock:
        return dict(_fallbacks)


def clear_fallbacks() -> None:
    """Forget what :func:`fallbacks` has gathered."""
    with _lock:
        _fallbacks.clear()


def _note(name: str, device: str, reason: str) -> None:
    with _lock:
        before = _fallbacks.get((name, device))
        _fallbacks[name, device] = Fallback(before.count + 1 if before else 1, reason)


class _Implementation:
    """A kernel and its ``unsupported``, given directly or by the name of the module that holds both."""

    def __init__(self, kernel: Kernel | None, unsupported: Reason | None, module: str | None):
        self._kernel, self._unsupported, self._module = kernel, unsupported, module
        self.problem: str | None = None

    def load(self) -> bool:
        """True if the kernel is there; else ``problem`` says why not."""
        if self._kernel is None and self.problem is None and self._module is not None:
            try:
                module = importlib.import_module(self._module)
            except ImportError as error:
                self.problem = f"{self._module} cannot be imported: {error}"
            else:
                self._kernel, self._unsupported = module.kernel, module.unsupported
        return self._kernel is not None

    def why_not(self, *args: Any) -> str | None:
        if not self.load():
            return self.problem
        return self._unsupported(*args) if self._unsupported is not None else None

    def __call__(self, *args: Any, **options: Any) -> Any:
        assert self._kernel is not None
        return self._kernel(*args, **options)


class Op:
    """A custom operator ``sparingly::name``.

    Args:
        name: its name, and that of its folder.
        schema: arguments and results in PyTorch's schema language, without the name and without default values:
            the dispatcher drops arguments that equal their default, and the gradient would see fewer.
        reference: the body, plain PyTorch, for any device and also float64.
        check: called with the arguments first; raises ValueError, TypeError or IndexError for bad ones.
        kernel_args: how many of the positional arguments kernels and reference take (leaves out ``sparse_grad``).
        mutates_args: names of the arguments changed in place.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Kernel,
        *,
        check: Callable[..., None],
        kernel_args: int,
        mutates_args: tuple[str, ...] = (),
    ):
        if name in _ops:
            raise ValueError(f"the operator {name!r} is registered already; an operator has one definition")
        self.name = name
        self.check = check
        self.reference = reference
        self.kernel_args = kernel_args
        self._kernels: dict[str, _Implementation] = {}
        self.definition = torch.library.custom_op(
            f"sparingly::{name}", self._body, mutates_args=mutates_args, schema=schema
        )
        _ops[name] = self

    def _body(self, *args: Any, **options: Any) -> Any:
        self.check(*args[: self.kernel_args])
        return self.reference(*args[: self.kernel_args], **options)

    def kernel(
        self,
        device: str,
        kernel: Kernel | None = None,
        *,
        unsupported: Reason | None = None,
        module: str | None = None,
    ) -> None:
        """Register the kernel of a device type, or the ``module`` that defines ``kernel`` and ``unsupported``.

        A module is imported when the first tensor of that device arrives. Raises ValueError if the device has a
        kernel already (PyTorch itself would replace it silently) or if not exactly one of the two is given.
        """
        if device in self._kernels:
            raise ValueError(f"{self.name} has a kernel for {device!r} already; a device has one kernel per operator")
        if (kernel is None) == (module is None):
            raise ValueError(f"give either kernel or module for {self.name} on {device!r}")
        self._kernels[device] = _Implementation(kernel, unsupported, module)

        def backend(*args: Any, **options: Any) -> Any:
            return self.run(device, *args, **options)

        self.definition.register_kernel(device, backend)

    def devices(self) -> list[str]:
        """Device types that have a kernel."""
        return list(self._kernels)

    def available(self, device: str) -> tuple[bool, str | None]:
        """(True, None) if the device's kernel can run on this machine at all, else (False, reason)."""
        if device not in self._kernels:
            return False, f"{self.name} has no kernel for {device!r}; the reference runs"
        if device == "cuda" and not torch.cuda.is_available():
            return False, "no CUDA device"
        implementation = self._kernels[device]
        return (True, None) if implementation.load() else (False, implementation.problem)

    def why_not(self, device: str, *args: Any) -> str | None:
        """None if the device's kernel takes these arguments, else the reason why the reference runs instead."""
        if device not in self._kernels:
            return f"{self.name} has no kernel for {device!r}; the reference runs"
        return self._kernels[device].why_not(*args[: self.kernel_args])

    def run(self, device: str, *args: Any, **options: Any) -> Any:
        """Check the arguments, then the device's kernel or, with the reason noted, the reference."""
        args = args[: self.kernel_args]
        self.check(*args)
        implementation = self._kernels[device]
        reason = implementation.why_not(*args)
        if reason is None:
            return implementation(*args, **options)
        _note(self.name, device, reason)
        return self.reference(*args, **options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Through PyTorch's dispatcher, or past it where nothing there would happen (it costs some 30 us)."""
        if not torch.compiler.is_compiling() and nothing_to_dispatch(args):
            return self.run("cpu", *args, **options)
        return self.definition(*args, **options)


def nothing_to_dispatch(args: tuple[Any, ...]) -> bool:
    """True if the dispatcher would only call the CPU kernel: plain CPU tensors, no gradient, no mode, no transform."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._is_tracing()
    ):
        return False
    gradients = torch.is_grad_enabled()
    for arg in args:
        if isinstance(arg, torch.Tensor) and (
            type(arg) not in (torch.Tensor, torch.nn.Parameter) or not arg.is_cpu or (gradients and arg.requires_grad)
        ):
            return False
    return True
