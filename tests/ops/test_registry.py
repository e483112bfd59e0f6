from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparingly.ops import fallbacks, gather_dot, registered
from sparingly.ops._registry import Op, nothing_to_dispatch
from sparingly.ops.gather_dot import OP


def test_a_second_kernel_for_a_device_is_refused():
    before = OP.devices()
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=f"has a kernel for '{device}' already"):
            OP.kernel(device, lambda *args: None)
    assert OP.devices() == before


def test_a_second_operator_of_one_name_is_refused():
    with pytest.raises(ValueError, match="'gather_dot' is registered already"):
        Op("gather_dot", "(Tensor x) -> Tensor", lambda x: x, check=lambda x: None, kernel_args=1)


def test_kernel_or_module_but_not_both():
    with pytest.raises(ValueError, match="either kernel or module"):
        OP.kernel("xpu")
    with pytest.raises(ValueError, match="either kernel or module"):
        OP.kernel("xpu", lambda *args: None, module="sparingly.ops.gather_dot.triton")


def test_why_not(make):
    case = make()
    args = (case.hidden, case.rows, case.ids, None, None, False)
    assert OP.why_not("cpu", *args) is None
    assert OP.why_not("cpu", args[0].double(), *args[1:]) == "float64 is served by the reference"
    assert "no kernel for 'xpu'" in (OP.why_not("xpu", *args) or "")


def test_fallbacks_are_counted_with_their_reason(make):
    case = make()
    for _ in range(3):
        gather_dot(case.hidden.double(), case.rows.double(), case.ids)
    fallback = fallbacks()["gather_dot", "cpu"]
    assert fallback.count == 3 and "float64" in fallback.reason


def test_registered_lists_every_operator():
    rows = registered()
    names = {"gather_dot", "gather_accumulate", "topk_rows", "scatter_outer", "row_adamw_"}
    names |= {"threshold_accumulate", "gated_rows", "mlp_rows", "product_topk", "table_sums"}
    assert names == {row[0] for row in rows}
    assert all(available and reason is None for _, device, available, reason in rows if device == "cpu")
    if not torch.cuda.is_available():
        assert all(not available and reason for _, device, available, reason in rows if device == "cuda")


def test_no_optional_package_is_imported():
    script = (
        "import sys, torch; before = set(sys.modules); import sparingly.ops as ops;"
        "ops.gather_dot(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([[1]]));"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted({'triton', 'faiss', 'pynvml', 'onnxruntime'} & new), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_the_short_way_is_taken_only_where_the_dispatcher_has_nothing_to_do():
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert nothing_to_dispatch((plain, None, 3))
    assert not nothing_to_dispatch((plain, leaf))
    with torch.no_grad():
        assert nothing_to_dispatch((plain, leaf))
    assert not nothing_to_dispatch((plain.to("meta"),))
    assert not nothing_to_dispatch((plain.as_subclass(type("Sub", (torch.Tensor,), {})),))
    with TorchDispatchMode():
        assert not nothing_to_dispatch((plain,))
    with torch.device("cpu"):
        assert not nothing_to_dispatch((plain,))
    with torch.autograd.forward_ad.dual_level():
        assert not nothing_to_dispatch((plain,))
    seen = []
    torch.func.vmap(lambda x: (seen.append(nothing_to_dispatch((x,))), x)[1])(plain)
    assert seen == [False]


def test_both_ways_give_the_same(make):
    case = make()
    args = (case.hidden, case.rows, case.ids, None, case.bias, False)
    assert torch.equal(OP(*args), OP.definition(*args))
    assert torch.equal(OP(*args), torch.ops.sparingly.gather_dot(*args))
