"""Layers at which inputs might leave a network, and after how much of its work each of them comes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparingly._data import call
from sparingly.energy import count
from sparingly.nn._modes import evaluating


def find_places(net: nn.Module, inputs: Any, examples: int) -> dict[str, float]:
    """Layer -> share of the network's multiplications that is done after it, 0..1, in the order in which they end.

    Layers that run once, give a tensor [n, ...] with as many rows as ``inputs`` has ``examples``, and are not the last
    to run. Of layers that end together, such as a block and its last part, the outermost is named.
    """
    ended: list[tuple[str, float]] = []
    asked: dict[str, int] = {}
    with count() as ledger:

        def hook(name: str) -> Any:
            def ends(module: nn.Module, given: Any, output: Any) -> None:
                asked[name] = asked.get(name, 0) + 1
                found = output[0] if isinstance(output, tuple) and output else output
                rows = isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 1 and len(found)
                if rows == examples:
                    ended.append((name, float(ledger.macs)))

            return ends

        handles = [module.register_forward_hook(hook(name)) for name, module in net.named_modules() if name]
        try:
            with evaluating(net), torch.no_grad():
                call(net, inputs)
        finally:
            for handle in handles:
                handle.remove()
    whole = float(ledger.macs) or 1.0
    once = [(name, macs / whole) for name, macs in ended if asked[name] == 1]
    # A parent's hook runs right after that of its last child.
    parents = [name for name, _ in once[1:]] + [""]
    outer = [one for one, parent in zip(once, parents, strict=True) if not one[0].startswith(parent + ".")]
    return dict(outer[:-1])
