from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparingly.energy.ledger import count
from sparingly.ops import fallbacks, threshold_accumulate
from sparingly.ops.threshold_accumulate import OP, cpu, many
from sparingly.ops.threshold_accumulate.reference import reference

ROWS = [torch.float32, torch.bfloat16, torch.int8]
SHAPES = [(3, 211, 67), (1, 300, 128), (2, 40, 1), (1, 1, 5), (1, 17, 600)]
# Sums of up to 300 float32 products; one wrong row changes a sum by about a tenth of the largest.
TOLERANCE = 2e-6


class Case:
    """Inputs of which some two thirds pass, by cuts that differ from unit to unit."""

    bias: Any

    def __init__(
        self, dtype: torch.dtype = torch.float32, tokens: int = 3, n: int = 211, d: int = 67, device: str = "cpu"
    ):
        generator = torch.Generator().manual_seed(n + d)
        real = torch.randn(n, d, generator=generator)
        quantised = dtype == torch.int8
        rows = (real * 40).round().clamp(-127, 127).to(dtype) if quantised else real.to(dtype)
        self.x = torch.randn(tokens, n, generator=generator).to(device)
        self.rows = rows.to(device)
        self.cut = torch.rand(n, generator=generator).to(device)
        self.cut[0] = 0.0
        self.scale = (torch.rand(n, generator=generator) + 0.5).to(device) if quantised else None
        self.bias = torch.randn(d, generator=generator).to(device)
        self.ran = torch.tensor([5, 7, 9, 2], device=device)

    @property
    def kept(self) -> Tensor:
        return ~(self.x.double().abs() < self.cut.double())

    def args(self) -> tuple[Any, ...]:
        return self.x, self.rows, self.cut, self.scale, self.bias, self.ran

    def answer(self) -> Tensor:
        wide = self.rows.double() * (1.0 if self.scale is None else self.scale.double().unsqueeze(1))
        sums = torch.where(self.kept, self.x.double(), 0.0) @ wide
        return sums if self.bias is None else sums + self.bias.double()


def run(case: Case) -> Tensor:
    return threshold_accumulate(case.x, case.rows, case.cut, case.scale, case.bias, case.ran)


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_sums_equal_float64(error, poisoned, dtype, shape, bias):
    case = Case(dtype, *shape)
    case.bias = case.bias if bias else None
    sums = run(case)
    assert sums.dtype == torch.float32
    assert error(sums, case.answer()) < TOLERANCE
    assert case.ran.tolist() == [5 + shape[0], 7 + int(case.kept.sum()), 9, 2]
    assert error(reference(*case.args()), case.answer()) < TOLERANCE
    assert case.ran.tolist() == [5 + 2 * shape[0], 7 + 2 * int(case.kept.sum()), 9, 2]
    assert not fallbacks()


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("wrong", ["missing", "extra", "moved"])
def test_one_wrong_unit_is_noticed(error, dtype, wrong):
    case = Case(dtype)
    expected = case.answer()
    kept = case.kept[1]
    unit = int((kept if wrong != "extra" else ~kept).nonzero()[4])
    if wrong == "moved":
        case.rows[unit] = case.rows[unit - 1].clone()
    else:
        case.cut[unit] = 100.0 if wrong == "missing" else 0.0
    assert error(run(case), expected) > 1000 * TOLERANCE


@pytest.mark.parametrize("dtype", ROWS)
def test_rows_that_are_cut_are_not_used(dtype):
    case = Case(dtype)
    case.x, case.cut = case.x[:1].contiguous(), case.cut.fill_(0.5)
    clean = run(case)
    case.rows[~case.kept[0]] = 127 if dtype == torch.int8 else float("nan")
    assert torch.equal(run(case), clean)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtype", ROWS)
