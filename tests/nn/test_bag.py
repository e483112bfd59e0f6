"""SelectiveBag against float64, with gradients of the rows used and no others."""

import pytest
import torch

import sparingly as sp
from sparingly.ops.scatter_outer.grouped import COUNTED


def exact(bag, ids):
    rows = torch.where((ids >= 0)[..., None], bag.weight.double()[ids.clamp_min(0)], 0.0)
    return rows.sum(dim=1) / (ids >= 0).sum(dim=1, keepdim=True).clamp_min(1).sqrt()


@pytest.fixture
def ids():
    return torch.tensor([[3, 9, -1, 3], [-1, -1, -1, -1], [0, 1, 2, 99]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_sum_over_the_root_of_the_count(ids, dtype):
    bag = sp.SelectiveBag(100, 12, dtype=dtype)
    out = bag(ids)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact(bag, ids), rtol=1e-6, atol=1e-6)
    assert (out[1] == 0).all()
    with torch.no_grad():
        bag.weight[99] += 1.0
    assert not torch.equal(bag(ids)[2], out[2])


def test_gradients_are_those_of_autograd_and_sparse(ids):
    bag = sp.SelectiveBag(100, 12)
    factor = torch.randn(3, 12)
    (bag(ids) * factor).sum().backward()
    grad = bag.weight.grad
    assert grad is not None and grad.is_sparse
    assert grad._indices()[0].tolist() == [0, 1, 2, 3, 9, 99]
    twin = bag.weight.detach().double().requires_grad_()
    rows = torch.where((ids >= 0)[..., None], twin[ids.clamp_min(0)], 0.0)
    mean = rows.sum(dim=1) / (ids >= 0).sum(dim=1, keepdim=True).clamp_min(1).sqrt()
    (mean * factor).sum().backward()
    torch.testing.assert_close(grad.to_dense().double(), twin.grad, rtol=1e-6, atol=1e-6)


def test_cost_does_not_grow_with_the_table():
    costs = []
    # More rows than ids that are counted instead of sorted.
    for num_rows in (120 * COUNTED + 1, 50_000):
        bag = sp.SelectiveBag(num_rows, 16)
        optimizer = sp.optimizer(bag)
        ids = torch.randperm(1000)[:120].view(12, 10)
        with sp.count() as ledger:
            bag(ids).sum().backward()
            optimizer.step()
        assert ledger.coverage > 0.95
        costs.append((ledger.macs, ledger.bytes))
    assert costs[0] == costs[1]
    assert costs[0][1] < 120 * 16 * 4 * 20


def test_many_tokens_do_not_grow_the_output():
    ids = torch.arange(64).expand(50, -1)
    assert sp.SelectiveBag(64, 256)(ids).std().item() == pytest.approx(256**-0.5, rel=0.2)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.tensor([[100]]), IndexError),
        (torch.tensor([[-2]]), IndexError),
        (torch.tensor([3]), TypeError),
        (torch.tensor([[3]], dtype=torch.int32), TypeError),
    ],
)
def test_bad_ids_are_refused(ids, error):
    with pytest.raises(error, match="ids"):
        sp.SelectiveBag(100, 4)(ids)


def test_a_bag_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        sp.SelectiveBag(0, 4)


def test_no_tokens_and_no_places():
    bag = sp.SelectiveBag(10, 4)
    assert bag(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 4)
    out = bag(torch.empty(2, 0, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(2, 4))
    out.sum().backward()
    assert bag.weight.grad._nnz() == 0  # pyright: ignore[reportOptionalMemberAccess]
