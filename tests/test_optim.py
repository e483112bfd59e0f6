"""The optimiser: AdamW where gradients are dense, row by row where they are sparse, all or nothing in a step."""

import copy
import pickle

import pytest
import torch

import sparingly as sp
from sparingly.optim import RowAdamW


def sparse(ids, values, shape):
    return torch.sparse_coo_tensor(torch.tensor([ids]), values, shape, check_invariants=True)


def test_dense_gradients_are_adamw():
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    twin = copy.deepcopy(net)
    ours, theirs = (
        sp.optimizer(net, lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1),
    )
    for _ in range(5):
        inputs = torch.randn(4, 5)
        for model, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 4), (6,), (6, 2, 3)])
def test_rows_in_every_step_are_adamw_and_the_others_rest(shape):
    bank = torch.nn.Parameter(torch.randn(shape))
    start = bank.detach().clone()
    twin = torch.nn.Parameter(start[[1, 4]].clone())
    ours, theirs = sp.optimizer([bank], lr=0.01), torch.optim.AdamW([twin], lr=0.01)
    for _ in range(6):
        twin.grad = torch.randn_like(twin)
        bank.grad = sparse([1, 4], twin.grad, shape)
        ours.step()
        theirs.step()
    torch.testing.assert_close(bank[[1, 4]], twin.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(bank[[0, 2, 3, 5]], start[[0, 2, 3, 5]])
    assert ours.state[bank]["steps"].tolist() == [0, 6, 0, 0, 6, 0]


def test_an_uncoalesced_gradient_is_the_sum():
    banks = [torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2)]
    optimizers = [sp.optimizer([bank]) for bank in banks]
    values = torch.randn(3, 3)
    banks[0].grad = sparse([4, 2, 4], values, (5, 3))
    banks[1].grad = sparse([2, 4], torch.stack([values[1], values[0] + values[2]]), (5, 3))
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(*banks)


def test_gradients_add_up_over_backward_passes():
    head = sp.SelectiveHead(4, 30, negatives=30)
    twin = copy.deepcopy(head)
    hidden, target = torch.randn(8, 4), torch.randint(30, (8,))
    for part in (slice(0, 4), slice(4, 8)):
        (head.loss(hidden[part], target[part]) / 2).backward()
    twin.loss(hidden, target).backward()
    sp.optimizer(head, lr=0.1).step()
    sp.optimizer(twin, lr=0.1).step()
    torch.testing.assert_close(head.weight, twin.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["dense", "sparse"])
