"""The Triton kernels: in Triton's interpreter, and on a GPU where there is one.

Triton decides once per process whether it interprets or compiles, so every way runs in a process of its own: this
file, started with the way's name, runs the checks below and prints what went wrong as JSON.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

CHECKS: dict[tuple[str, str], Callable[[str], None]] = {}
STEP = {"lr": 1.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
# (dtype of rows, tokens, width, k): widths that fill a block, that leave a rest, that need several; k split or not
SHAPES = [
    (torch.float32, 2, 64, 40),
    (torch.float32, 1, 600, 21),
    (torch.bfloat16, 2, 37, 5),
    (torch.int8, 2, 128, 70),
]


def check(*ways: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    def register(function: Callable[[str], None]) -> Callable[[str], None]:
        CHECKS.update({(way, function.__name__): function for way in ways})
        return function

    return register


@functools.cache
def _outcomes(way: str) -> dict[str, str | None]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if way == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, __file__, way], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def op(name: str) -> Any:
    return importlib.import_module(f"sparingly.ops.{name}.triton")


class Case:
    """Random arguments (a fifth of the ids are pads) and the same in float64."""

    def __init__(self, device: str, dtype: torch.dtype, tokens: int, width: int, k: int, num_rows: int = 300):
        generator = torch.Generator().manual_seed(width)
        values = torch.randn(num_rows, width, generator=generator)
        quantised = dtype == torch.int8
        rows = (values * 40).round().clamp(-127, 127).to(dtype) if quantised else values.to(dtype)
        ids = torch.randint(0, num_rows, (tokens, k), generator=generator)
        ids[torch.rand(tokens, k, generator=generator) < 0.2] = -1
        ids[:, 0] = 7
        self.hidden = torch.randn(tokens, width, generator=generator).to(device)
        self.weights = torch.randn(tokens, k, generator=generator).masked_fill(ids < 0, math.nan).to(device)
        self.rows, self.ids = rows.to(device), ids.to(device)
        self.scale = (torch.rand(num_rows, generator=generator) / 40).to(device) if quantised else None
        self.bias = torch.randn(num_rows, generator=generator).to(device)
        self.exact = self.rows.double() * (1.0 if self.scale is None else self.scale.double()[:, None])

    def scores(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """float64 scores [tokens, k] (-inf at pads) and the sums of magnitudes that errors are measured by."""
        at = ids.clamp(min=0)
        terms = self.hidden.double()[:, None] * self.exact[at]
        scores = (terms.sum(-1) + self.bias.double()[at]).masked_fill(ids < 0, -math.inf)
        return scores, terms.abs().sum(-1) + self.bias.abs()[at]

    def sums(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """float64 weighted sums [tokens, d], and the sums of magnitudes."""
        terms = self.weights.double().masked_fill(ids < 0, 0)[..., None] * self.exact[ids.clamp(min=0)]
        return terms.sum(1), terms.abs().sum(1)

    def calls(self, k: int) -> list[tuple[str, Tensor, tuple[int, ...]]]:
        """(operator, first argument, arguments after ids) of the kernels that read rows."""
        firsts = {"gather_dot": self.hidden, "gather_accumulate": self.weights, "topk_rows": self.hidden}
        return [(name, first, (k,) if name == "topk_rows" else ()) for name, first in firsts.items()]

    def other_ids(self) -> Tensor:
        ids = self.ids.clone()
        ids[-1, 0] = 8
        return ids


def assert_close(got: Tensor, want: tuple[Tensor, Tensor]) -> None:
    value, size = want
    assert got.dtype == torch.float32 and got.shape == value.shape
    same = got.double() == value
    error = ((got.double() - value).abs() / size.clamp(min=1e-30)).masked_fill(same, 0)
    assert error.max().item() < 5e-7, f"relative error {error.max().item()}"


def assert_raises(kind: type[Exception], pattern: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=pattern):
        call()


@check("interpreter", "cuda")
def gather_dot_matches_float64(device: str) -> None:
    run = op("gather_dot").kernel
    for shape in SHAPES:
        case = Case(device, *shape)
        arguments = (case.rows, case.ids, case.scale, case.bias)
        assert op("gather_dot").unsupported(case.hidden, *arguments) is None
        got = run(case.hidden, *arguments)
        assert_close(got, case.scores(case.ids))
        assert got.isneginf().equal(case.ids < 0)
        assert torch.equal(got, run(case.hidden, *arguments))
        assert_raises(AssertionError, "relative error", lambda: assert_close(got, case.scores(case.other_ids())))  # noqa: B023
        hidden = case.hidden.bfloat16()
        case.hidden = hidden.float()
        assert_close(run(hidden, *arguments), case.scores(case.ids))


@check("interpreter", "cuda")
def gather_accumulate_matches_float64(device: str) -> None:
    run = op("gather_accumulate").kernel
    for shape in SHAPES:
        case = Case(device, *shape)
        arguments = (case.weights, case.rows, case.ids, case.scale)
        assert op("gather_accumulate").unsupported(*arguments) is None
        got = run(*arguments)
        assert_close(got, case.sums(case.ids))
        assert torch.equal(got, run(*arguments))
        assert_raises(AssertionError, "relative error", lambda: assert_close(got, case.sums(case.other_ids())))  # noqa: B023


@check("interpreter", "cuda")
def topk_rows_matches_float64(device: str) -> None:
    run = op("topk_rows").kernel
    for shape, k in zip(SHAPES, (5, 12, 1, 8), strict=True):
        case = Case(device, *shape)
        arguments = (case.rows, case.ids, k, case.scale, case.bias)
        assert op("topk_rows").unsupported(case.hidden, *arguments) is None
        scores, classes = run(case.hidden, *arguments)
        every, size = case.scores(case.ids)
        kept = min(k, case.ids.shape[1])
        places = every.sort(dim=1, descending=True, stable=True).indices[:, :kept]
        wanted = case.ids.gather(1, places)
        assert torch.equal(classes[:, :kept], wanted)
        assert_close(scores[:, :kept], (every.gather(1, places), size.gather(1, places)))
        assert (classes[:, kept:] == -1).all() and scores[:, kept:].isneginf().all()
        other = run(case.hidden, case.rows, case.ids.masked_fill(case.ids == wanted[:, :1], -1), *arguments[2:])
        assert not torch.equal(other[1], classes)


@check("interpreter", "cuda")
def topk_rows_orders_ties_and_special_scores(device: str) -> None:
    bias = torch.tensor([0.0, -0.0, 3.0, 3.0, -math.inf, math.nan, math.inf, -1.0], device=device)
    rows, hidden = torch.zeros(8, 16, device=device), torch.zeros(1, 16, device=device)
    ids = torch.tensor([[-1, 4, 7, 1, 0, 3, 2, 6, 5, 3]], device=device)
    scores, classes = op("topk_rows").kernel(hidden, rows, ids, 12, None, bias)
    assert classes.tolist() == [[5, 6, 3, 2, 3, 1, 0, 7, 4, -1, -1, -1]]
    assert scores[0, 0].isnan()
    assert scores[0, 1:].tolist() == [math.inf, 3, 3, 3, 0, 0, -1, -math.inf, -math.inf, -math.inf, -math.inf]
    # Ties over many blocks and programs: always the first positions.
    many = torch.arange(200, device=device).remainder(8)[None].flip(1)
    same = op("topk_rows").kernel(hidden, rows, many, 64)
    assert torch.equal(same[1], many[:, :64]) and not same[0].any()


@check("interpreter", "cuda")
def shapes_at_the_edges(device: str) -> None:
    case = Case(device, torch.float32, 2, 20, 6)
    none = torch.empty(2, 0, dtype=torch.int64, device=device)
    assert op("gather_dot").kernel(case.hidden, case.rows, none).shape == (2, 0)
    assert torch.equal(op("gather_accumulate").kernel(none.float(), case.rows, none), torch.zeros_like(case.hidden))
    assert op("topk_rows").kernel(case.hidden, case.rows, none, 2)[1].tolist() == [[-1, -1], [-1, -1]]
    assert op("gather_dot").kernel(case.hidden[:0], case.rows, case.ids[:0]).shape == (0, 6)
    # Rows with a longer stride, one selection shared by all tokens, a transposed hidden.
    wide = torch.cat([case.rows, torch.full_like(case.rows, math.nan)], 1)[:, :20]
    case.ids = case.ids[:1].expand(2, 6)
    strided = op("gather_dot").kernel(case.hidden.t().contiguous().t(), wide, case.ids, None, case.bias)
    assert_close(strided, case.scores(case.ids))


@check("interpreter", "cuda")
def wrong_ids_raise_and_unchecked_ones_show(device: str) -> None:
    case = Case(device, torch.float32, 2, 32, 6, num_rows=50)
    for wrong in (50, -2, 2**40):
        case.ids[1, 3] = wrong
        message = rf"0\.\.49, or -1 for a pad, got {wrong}"
        for name, first, rest in case.calls(2):
            run = functools.partial(op(name).kernel, first, case.rows, case.ids, *rest)
            assert_raises(IndexError, message, run)
            values, *_ = run(check_ids=False) if name == "topk_rows" else (run(check_ids=False),)
            assert values[1].isnan().any() and not values[0].isnan().any()


class Bank:
    """A bank, its moments and a gradient of 11 of its rows."""

    def __init__(self, device: str, dtype: torch.dtype, width: int = 70, num_rows: int = 60):
        generator = torch.Generator().manual_seed(3)
        draw = functools.partial(torch.randn, num_rows, width, generator=generator)
        self.param, self.avg, self.sq = (
            draw().to(device, dtype),
            (draw() / 9).to(device),
            (draw().square() + 0.01).to(device),
        )
        self.steps = torch.randint(0, 2000, (num_rows,), dtype=torch.int32, generator=generator).to(device)
        self.ids = torch.randperm(num_rows, generator=generator)[:11].to(device)
        self.steps[self.ids[:2]] = 0
        self.grad = draw()[:11].contiguous().to(device)

    def state(self) -> list[Tensor]:
        return [self.param, self.avg, self.sq, self.steps]

    def step(self, ids: Tensor, grad: Tensor) -> None:
        op("row_adamw").kernel(*self.state(), ids, grad, **STEP)

    def expected(self) -> list[Tensor]:
        param, avg, sq, steps = [x.double() for x in self.state()]
        at, grad = self.ids, self.grad.double()
        steps[at] += 1
        avg[at] = avg[at] * 0.9 + grad * 0.1
        sq[at] = sq[at] * 0.999 + grad.square() * 0.001
        count = steps[at, None]
        root = (sq[at] / (1 - 0.999**count)).sqrt() + STEP["eps"]
        param[at] = param[at] * (1 - 0.1) - avg[at] / (1 - 0.9**count) / root
        return [param, avg, sq, steps]


@check("interpreter", "cuda")
def row_adamw_matches_float64(device: str) -> None:
    # Triton's interpreter cuts off where the GPU rounds bfloat16 to nearest.
    for dtype, tolerance in ((torch.float32, 5e-7), (torch.bfloat16, 2**-8 if device == "cuda" else 2**-7)):
        bank = Bank(device, dtype)
        for grad in (bank.grad, bank.grad.bfloat16()):
            bank.grad = grad
            before = [x.clone() for x in bank.state()]
            wanted = bank.expected()
            assert op("row_adamw").unsupported(*bank.state(), bank.ids, grad) is None
            bank.step(bank.ids, grad)
            changed = (bank.param != before[0]).any(1).nonzero().flatten()
            assert torch.equal(changed, bank.ids.sort().values)
            for place, (now, want, old) in enumerate(zip(bank.state(), wanted, before, strict=True)):
                bound = tolerance if place == 0 else 5e-7
                error = ((now.double() - want).abs() / (want.abs() + 0.1)).max().item()
                assert error < bound, f"tensor {place}: relative error {error}"
                untouched = torch.ones(len(old), dtype=torch.bool, device=device)
                untouched[bank.ids] = False
                assert torch.equal(now[untouched], old[untouched])
        bank.ids[4] = next(x for x in range(60) if x not in bank.ids.tolist())
        wrong = bank.expected()[1]
        bank.ids[4] = bank.ids[3]
        assert ((bank.avg.double() - wrong).abs() / (wrong.abs() + 0.1)).max() > 1e-3


@check("interpreter", "cuda")
def row_adamw_failed_step_writes_nothing(device: str) -> None:
    bank = Bank(device, torch.float32)
    ids = bank.ids.sort().values
    too_large, negative, twice = ids.clone(), ids.clone(), ids.clone()
    too_large[10], negative[0], twice[3] = 60, -1, int(ids[9])
    infinite, missing = bank.grad.clone(), bank.grad.clone()
    infinite[10, 69], missing[0, 0] = -math.inf, math.nan
    before = [x.clone() for x in bank.state()]
    for bad_ids, grad, kind, message in (
        (too_large, bank.grad, IndexError, r"0\.\.59, got 60"),
        (negative, bank.grad, IndexError, r"0\.\.59, got -1"),
        (twice, bank.grad, ValueError, f"got {int(ids[9])} more than once"),
        (ids, infinite, ValueError, f"finite.*row {int(ids[10])}"),
        (ids, missing, ValueError, f"finite.*row {int(ids[0])}"),
    ):
        assert_raises(kind, message, functools.partial(bank.step, bad_ids, grad))
        assert all(torch.equal(now, old) for now, old in zip(bank.state(), before, strict=True))
    bank.step(ids, bank.grad)
    assert not torch.equal(bank.param, before[0])
    bank.step(ids[:0], bank.grad[:0])


@check("interpreter", "cuda")
def unsupported_says_why(device: str) -> None:
    case = Case(device, torch.float32, 2, 32, 6)
    dot, top = op("gather_dot").unsupported, op("topk_rows").unsupported
    assert "float64" in dot(case.hidden, case.rows.double(), case.ids)
    assert "float64" in dot(case.hidden.double(), case.rows, case.ids)
    assert "strides (1, 300)" in dot(case.hidden, case.rows.t().contiguous().t(), case.ids)
    assert "several devices" in dot(case.hidden, case.rows.to("meta"), case.ids)
    assert "at most k = 64, got 65" in top(case.hidden, case.rows, case.ids, 65)
    language = importlib.import_module("triton.language")
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(language, "topk")
        assert "Triton 3.4 or newer" in top(case.hidden, case.rows, case.ids, 5)
    bank = Bank(device, torch.float32)
    assert "float64" in op("row_adamw").unsupported(*bank.state(), bank.ids, bank.grad.double())


@check("interpreter", "cuda")
def ledger_holds_the_rows_that_ran(device: str) -> None:
    from sparingly.energy import ledger

    case = Case(device, torch.bfloat16, 2, 48, 9)
    valid = int((case.ids >= 0).sum())
    for name, first, rest in case.calls(5)[:2]:
        with ledger.count() as book:
            op(name).kernel(first, case.rows, case.ids, *rest)
        entry = book.entries[f"sparingly::{name}", "bfloat16"]
        assert entry.macs == valid * 48
        assert entry.bytes_read == valid * 48 * 2 + case.ids.nbytes + first.nbytes


@check("interpreter")
def only_selected_rows_are_loaded_and_each_once(device: str) -> None:
    """Every address that a kernel loads is noted: the bytes of the bank are those of the selected rows, no more."""
    from triton.runtime import interpreter

    loaded: list[tuple[Any, int]] = []
    load = interpreter.InterpreterBuilder.create_masked_load

    def spy(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        loaded.append((pointers.data[mask.data].astype("int64").ravel(), size))
        return load(self, pointers, mask, *rest)

    case = Case(device, torch.bfloat16, 2, 600, 21)
    selected = case.ids[case.ids >= 0].bincount(minlength=len(case.rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", spy)
        for name, first, rest in case.calls(3):
            loaded.clear()
            op(name).kernel(first, case.rows, case.ids, *rest)
            size_bytes = torch.zeros_like(selected)
            for addresses, size in loaded:
                offsets = torch.from_numpy(addresses) - case.rows.data_ptr()
                offsets = offsets[(offsets >= 0) & (offsets < case.rows.nbytes)]
                size_bytes.index_add_(0, offsets // 1200, torch.full_like(offsets, size))
            assert torch.equal(size_bytes, selected * 1200), name


@check("cuda")
def operators_use_the_kernels(device: str) -> None:
    from sparingly import ops

    case = Case(device, torch.float32, 64, 512, 4096, num_rows=100_000)
    ops.clear_fallbacks()
    assert_close(ops.gather_dot(case.hidden, case.rows, case.ids, None, case.bias), case.scores(case.ids))
    assert_close(ops.gather_accumulate(case.weights, case.rows, case.ids), case.sums(case.ids))
    best = case.scores(case.ids)[0].topk(5)
    assert torch.equal(
        ops.topk_rows(case.hidden, case.rows, case.ids, 5, None, case.bias)[1], case.ids.gather(1, best.indices)
    )
    bank = Bank(device, torch.float32)
    ops.row_adamw_(bank.param, bank.avg, bank.sq, bank.steps, bank.ids, bank.grad, **STEP)
    assert not [key for key in ops.fallbacks() if key[1] == "cuda"]


@check("cuda")
def a_cuda_graph_replays_the_kernels(device: str) -> None:
    case = Case(device, torch.float32, 2, 64, 40)
    run = functools.partial(op("gather_dot").kernel, case.hidden, case.rows, case.ids)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    case.hidden.mul_(2)
    graph.replay()
    assert torch.equal(captured, run())


@pytest.mark.parametrize(("way", "name"), list(CHECKS))
def test_triton(way: str, name: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if way == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    problem = _outcomes(way)[name]
    assert problem is None, problem


def _run_checks(way: str) -> dict[str, str | None]:
    torch.use_deterministic_algorithms(True)  # which also fills fresh memory with NaN
    problems: dict[str, str | None] = {}
    for (its_way, name), function in CHECKS.items():
        if its_way == way:
            try:
                function("cuda" if way == "cuda" else "cpu")
                problems[name] = None
            except Exception:
                problems[name] = traceback.format_exc()
    return problems


if __name__ == "__main__":
    print(json.dumps(_run_checks(sys.argv[1])))