def test_threads_share_the_units_of_a_token(many_threads, error, poisoned, dtype, shape, threads):
    case = Case(dtype, *shape)
    begun = many_threads(cpu, threads)
    sums = run(case)
    assert sorted(begun) == [(chunk, chunk + 1) for chunk in range(threads)]
    assert error(sums, case.answer()) < TOLERANCE
    assert torch.equal(run(case), sums)


def test_tokens_of_which_nothing_passes_on_many_threads(many_threads, error, poisoned):
    case = Case(tokens=6)
    case.x[[0, 2, 3, 5]] = 0.0
    case.cut.fill_(0.4)
    case.x[1, 9:] = 0.0
    many_threads(cpu, 5)
    sums = run(case)
    assert error(sums, case.answer()) < TOLERANCE
    assert torch.equal(sums[[0, 2, 3, 5]], case.bias.expand(4, -1))


@pytest.mark.parametrize("bias", [True, False])
def test_all_cut(bias, poisoned):
    case = Case()
    case.bias = case.bias if bias else None
    case.cut.fill_(float("inf"))
    expected = torch.zeros(3, 67) if case.bias is None else case.bias.expand(3, -1)
    assert torch.equal(run(case), expected)
    assert case.ran.tolist() == [8, 7, 9, 2]


@pytest.mark.parametrize("tokens, n, d", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(tokens, n, d):
    case = Case(tokens=tokens, n=3, d=d)
    case.x, case.rows, case.cut = case.x[:, :n], case.rows[:n], case.cut[:n]
    assert torch.equal(run(case), case.answer().float())


def test_nan_is_kept(poisoned):
    case = Case()
    case.cut.fill_(float("inf"))
    case.x[1, 5] = float("nan")
    sums = run(case)
    assert sums[1].isnan().all() and torch.equal(sums[::2], case.bias.expand(2, -1))
    assert case.ran.tolist() == [8, 8, 9, 2]


def test_equal_to_the_cut_is_kept():
    case = Case(tokens=1)
    case.cut = case.x[0].abs()
    run(case)
    assert case.ran.tolist() == [6, 7 + 211, 9, 2]


def test_bfloat16_inputs_and_strides(error):
    case = Case()
    case.x = case.x.bfloat16()
    assert error(run(case), case.answer()) < TOLERANCE
    case = Case(n=67)
    case.x, case.cut = case.x.t().contiguous().t(), case.cut.repeat_interleave(2)[::2]
    assert error(run(case), case.answer()) < TOLERANCE
    assert not fallbacks()
    case.rows = case.rows.t().contiguous().t()
    assert error(run(case), case.answer()) < TOLERANCE
    assert "not contiguous" in fallbacks()["threshold_accumulate", "cpu"].reason


def test_float64_is_served_by_the_reference(error):
    case = Case()
    case.x, case.rows = case.x.double(), case.rows.double()
    sums = run(case)
    assert sums.dtype == torch.float64 and error(sums, case.answer()) < 1e-14


def test_bad_arguments():
    case = Case()
    for name, value, kind, message in (
        ("x", case.x[:, 1:], ValueError, r"x must be \[tokens, 211\], got \[3, 210\]"),
        ("x", case.x.int(), TypeError, "x must be float32"),
        ("rows", case.rows[0], ValueError, "rows must be"),
        ("cut", case.cut[1:], ValueError, r"cut must be \[211\], got \[210\]"),
        ("cut", case.cut.bfloat16(), TypeError, "cut must be float32"),
        ("scale", case.cut, ValueError, "scale goes with int8 rows only"),
        ("bias", case.cut, ValueError, r"bias must be \[67\], got \[211\]"),
        ("ran", case.ran[:2], ValueError, r"ran must be \[4\], got \[2\]"),
        ("ran", case.ran.int(), TypeError, "ran must be int64"),
    ):
        bad = SimpleNamespace(**{**vars(case), name: value})
        with pytest.raises(kind, match=message):
            run(bad)  # pyright: ignore[reportArgumentType]
    assert case.ran.tolist() == [5, 7, 9, 2]


def test_gradients_are_refused():
    case = Case()
    for name in ("x", "rows", "bias"):
        other = Case()
        getattr(other, name).requires_grad_()
        with pytest.raises(RuntimeError, match=r"has no gradient.*torch\.no_grad"):
            run(other)
        assert other.ran.tolist() == [5, 7, 9, 2]
        with torch.no_grad():
            assert torch.equal(run(other), run(case))


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_ledger_holds_the_rows_that_ran(many_threads, dtype, threads):
    case = Case(dtype)
    many_threads(cpu, threads)
    with count() as ledger:
        run(case)
    (entry,) = (entry for (name, _), entry in ledger.entries.items() if name == "sparingly::threshold_accumulate")
    kept = int(case.kept.sum())
    size = {torch.float32: 4, torch.bfloat16: 2, torch.int8: 1}[dtype]
    assert (entry.calls, entry.macs, entry.other) == (1, kept * 67, 3 * 211)
    assert entry.bytes_read == kept * (67 * size + 4 * (dtype == torch.int8)) + 3 * 211 * 4 + 211 * 4 + 67 * 4
    assert entry.bytes_written == 3 * 67 * 4
    assert not ledger.unknown


# Tokens, inputs and outputs of the kernel for many tokens: less than a block of 64 inputs and a tile of six vectors,
# several, and what is left over; outputs that are a multiple of 16 and of 8 alone.
MANY = [(8, 8, 8), (9, 200, 112), (40, 136, 24), (13, 64, 96), (17, 72, 208), (10, 128, 40)]


@pytest.mark.parametrize("shape", MANY)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group_bytes", [1, many.GROUP_BYTES])
def test_many_tokens_equal_float64(monkeypatch, error, poisoned, shape, bias, group_bytes):
    monkeypatch.setattr(many, "GROUP_BYTES", group_bytes)
    case = Case(torch.float32, *shape)
    case.bias = case.bias if bias else None
    assert many.takes(shape[0], case.rows, None)
    assert error(run(case), case.answer()) < TOLERANCE
    assert case.ran.tolist() == [5 + shape[0], 7 + int(case.kept.sum()), 9, 2]


@pytest.mark.parametrize("wrong", ["missing", "extra", "moved"])
def test_many_tokens_notice_one_wrong_unit(error, wrong):
    case = Case(torch.float32, 9, 200, 112)
    expected = case.answer()
    kept = case.kept[1]
    unit = int((kept if wrong != "extra" else ~kept).nonzero()[4])
    if wrong == "moved":
        case.rows[unit] = case.rows[unit - 1].clone()
    else:
        case.cut[unit] = 100.0 if wrong == "missing" else 0.0
    assert error(run(case), expected) > 1000 * TOLERANCE


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("shape", MANY[1:4])
def test_threads_share_many_tokens(many_threads, error, poisoned, shape, threads):
    case = Case(torch.float32, *shape)
    begun = many_threads(many, threads)
    sums = run(case)
    assert sorted(begun) == [(chunk, chunk + 1) for chunk in range(threads)]
    assert error(sums, case.answer()) < TOLERANCE
    assert case.ran.tolist() == [5 + shape[0], 7 + int(case.kept.sum()), 9, 2]


def test_many_tokens_use_no_row_that_all_cut_and_keep_nan(poisoned):
    case = Case(torch.float32, 9, 200, 112)
    case.cut[::3] = float("inf")
    clean = run(case)
    case.rows[::3] = float("nan")
    assert torch.equal(run(case), clean)
    case.rows[::3] = 1.0
    case.x[4, 3] = float("nan")
    sums = run(case)
    assert sums[4].isnan().all() and torch.equal(sums[:4], clean[:4])


@pytest.mark.parametrize("threads", [1, 3])
def test_many_tokens_read_a_row_once(many_threads, threads):
    case = Case(torch.float32, 9, 200, 112)
    case.cut[::5] = float("inf")
    many_threads(many, threads)
    with count() as ledger:
        run(case)
    (entry,) = (entry for (name, _), entry in ledger.entries.items() if name == "sparingly::threshold_accumulate")
    distinct = int(case.kept.any(0).sum())
    assert (entry.calls, entry.macs, entry.other) == (1, int(case.kept.sum()) * 112, 9 * 200)
    assert distinct <= 160 and entry.bytes_read == 4 * (distinct * 112 + 9 * 200 + 200 + 112)
    assert entry.bytes_written == 9 * 112 * 4


def test_many_tokens_of_sizes_that_go_one_by_one():
    for shape, dtype in (((7, 64, 96), torch.float32), ((8, 60, 96), torch.float32), ((8, 64, 100), torch.float32)):
        assert not many.takes(shape[0], Case(dtype, *shape).rows, None)
    assert not many.takes(8, Case(torch.bfloat16, 8, 64, 96).rows, None)


def test_opcheck_of_many_tokens():
    case = Case(torch.float32, 8, 16, 8)
    torch.library.opcheck(OP.definition, case.args())


@pytest.mark.parametrize("dtype", ROWS)
def test_opcheck(dtype):
    case = Case(dtype, 2, 7, 3)
    torch.library.opcheck(OP.definition, case.args())
    torch.library.opcheck(OP.definition, (case.x, case.rows, case.cut, case.scale, None, case.ran))


def test_compiles_without_a_break():
    case = Case(tokens=1)
    expected = run(case) * 2

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(x, ran):
        return threshold_accumulate(x, case.rows, case.cut, case.scale, case.bias, ran) * 2

    with torch.no_grad():
        assert torch.equal(layer(case.x, case.ran), expected)
    kept = int(case.kept.sum())
    assert case.ran.tolist() == [7, 7 + 2 * kept, 9, 2]


def triton_matches_float64(device: str) -> None:
    """The Triton kernel against float64, its counts, and that a wrong unit shows."""
    module = importlib.import_module("sparingly.ops.threshold_accumulate.triton")
    for dtype in ROWS:
        for shape in SHAPES[:3]:
            case = Case(dtype, *shape, device=device)
            if shape[0] > 1:
                case.x[1, 3] = float("nan")
                case.cut[3] = 9.0
            assert module.unsupported(*case.args()) is None
            sums, expected = module.kernel(*case.args()), case.answer()
            assert case.ran.tolist() == [5 + shape[0], 7 + int(case.kept.sum()), 9, 2]
            assert torch.equal(sums.isnan(), expected.isnan())
            size = expected.nan_to_num().abs().max()
            assert ((sums - expected).nan_to_num().abs().max() / size).item() < TOLERANCE
            case.rows[~case.kept.any(0)] = 127 if dtype == torch.int8 else float("nan")
            assert torch.equal(module.kernel(*case.args()).nan_to_num(), sums.nan_to_num())
            case.cut[0] = 100.0
            other = module.kernel(*case.args())
            assert ((other - expected).nan_to_num().abs().max() / size).item() > 1000 * TOLERANCE
            with count() as ledger:
                module.kernel(*case.args())
            (entry,) = (value for (name, _), value in ledger.entries.items() if name.startswith("sparingly"))
            assert entry.macs == int(case.kept.sum()) * shape[2]


@pytest.mark.parametrize("way", ["interpreter", "cuda"])
def test_triton(way):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if way == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # Triton decides once per process whether it interprets.
    environment = {**os.environ, "TRITON_INTERPRET": "1" if way == "interpreter" else "0"}
    done = subprocess.run([sys.executable, __file__, way], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"passed": True}


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # which also fills fresh memory with NaN
    triton_matches_float64("cuda" if sys.argv[1] == "cuda" else "cpu")
    print(json.dumps({"passed": True}))