def test_both_kinds_of_gradient_may_come_in_turn(first):
    bank, twin = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    ours, theirs = sp.optimizer([bank], lr=0.01), torch.optim.AdamW([twin], lr=0.01)
    for step in range(4):
        twin.grad = torch.randn(4, 3)
        by_row = (step % 2 == 0) == (first == "sparse")
        bank.grad = sparse([0, 1, 2, 3], twin.grad, (4, 3)) if by_row else twin.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(bank, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_a_round_trip_with_its_dtypes(dtype):
    def model():
        torch.manual_seed(3)
        return torch.nn.ModuleList([sp.SelectiveBag(20, 4, dtype=dtype), torch.nn.Linear(4, 2)])

    def train(module, optimizer, steps, seed):
        torch.manual_seed(seed)
        for _ in range(steps):
            ids = torch.randint(20, (6, 3))
            optimizer.zero_grad()
            module[1](module[0](ids)).square().sum().backward()
            optimizer.step()

    whole, first = model(), model()
    optimizers = [sp.optimizer(module, lr=0.1) for module in (whole, first)]
    for module, optimizer in zip((whole, first), optimizers, strict=True):
        train(module, optimizer, 3, 1)
    second = copy.deepcopy(first)
    again = sp.optimizer(second, lr=0.5)
    again.load_state_dict(pickle.loads(pickle.dumps(optimizers[1].state_dict())))
    assert again.param_groups[0]["lr"] == 0.1
    state = again.state[second[0].weight]  # pyright: ignore[reportArgumentType]
    assert state["steps"].dtype == torch.int32 and state["exp_avg"].dtype == torch.float32
    train(whole, optimizers[0], 3, 2)
    train(second, again, 3, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_scheduler_and_groups_set_the_rate():
    bank = torch.nn.Parameter(torch.zeros(3, 2))
    fixed = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = sp.optimizer([{"params": [bank]}, {"params": [fixed], "lr": 0.0}], lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    moved = []
    for _ in range(3):
        before = bank.detach().clone()
        bank.grad = sparse([1], torch.ones(1, 2), (3, 2))
        fixed.grad = sparse([1], torch.ones(1, 2), (3, 2))
        optimizer.step()
        scheduler.step()
        moved.append((before - bank)[1, 0].item())
    assert moved == pytest.approx([1.0, 0.5, 0.25], rel=1e-4)
    assert (fixed == 0).all()


@pytest.mark.parametrize("bad", ["nan", "inf", "dense", "range"])
def test_one_bad_gradient_and_nothing_is_written(bad):
    params = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(3)]
    optimizer = sp.optimizer(params, lr=0.1)
    for param in params[:2]:
        param.grad = sparse([0, 2], torch.ones(2, 3), (5, 3))
    params[2].grad = torch.ones(5, 3)
    optimizer.step()
    before = [param.detach().clone() for param in params], copy.deepcopy(optimizer.state_dict()["state"])
    error: type[Exception] = ValueError
    if bad == "dense":
        params[2].grad[4, 1] = float("nan")
    elif bad == "range":
        error = IndexError
        params[1].grad = torch.sparse_coo_tensor(
            torch.tensor([[7]]), torch.ones(1, 3), (5, 3), check_invariants=False, is_coalesced=True
        )
    else:
        params[1].grad = sparse([0, 2], torch.tensor([[1.0] * 3, [1.0, float(bad), 0.0]]), (5, 3))
    with pytest.raises(error):
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before[0], params, strict=True))
    after = optimizer.state_dict()["state"]
    for key, state in before[1].items():
        assert all(torch.equal(value, after[key][name]) for name, value in state.items())


def test_the_message_names_the_row_and_what_to_do():
    bank = torch.nn.Parameter(torch.zeros(5, 3))
    bank.grad = sparse([1, 3], torch.tensor([[0.0] * 3, [float("nan")] * 3]), (5, 3))
    with pytest.raises(ValueError, match="row 3; nothing was changed"):
        sp.optimizer([bank]).step()


def test_parameters_without_a_gradient_or_frozen_are_left():
    net = torch.nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    optimizer = sp.optimizer(net)
    assert [param for group in optimizer.param_groups for param in group["params"]] == [net.weight]
    before = net.weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.weight, before) and not optimizer.state


def test_a_closure_is_called_with_gradients_on():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = sp.optimizer([param], lr=0.1)

    def closure():
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert (param < 1).all()


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}])
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        RowAdamW([torch.nn.Parameter(torch.zeros(1))], **options)


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
@pytest.mark.parametrize("ids", [[0, 2, 3], [3, 0, 3]])
def test_clipping_takes_sparse_gradients_too(max_norm, ids):
    bank, dense = torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))
    twins = [torch.nn.Parameter(one.detach().clone()) for one in (bank, dense)]
    optimizer = sp.optimizer([bank, dense])
    bank.grad, dense.grad = sparse(ids, torch.randn(3, 3), (5, 3)), torch.randn(4)
    twins[0].grad, twins[1].grad = bank.grad.to_dense(), dense.grad.clone()
    norms = [float(torch.nn.utils.clip_grad_norm_(some, max_norm)) for some in ([bank, dense], twins)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for one, other in zip((bank, dense), twins, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.to_dense(), other.grad)
    optimizer.step()
    with pytest.raises(NotImplementedError, match="dim must be None"):
        torch.linalg.vector_norm(sparse(ids, torch.randn(3, 3), (5, 3)), dim=0)
