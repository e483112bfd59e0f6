"""SelectiveBag against float64, with gradients of the rows used and no others."""

from typing import Any

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


def features(dropout: float = 0.0) -> Any:
    torch.manual_seed(3)
    selector = sp.Ferns((6, 5), 12, 3, window=3, margin=0.3, noise=2.0)
    return sp.SelectiveBag(96, 7, selector=selector, groups=4, gain=3.0, std=0.5, dropout=dropout)


def summed(bag: Any, x: torch.Tensor) -> torch.Tensor:
    ids = bag.selector.select(x).ids.view(len(x) * 4, 3)
    return (3.0 * exact(bag, ids)).view(len(x), 28)


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_rows_that_features_name_are_summed_in_groups(tokens):
    bag, x = features().eval(), torch.randn(tokens, 30)
    expected = summed(bag, x)
    with torch.no_grad():
        # In one pass, without ids in between.
        torch.testing.assert_close(bag(x).double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bag(x).double(), expected, rtol=1e-5, atol=1e-5)
    bag.selector.setting = 4
    ids = bag.selector.select(x).ids.view(tokens * 4, 1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = bag(x).double()
        torch.testing.assert_close(found, (3.0 * exact(bag, ids)).view(tokens, 28), rtol=1e-5, atol=1e-5)


def test_what_runs_is_counted_and_explained():
    bag, x = features().eval(), torch.randn(50, 30)
    read = int((bag.selector.select(x).ids >= 0).sum())
    counts = []
    for grad in (True, False):
        bag.ran.zero_()
        with torch.set_grad_enabled(grad), sp.count() as ledger:
            bag(x)
        assert bag.ran.tolist() == [50, read, 0, read]
        counts.append(ledger.macs)
    assert counts == [read * 7] * 2
    (layer,) = sp.explain(torch.nn.Sequential(bag)).layers
    assert layer.share_run == pytest.approx(read / 50 / 96) and layer.selector == "Ferns"
    assert "contract" not in str(sp.explain(torch.nn.Sequential(bag)))


def test_dropout_leaves_rows_out_in_training_only():
    torch.manual_seed(0)
    bag, x = features(dropout=1.0), torch.randn(400, 30)
    bag.selector.noise = 0.0
    bag(x)
    trained = int(bag.ran[1])
    bag.eval()(x)
    whole = int(bag.ran[1]) - trained
    assert 0.4 * whole < trained < 0.6 * whole


def test_training_touches_the_rows_that_were_named():
    bag, x = features(), torch.randn(3, 30)
    before, optimizer = bag.weight.detach().clone(), sp.optimizer(bag)
    bag(x).square().sum().backward()
    grad = bag.weight.grad
    assert grad is not None and grad.is_sparse
    optimizer.step()
    changed = (bag.weight != before).any(dim=1).nonzero().flatten()
    assert torch.equal(changed, grad._indices()[0]) and 0 < len(changed) < 96


def test_bad_features_and_options():
    bag = features()
    with pytest.raises(ValueError, match=r"x must be finite.*token 1"):
        bag(torch.tensor([[0.0] * 30, [float("nan")] * 30]))
    with pytest.raises(TypeError, match="x must be floating"):
        bag(torch.zeros(2, 30, dtype=torch.int64))
    bag.selector.setting = 5
    for mode in (bag.train(), bag.eval()):
        with torch.no_grad(), pytest.raises(ValueError, match=r"groups \(4\) must divide .* got 5"):
            mode(torch.randn(2, 30))
    with pytest.raises(ValueError, match=r"dropout must be in 0\.\.1, got 2"):
        sp.SelectiveBag(8, 2, dropout=2)
    with pytest.raises(ValueError, match="rows, got 90"):
        sp.SelectiveBag(90, 7, selector=sp.Ferns((6, 5), 12, 3))
