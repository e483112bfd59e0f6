from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparingly.ops import fallbacks, row_adamw_
from sparingly.ops.row_adamw import OP
from sparingly.ops.row_adamw.reference import reference

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
# After 5 steps in float32; one forgotten step or row differs by about lr = 1e-2.
TOLERANCE = 2e-6


@pytest.fixture
def bank():
    def build(dtype=torch.float32, num_rows=31, d=19):
        state = torch.float64 if dtype == torch.float64 else torch.float32
        return SimpleNamespace(
            param=torch.randn(num_rows, d).to(dtype),
            exp_avg=torch.zeros(num_rows, d, dtype=state),
            exp_avg_sq=torch.zeros(num_rows, d, dtype=state),
            steps=torch.zeros(num_rows, dtype=torch.int32),
        )

    return build


def tensors(state):
    return (state.param, state.exp_avg, state.exp_avg_sq, state.steps)


@pytest.mark.parametrize("compute", [row_adamw_, reference])
def test_equals_torch_on_rows_that_always_take_part(bank, error, compute):
    state = bank()
    ids = torch.tensor([3, 4, 9, 30])
    before = [tensor.clone() for tensor in tensors(state)]
    twin = torch.nn.Parameter(state.param[ids].double())
    betas = (OPTIONS["beta1"], OPTIONS["beta2"])
    optimizer = torch.optim.AdamW([twin], lr=1e-2, betas=betas, eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        grad = torch.randn(4, 19)
        twin.grad = grad.double()
        optimizer.step()
        compute(*tensors(state), ids, grad, **OPTIONS)
    assert error(state.param[ids], twin.detach()) < TOLERANCE
    assert error(state.exp_avg[ids], optimizer.state[twin]["exp_avg"]) < TOLERANCE
    assert error(state.exp_avg_sq[ids], optimizer.state[twin]["exp_avg_sq"]) < TOLERANCE
    others = torch.ones(31, dtype=torch.bool)
    others[ids] = False
    for now, then in zip(tensors(state), before, strict=True):
        assert torch.equal(now[others], then[others])
    assert (state.steps[ids] == 5).all()
    assert not fallbacks()


def test_bias_is_corrected_by_each_rows_own_steps(bank, error):
    state = bank()
    first = state.param.double()
    grads = torch.randn(3, 1, 19)
    for grad in grads[:2]:
        row_adamw_(*tensors(state), torch.tensor([5]), grad, **OPTIONS)
    row_adamw_(*tensors(state), torch.tensor([8]), grads[2], **OPTIONS)
    # A first step moves by lr in the sign of the gradient, whatever its size.
    expected = first[8] * (1 - 1e-3) - 1e-2 * grads[2, 0].double().sign()
    assert error(state.param[8], expected) < TOLERANCE
    assert state.steps[[5, 8]].tolist() == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_reference(bank, error, dtype, two_threads):
    state = bank(dtype)
    other = SimpleNamespace(**{name: tensor.clone() for name, tensor in vars(state).items()})
    for _ in range(4):
        ids = torch.randperm(31)[:11]
        grad = torch.randn(11, 19)
        row_adamw_(*tensors(state), ids, grad, **OPTIONS)
        reference(*tensors(other), ids, grad, **OPTIONS)
    # bfloat16: sums agree to float32, so that a rounding falls to the other side (2**-8) once in a while.
    for now, expected in zip(tensors(state), tensors(other), strict=True):
        assert error(now, expected) < (2**-7 if now.dtype == torch.bfloat16 else 1e-5)
    if dtype == torch.bfloat16:
        assert (state.param != other.param).float().mean() < 0.01


@pytest.mark.parametrize("lr", [0.0, 2**-9, 2**-8, 1.5 * 2**-8, 2**-7])
def test_bfloat16_rounds_to_nearest_even(lr):
    # A first step without decay takes lr off 1; bfloat16 numbers are 2**-8 apart below 1, so 2**-9 is half-way.
    state = (torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int32))
    param = torch.ones(1, 1, dtype=torch.bfloat16)
    options = {**OPTIONS, "lr": lr, "weight_decay": 0.0, "eps": 0.0, "beta1": 0.5, "beta2": 0.5}
    row_adamw_(param, *state, torch.tensor([0]), torch.ones(1, 1), **options)
    assert param.item() == torch.tensor(1.0 - lr).bfloat16().item()


@pytest.mark.parametrize("compute", [row_adamw_, reference])
@pytest.mark.parametrize(
    "ids, poison, error_type, message",
    [
        ([1, 31, 2], None, IndexError, r"0\.\.30, got 31"),
        ([1, -1, 2], None, IndexError, r"0\.\.30, got -1"),
        ([7, 2, 7], None, ValueError, "unique, got 7"),
        ([7, 2, 5], float("nan"), ValueError, "row 5"),
        ([7, 2, 5], float("-inf"), ValueError, "row 5"),
    ],
)
def test_a_refused_step_changes_nothing(bank, compute, ids, poison, error_type, message):
    state = bank()
    before = [tensor.clone() for tensor in tensors(state)]
    grad = torch.randn(3, 19)
    if poison is not None:
        grad[2, 7] = poison
    with pytest.raises(error_type, match=message):
        compute(*tensors(state), torch.tensor(ids), grad, **OPTIONS)
    for now, then in zip(tensors(state), before, strict=True):
        assert torch.equal(now, then)


def test_bad_shapes(bank):
    state = bank()
    with pytest.raises(ValueError, match=r"grad must be floating \[n, d\] = \[2, 19\]"):
        row_adamw_(*tensors(state), torch.tensor([1, 2]), torch.randn(2, 18), **OPTIONS)
    with pytest.raises(ValueError, match="steps must be int32"):
        row_adamw_(*tensors(state)[:3], state.steps.long(), torch.tensor([1]), torch.randn(1, 19), **OPTIONS)


def test_nothing_to_do(bank):
    state = bank()
    before = state.param.clone()
    row_adamw_(*tensors(state), torch.empty(0, dtype=torch.int64), torch.empty(0, 19), **OPTIONS)
    assert torch.equal(state.param, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(bank, dtype):
    state = bank(dtype)
    args = (*tensors(state), torch.tensor([1, 4]), torch.randn(2, 19, dtype=dtype))
    torch.library.opcheck(OP.definition, args, OPTIONS)


def test_autograd_notices_the_change(bank):
    state = bank()
    leaf = torch.ones(19, requires_grad=True)
    product = (leaf * state.param[0]).sum()
    row_adamw_(*tensors(state), torch.tensor([0]), torch.ones(1, 19), **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
