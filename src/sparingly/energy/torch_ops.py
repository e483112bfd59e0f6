"""A dispatch mode that puts PyTorch's own operations on a ledger, by the rules of ``torch_rules.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparingly.energy import ledger as _ledger
from sparingly.energy.ledger import Entry, Ledger
from sparingly.energy.torch_rules import Call, Cost, Rule, free, rule_for

__all__ = ["CountingMode"]


class _Known(NamedTuple):
    rule: Rule | None
    arguments: tuple[str, ...]
    written: tuple[str, ...]
    outputs: tuple[str, ...]
    decomposes: bool


def _look_up(func: Any) -> _Known:
    arguments = func._schema.arguments
    written = tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    outputs = tuple(a.name for a in arguments if a.name in written and a.kwarg_only)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return _Known(rule_for(func), tuple(a.name for a in arguments), written, outputs, composite)


class CountingMode(TorchDispatchMode):
    """Writes every PyTorch operation of the block into ``ledger``.

    ``ledgers`` is the whole stack of the thread that counts: an autograd thread, where the stack is empty,
    borrows it while one of Sparingly's operations records itself.
    """

    def __init__(self, ledger: Ledger, ledgers: tuple[Ledger, ...]):
        super().__init__()
        self.ledger = ledger
        self.ledgers = ledgers
        self._known: dict[Any, _Known] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sparingly":
            if _ledger.active():
                return func(*args, **kwargs)
            with _ledger.recording_into(self.ledgers):
                return func(*args, **kwargs)
        known = self._known.get(func)
        if known is None:
            known = self._known[func] = _look_up(func)
        if known.decomposes and known.rule is not free:
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if known.rule is not free:
            values = {**dict(zip(known.arguments, args, strict=False)), **kwargs}
            self._book(func._schema.name, known, Call(values, known.written, known.outputs, out))
        return out

    def _book(self, name: str, known: _Known, call: Call) -> None:
        cost = known.rule(call) if known.rule else Cost()
        read = call.read_bytes() if cost.read is None else cost.read
        written = call.written_bytes() if cost.written is None else cost.written
        first = next(iter(call.tensors), None)
        if first is None:
            first = next(iter(call.written), None)
        dtype = cost.dtype or ("none" if first is None else str(first.dtype).removeprefix("torch."))
        self.ledger.add(name, dtype, Entry(cost.macs, cost.other, read, written, 1), known=known.rule is not None)
