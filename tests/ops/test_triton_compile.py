"""The Triton kernels through Triton's compiler for Hopper (sm_90), which needs no GPU; nothing runs.

The interpreter, where the other tests run the kernels, knows no types and no registers; this finds what it lets pass.
Each launch that the package makes is caught and compiled with the types and alignment of its arguments, in a process of
its own, because Triton decides once per process whether it interprets or compiles.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

KERNELS = {
    "gather_dot": ["_gather_dot"],
    "gather_accumulate": ["_gather_accumulate"],
    "topk_rows": ["_topk_rows", "_merge_parts"],
    "row_adamw": ["_check", "_update"],
}
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.int8: "i8"}


class Compile:
    """Stands for a kernel: a launch leaves its assembly in ``assembly`` instead of running it."""

    def __init__(self, function: Any, assembly: dict[str, str]):
        self.function = function
        self.assembly = assembly

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.function.arg_names
        signature: dict[str, str] = {}
        fixed, aligned = dict(constants), []
        for name, value in zip(names, arguments, strict=False):
            if value is None or (isinstance(value, int) and value == 1):
                fixed[name] = value
                continue
            if isinstance(value, Tensor):
                signature[name] = f"*{KINDS[value.dtype]}"
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                aligned.append(name)
        source = ASTSource(
            fn=self.function,
            signature={name: signature.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in fixed.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        self.assembly[self.function.__name__] = compiled.asm["ptx"]


def compile_all() -> dict[str, str]:
    assembly: dict[str, str] = {}
    kernel: dict[str, Any] = {}
    for name, functions in KERNELS.items():
        module = importlib.import_module(f"sparingly.ops.{name}.triton")
        kernel[name] = module.kernel
        for function in functions:
            setattr(module, function, Compile(getattr(module, function), assembly))
    hidden, weights, ids = torch.zeros(2, 256), torch.zeros(2, 256), torch.zeros(2, 256, dtype=torch.int64)
    rows, moments, steps = torch.zeros(9, 256).bfloat16(), torch.zeros(9, 256), torch.zeros(9, dtype=torch.int32)
    kernel["gather_dot"](hidden, rows.to(torch.int8), ids, moments[:, 0].contiguous(), moments[:, 0].contiguous())
    kernel["gather_accumulate"](weights, rows, ids)
    kernel["topk_rows"](hidden, rows, ids, 5)
    step = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    kernel["row_adamw"](rows, moments, moments, steps, ids[0, :9], moments, **step)
    return assembly


@functools.cache
def _assembly() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("kernel", [function for functions in KERNELS.values() for function in functions])
def test_compiles_without_atomics_and_with_16_byte_loads(kernel: str) -> None:
    text = _assembly()[kernel]
    assert "atom" not in text, "the order of atomic additions is not fixed"
    if kernel != "_merge_parts":  # few keys, one per thread
        assert "ld.global.v4.b32" in text
    if kernel == "_update":
        assert "cvt.rn.bf16" in text, "bfloat16 rows are rounded to nearest; Triton's interpreter cuts off instead"


if __name__ == "__main__":
    print(json.dumps(compile_all()))
