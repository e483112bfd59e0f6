"""Selected units of a two-layer perceptron against float64, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparingly.energy import count
from sparingly.ops import fallbacks, mlp_rows
from sparingly.ops.mlp_rows import OP, _by_block
from sparingly.ops.mlp_rows._activations import ACTIVATIONS

# Sums of up to 70 float32 products; one wrong unit changes a sum by about 1.
TOLERANCE = 5e-6
NAMES = ("hidden", "up", "bias", "down", "weights")


def build(block: int = 1, tokens: int = 6, units: int = 120, d_in: int = 19, d_out: int = 23, k: int = 11):
    generator = torch.Generator().manual_seed(block)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(0, units // block, (tokens, k), generator=generator)
    ids[::2, k // 2 :: 3] = -1
    rows = {"up": draw(units, d_in) * d_in**-0.5, "bias": draw(units), "down": draw(units, d_out)}
    return SimpleNamespace(
        hidden=draw(tokens, d_in), **rows, weights=draw(tokens, k).abs(), ids=ids, block=block, pull=draw(tokens, d_out)
    )


def run(case: SimpleNamespace, activation: str = "gelu", sparse: bool = False) -> Tensor:
    arguments = (case.hidden, case.up, case.bias, case.down, case.ids, case.weights)
    return mlp_rows(*arguments, block=case.block, activation=activation, sparse_grad=sparse)


def leaves(case: SimpleNamespace, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    found = {name: getattr(case, name) for name in NAMES}
    made = {name: None if one is None else one.detach().to(dtype).requires_grad_() for name, one in found.items()}
    return SimpleNamespace(**made, ids=case.ids, block=case.block, pull=case.pull.to(dtype))


def dense(case: SimpleNamespace, activation: str) -> Tensor:
    """The same by a dense layer and a mask, float64."""
    wide: dict[str, Any] = {name: getattr(case, name) for name in NAMES}
    if all(one is None or one.dtype == torch.float32 for one in wide.values()):
        wide = {name: None if one is None else one.double() for name, one in wide.items()}
    blocks = wide["up"].shape[0] // case.block
    factors = torch.ones(case.ids.shape, dtype=torch.float64) if wide["weights"] is None else wide["weights"]
    gates = torch.zeros(case.ids.shape[0], blocks + 1, dtype=torch.float64)
    gates = gates.scatter_add(1, case.ids.where(case.ids >= 0, blocks), factors)[:, :blocks]
    values = wide["hidden"] @ wide["up"].T + (0 if wide["bias"] is None else wide["bias"])
    return (ACTIVATIONS[activation][0](values) * gates.repeat_interleave(case.block, 1)) @ wide["down"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("shape", [{}, {"k": 1}, {"tokens": 1, "k": 29}, {"d_in": 1, "d_out": 64}])
def test_sums_equal_float64(error, poisoned, activation, block, shape):
    case = build(block, **shape)
    assert error(run(case, activation), dense(case, activation)) < TOLERANCE
    assert not fallbacks()
    wide = leaves(case, torch.float64)
    assert error(run(wide, activation), dense(case, activation)) < 1e-14
    case.ids[0, 0] = (case.ids[0, 0] + 1) % (120 // block)
    assert error(run(case, activation), dense(leaves(build(block, **shape)), activation)) > 1000 * TOLERANCE


@pytest.mark.parametrize("missing", ["bias", "weights"])
def test_without(error, missing):
    case = build()
    setattr(case, missing, None)
    assert error(run(case), dense(case, "gelu")) < TOLERANCE


def test_bfloat16_rows(error):
    case = build(3)
    for name in ("up", "bias", "down", "hidden"):
        setattr(case, name, getattr(case, name).bfloat16())
    wide = leaves(case, torch.float64)
    assert error(run(case), dense(wide, "gelu")) < TOLERANCE


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_equal_float64_and_reach_selected_rows_only(error, activation, block, sparse):
    case = build(block)
    narrow, wide = leaves(case), leaves(case, torch.float64)
    run(narrow, activation, sparse).backward(narrow.pull)
    dense(wide, activation).backward(wide.pull)
    for name in NAMES:
        found = getattr(narrow, name).grad
        assert found.is_sparse == (sparse and name in ("up", "bias", "down"))
        assert error(found.to_dense(), getattr(wide, name).grad) < TOLERANCE, name
    touched = torch.zeros(120 // block, dtype=torch.bool)
    touched[case.ids[case.ids >= 0]] = True
    touched = touched.repeat_interleave(block)
    for name in ("up", "bias", "down"):
        found = getattr(narrow, name).grad
        assert (found.to_dense()[~touched] == 0).all()
        if sparse:
            assert found._indices()[0].tolist() == touched.nonzero()[:, 0].tolist()
    assert (narrow.weights.grad[case.ids < 0] == 0).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_two_threads_give_the_same(two_threads, error, sparse):
    case = build(3, tokens=40)
    narrow, wide = leaves(case), leaves(case, torch.float64)
    run(narrow, sparse=sparse).backward(narrow.pull)
    dense(wide, "gelu").backward(wide.pull)
    for name in NAMES:
        assert error(getattr(narrow, name).grad.to_dense(), getattr(wide, name).grad) < TOLERANCE


def test_opcheck_and_gradients_of_gradients():
    case = leaves(build(2, tokens=2, units=8, d_in=3, d_out=2, k=3), torch.float64)
    arguments = tuple(getattr(case, name) for name in NAMES)

    def function(hidden, up, bias, down, weights):
        return mlp_rows(hidden, up, bias, down, case.ids, weights, block=2)

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)
    operands = (case.hidden, case.up, case.bias, case.down, case.ids, case.weights, 2, "silu", False)
    torch.library.opcheck(OP.definition, operands)
    narrow = [one.detach().float().requires_grad_() if isinstance(one, Tensor) and one.is_floating_point() else one
              for one in operands]  # fmt: skip
    torch.library.opcheck(OP.definition, tuple(narrow))


def test_what_is_not_selected_is_neither_computed_nor_read():
    """Forward and backward cost the same whatever the number of units, and the rows of the others may be anything."""
    totals = []
    for units in (12_000, 120_000):
        case = leaves(build())
        filler = torch.full((units - 120, 1), float("nan"))
        for name, width in (("up", 19), ("down", 23)):
            rows = torch.cat([getattr(case, name).detach(), filler.expand(-1, width)])
            setattr(case, name, rows.requires_grad_())
        case.bias = torch.cat([case.bias.detach(), filler[:, 0]]).requires_grad_()
        with count() as ledger:
            out = run(case, sparse=True)
            out.backward(case.pull)
        assert torch.isfinite(out).all()
        totals.append((ledger.macs, ledger.bytes))
    assert totals[0] == totals[1]
    valid = int((case.ids >= 0).sum())
    # Forward, the weights, the backward pass over units, and the input's gradient.
    assert totals[0][0] == valid * (19 + 23 + 1) + valid * (2 * 23 + 19) + valid * 19


@pytest.mark.parametrize("bad", [40, -2])
def test_block_out_of_range(bad):
    case = build(3)
    case.ids[2, 1] = bad
    with pytest.raises(IndexError, match=rf"0\.\.39.*got {bad}"):
        run(case)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block": 7}, "block must divide the 120 units, got 7"),
        ({"down": torch.zeros(60, 23)}, r"up \[120, 19\] and down \[60, 23\]"),
        ({"weights": torch.zeros(6, 4)}, r"weights \[6, 4\] and ids \[6, 11\]"),
        (
            {"bias": torch.zeros(120).double()},
            r"bias must be \[120\] of up's torch.float32, got \[120\], torch.float64",
        ),
        ({"hidden": torch.zeros(6, 4)}, r"hidden must be \[tokens, 19\], got \[6, 4\]"),
    ],
)
def test_bad_arguments(change, message):
    case = build()
    vars(case).update(change)
    with pytest.raises(ValueError, match=message):
        run(case)
    with pytest.raises(ValueError, match=r"activation must be one of relu, gelu, silu, got 'tanh'"):
        run(build(), "tanh")


@pytest.mark.parametrize("tokens, k", [(0, 3), (3, 0)])
def test_nothing_to_do(tokens, k):
    case = leaves(build(tokens=max(tokens, 1), k=max(k, 1)))
    case.hidden, case.ids = case.hidden.detach()[:1].expand(tokens, -1), torch.empty(tokens, k, dtype=torch.int64)
    case.weights = torch.empty(tokens, k)
    out = run(case, sparse=True)
    assert out.shape == (tokens, 23) and (out == 0).all()
    out.sum().backward()
    assert case.up.grad.coalesce().indices().numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_batches_that_share_blocks_read_each_once(error, monkeypatch, dtype, threads):
    case = build(block=16, tokens=400, units=160, d_in=256, d_out=130, k=3)
    for name in ("up", "bias", "down"):
        setattr(case, name, getattr(case, name).to(dtype))
    wide = leaves(case, torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with count() as together:
            found = run(case)
        monkeypatch.setattr(_by_block, "SHARED", 1 << 40)
        with count() as apart:
            other = run(case)
    finally:
        torch.set_num_threads(before)
    assert error(found, dense(wide, "gelu")) < TOLERANCE
    assert error(found, other) < TOLERANCE
    assert together.macs == apart.macs
    rows = 160 * ((256 + 130) * case.up.element_size() + case.bias.element_size())
    ran = int((case.ids >= 0).sum()) * 16
    assert apart.bytes - together.bytes == rows // 160 * ran - rows
