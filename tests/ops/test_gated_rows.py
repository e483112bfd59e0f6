from __future__ import annotations

import importlib
import importlib.util
import itertools
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
from sparingly.ops import fallbacks, gated_rows
from sparingly.ops.gated_rows import OP, cpu
from sparingly.ops.gated_rows.reference import reference

BANKS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.int8, torch.int8)]
MIXED = [(torch.int8, torch.bfloat16)]
# (tokens, units, d_in, d_out)
SHAPES = [(3, 211, 67, 34), (1, 300, 64, 128), (2, 40, 1, 1), (1, 1, 5, 6)]
# A product of float32 sums of up to 67 and 300 terms; one wrong unit changes a sum by about a tenth of the largest.
TOLERANCE = 3e-6
NAMES = ("gate", "hidden", "up", "down", "cut", "cut_out", "up_bias", "up_scale", "down_scale", "bias", "ran")


def bank(dtype: torch.dtype, n: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    real = torch.randn(n, width, generator=generator)
    if dtype != torch.int8:
        return real.to(dtype), None
    return (real * 40).round().clamp(-127, 127).to(dtype), torch.rand(n, generator=generator) + 0.5


class Case:
    """Inputs of which some two thirds pass, by cuts that differ from unit to unit."""

    cut_out: Any
    up_bias: Any
    bias: Any

    def __init__(
        self,
        dtypes=BANKS[0],
        tokens: int = 3,
        n: int = 211,
        d_in: int = 67,
        d_out: int = 34,
        device="cpu",
        second=False,
    ):
        generator = torch.Generator().manual_seed(n + d_in + 7 * second)
        self.gate = torch.randn(tokens, n, generator=generator)
        self.hidden = torch.randn(tokens, d_in, generator=generator)
        self.up, self.up_scale = bank(dtypes[0], n, d_in, generator)
        self.down, self.down_scale = bank(dtypes[1], n, d_out, generator)
        self.cut = torch.rand(n, generator=generator)
        self.cut[0] = 0.0
        self.up_bias = torch.randn(n, generator=generator)
        self.bias = torch.randn(d_out, generator=generator)
        # Products of a gate and a sum of d_in terms: some two thirds of them are larger.
        self.cut_out = torch.rand(n, generator=generator) * 0.7 * d_in**0.5 if second else None
        if self.cut_out is not None:
            self.cut_out *= 40 if self.up_scale is not None else 1
            self.cut_out[0] = 0.0
        self.ran = torch.tensor([5, 7, 9, 2])
        for name, value in vars(self).items():
            setattr(self, name, None if value is None else value.to(device))

    @property
    def kept(self) -> Tensor:
        return ~(self.gate.double().abs() < self.cut.double())

    @property
    def values(self) -> Tensor:
        up = self.up.double() * (1.0 if self.up_scale is None else self.up_scale.double().unsqueeze(1))
        scores = self.hidden.double() @ up.t() + (0.0 if self.up_bias is None else self.up_bias.double())
        return self.gate.double() * scores

    @property
    def passed(self) -> Tensor:
        """Units whose row of down is read."""
        return self.kept if self.cut_out is None else self.kept & ~(self.values.abs() < self.cut_out.double())

    def args(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in NAMES)

    def answer(self) -> Tensor:
        down = self.down.double() * (1.0 if self.down_scale is None else self.down_scale.double().unsqueeze(1))
        sums = torch.where(self.passed, self.values, 0.0) @ down
        return sums if self.bias is None else sums + self.bias.double()


def run(case) -> Tensor:
    return gated_rows(*(getattr(case, name) for name in NAMES))


@pytest.mark.parametrize("dtypes", BANKS + MIXED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_sums_equal_float64(error, poisoned, dtypes, shape, bias, second):
    case = Case(dtypes, *shape, second=second)
    if not bias:
        case.bias = case.up_bias = None
    sums = run(case)
    assert sums.dtype == torch.float32
    assert error(sums, case.answer()) < TOLERANCE
    assert case.ran.tolist() == [5 + shape[0], 7 + int(case.kept.sum()), 9, 2 + int(case.passed.sum())]
    assert error(reference(*case.args()), case.answer()) < TOLERANCE  # pyright: ignore[reportArgumentType]
    assert case.ran.tolist() == [5 + 2 * shape[0], 7 + 2 * int(case.kept.sum()), 9, 2 + 2 * int(case.passed.sum())]
    assert not fallbacks()


@pytest.mark.parametrize("dtypes", BANKS)
@pytest.mark.parametrize("wrong", ["missing", "extra", "up", "down"])
def test_one_wrong_unit_is_noticed(error, dtypes, wrong):
    case = Case(dtypes)
    expected = case.answer()
    kept = case.kept[1]
    unit = int((kept if wrong != "extra" else ~kept).nonzero()[4])
    if wrong in ("up", "down"):
        rows = getattr(case, wrong)
        rows[unit] = rows[unit - 1].clone()
    else:
        case.cut[unit] = 100.0 if wrong == "missing" else 0.0
    assert error(run(case), expected) > 1000 * TOLERANCE


@pytest.mark.parametrize("dtypes", BANKS)
@pytest.mark.parametrize("second", [True, False])
def test_rows_that_are_cut_are_not_used(dtypes, second):
    case = Case(dtypes, tokens=1, second=second)
    clean = run(case)
    kept, passed = case.kept[0], case.passed[0]
    assert 40 < int(passed.sum()) <= int(kept.sum()) < 200 and second == (int(passed.sum()) < int(kept.sum()))
    for rows, used in ((case.up, kept), (case.down, passed)):
        rows[~used] = 127 if rows.dtype == torch.int8 else float("nan")
    assert torch.equal(run(case), clean)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtypes", BANKS)
def test_threads_share_the_units_of_a_token(many_threads, error, poisoned, dtypes, shape, threads):
    case = Case(dtypes, *shape)
    begun = many_threads(cpu, threads)
    sums = run(case)
    assert sorted(begun) == [(chunk, chunk + 1) for chunk in range(threads)]
    assert error(sums, case.answer()) < TOLERANCE
    assert torch.equal(run(case), sums)


def test_tokens_of_which_nothing_passes_on_many_threads(many_threads, error, poisoned):
    case = Case(tokens=6)
    case.gate[[0, 2, 3, 5]] = 0.0
    case.cut.fill_(0.4)
    case.gate[1, 9:] = 0.0
    many_threads(cpu, 5)
    sums = run(case)
    assert error(sums, case.answer()) < TOLERANCE
    assert torch.equal(sums[[0, 2, 3, 5]], case.bias.expand(4, -1))


@pytest.mark.parametrize("bias", [True, False])
def test_all_cut(bias, poisoned):
    case = Case()
    case.bias = case.bias if bias else None
    case.cut.fill_(float("inf"))
    expected = torch.zeros(3, 34) if case.bias is None else case.bias.expand(3, -1)
    assert torch.equal(run(case), expected)
    assert case.ran.tolist() == [8, 7, 9, 2]


@pytest.mark.parametrize("tokens, n, d_in, d_out", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_to_do(tokens, n, d_in, d_out):
    case = Case(tokens=tokens, n=3, d_in=d_in, d_out=d_out)
    case.gate, case.up, case.down = case.gate[:, :n], case.up[:n], case.down[:n]
    case.cut, case.up_bias = case.cut[:n], case.up_bias[:n]
    assert torch.allclose(run(case), case.answer().float())


def test_nan_is_kept(poisoned):
    case = Case()
    case.cut.fill_(float("inf"))
    case.gate[1, 5] = float("nan")
    sums = run(case)
    assert sums[1].isnan().all() and torch.equal(sums[::2], case.bias.expand(2, -1))
    assert case.ran.tolist() == [8, 8, 9, 3]


def test_bfloat16_inputs_and_strides(error):
    case = Case()
    case.gate, case.hidden = case.gate.bfloat16(), case.hidden.bfloat16()
    assert error(run(case), case.answer()) < TOLERANCE
    case = Case()
    case.gate, case.hidden = case.gate.t().contiguous().t(), case.hidden.t().contiguous().t()
    assert error(run(case), case.answer()) < TOLERANCE
    assert not fallbacks()
    case.down = case.down.t().contiguous().t()
    assert error(run(case), case.answer()) < TOLERANCE
    assert "not contiguous" in fallbacks()["gated_rows", "cpu"].reason


def test_float64_is_served_by_the_reference(error):
    case = Case()
    for name in ("gate", "hidden", "up", "down"):
        setattr(case, name, getattr(case, name).double())
    sums = run(case)
    assert sums.dtype == torch.float64 and error(sums, case.answer()) < 1e-14


def test_bad_arguments():
    case = Case()
    for name, value, kind, message in (
        ("gate", case.gate[:, 1:], ValueError, r"gate must be \[tokens, 211\], got \[3, 210\]"),
        ("hidden", case.hidden[:, 1:], ValueError, r"hidden must be \[tokens, 67\]"),
        ("hidden", case.hidden[1:], ValueError, "3 tokens and hidden 2"),
        ("down", case.down[1:], ValueError, r"up \[211, 67\] and down \[210, 34\]"),
        ("cut", case.cut[1:], ValueError, r"cut must be \[211\], got \[210\]"),
        ("up_bias", case.cut[1:], ValueError, "bias must be"),
        ("up_scale", case.cut, ValueError, "scale goes with int8 rows only"),
        ("bias", case.cut, ValueError, r"bias must be \[34\], got \[211\]"),
        ("ran", case.ran.int(), TypeError, "ran must be int64"),
    ):
        with pytest.raises(kind, match=message):
            run(SimpleNamespace(**{**vars(case), name: value}))
    assert case.ran.tolist() == [5, 7, 9, 2]


def test_gradients_are_refused():
    case = Case()
    for name in ("gate", "hidden", "up", "down", "up_bias", "bias"):
        other = Case()
        getattr(other, name).requires_grad_()
        with pytest.raises(RuntimeError, match=r"has no gradient.*torch\.no_grad"):
            run(other)
        assert other.ran.tolist() == [5, 7, 9, 2]
        with torch.no_grad():
            assert torch.equal(run(other), run(case))


@pytest.mark.parametrize("dtypes", BANKS + MIXED)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("second", [True, False])
def test_the_ledger_holds_the_rows_that_ran(many_threads, dtypes, threads, second):
    case = Case(dtypes, second=second)
    many_threads(cpu, threads)
    with count() as ledger:
        run(case)
    found = {dtype: entry for (name, dtype), entry in ledger.entries.items() if name == "sparingly::gated_rows"}
    assert set(found) == {str(dtype)[6:] for dtype in dtypes}
    assert all(entry.calls == 1 for entry in found.values())
    kept, passed = int(case.kept.sum()), int(case.passed.sum())
    sizes = [{torch.float32: 4, torch.bfloat16: 2, torch.int8: 1}[dtype] for dtype in dtypes]
    scales = [4 * (scale is not None) for scale in (case.up_scale, case.down_scale)]
    assert sum(entry.macs for entry in found.values()) == kept * 67 + passed * 34
    assert sum(entry.bytes_read for entry in found.values()) == (
        kept * (67 * sizes[0] + scales[0] + 4)
        + passed * (34 * sizes[1] + scales[1])
        + 4 * (3 * 211 + 3 * 67 + 211 + 34 + 211 * second)
    )
    assert sum(entry.bytes_written for entry in found.values()) == 3 * 34 * 4
    assert sum(entry.other for entry in found.values()) == 3 * 211 + kept
    assert not ledger.unknown


@pytest.mark.parametrize("dtypes", BANKS)
def test_opcheck(dtypes):
    case = Case(dtypes, 2, 7, 3, 4)
    torch.library.opcheck(OP.definition, case.args())
    case.up_bias = case.bias = None
    torch.library.opcheck(OP.definition, case.args())


def test_compiles_without_a_break():
    case = Case(tokens=1)
    expected = run(case) * 2

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(gate, ran):
        return gated_rows(gate, *case.args()[1:-1], ran) * 2  # pyright: ignore[reportCallIssue]

    with torch.no_grad():
        assert torch.equal(layer(case.gate, case.ran), expected)
    assert case.ran.tolist() == [7, 7 + 2 * int(case.kept.sum()), 9, 2 + 2 * int(case.passed.sum())]


def triton_matches_float64(device: str) -> None:
    """The Triton kernels against float64, their counts, and that a wrong unit shows."""
    module = importlib.import_module("sparingly.ops.gated_rows.triton")
    for dtypes, second in itertools.product(BANKS + MIXED, (False, True)):
        # With one product a sum, what the second cut leaves may cancel out.
        for shape in SHAPES[: 2 if second else 3]:
            case = Case(dtypes, *shape, device=device, second=second)
            if shape[0] > 1:
                case.gate[1, 3], case.cut[3] = float("nan"), 9.0
            assert module.unsupported(*case.args()) is None
            sums, expected = module.kernel(*case.args()), case.answer()
            assert case.ran.tolist() == [5 + shape[0], 7 + int(case.kept.sum()), 9, 2 + int(case.passed.sum())]
            assert torch.equal(sums.isnan(), expected.isnan())
            size = expected.nan_to_num().abs().max()
            assert ((sums - expected).nan_to_num().abs().max() / size).item() < TOLERANCE
            for rows, used in ((case.up, case.kept), (case.down, case.passed)):
                rows[~used.any(0)] = 127 if rows.dtype == torch.int8 else float("nan")
            assert torch.equal(module.kernel(*case.args()).nan_to_num(), sums.nan_to_num())
            case.cut[0] = 100.0
            other = module.kernel(*case.args())
            assert ((other - expected).nan_to_num().abs().max() / size).item() > 1000 * TOLERANCE
            with count() as ledger:
                module.kernel(*case.args())
            found = [value for (name, _), value in ledger.entries.items() if name.startswith("sparingly")]
            assert (
                sum(entry.macs for entry in found)
                == int(case.kept.sum()) * shape[2] + int(case.passed.sum()) * shape[3]
            )


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
