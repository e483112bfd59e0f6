"""Training touches the rows it needs, estimates the full softmax, and a failed step changes nothing."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import sparingly as sp
from sparingly.nn._candidates import draw
from sparingly.nn._softmax import sampled_softmax

WIDTH = 16


class Fixed(sp.Random):
    """Gives the same hard negatives each time, and has something to learn."""

    def __init__(self, hard=(), routing=None):
        super().__init__(1)
        self.hard = torch.tensor(hard, dtype=torch.int64)
        self.routing = torch.nn.Parameter(torch.tensor(float(routing))) if routing is not None else None

    def negatives(self, hidden, target, count):
        assert not hidden.requires_grad and target.dim() == 2
        return self.hard[:count]

    def routing_loss(self, hidden, target):
        return None if self.routing is None else self.routing * 2


def make(classes=200, negatives=40, **options) -> sp.SelectiveHead:
    return sp.SelectiveHead(WIDTH, classes, negatives=negatives, **{"selector": sp.Dense(), **options})


def snapshot(head, optimizer):
    return copy.deepcopy((head.state_dict(), optimizer.state_dict()))


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(*pair) for pair in zip(one, two, strict=True))
    return one == two


@pytest.mark.parametrize("bias", [True, False])
def test_with_every_class_a_candidate_it_is_the_cross_entropy_and_its_gradient(bias):
    head = make(negatives=200, bias=bias).double()
    hidden = torch.randn(32, WIDTH, dtype=torch.float64, requires_grad=True)
    target = torch.randint(200, (32,))
    inputs = [hidden, *head.parameters()]
    loss, want = head.loss(hidden, target), cross_entropy(head(hidden), target)
    torch.testing.assert_close(loss, want, rtol=1e-7, atol=0.0)
    for grad, expected in zip(
        torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * want, inputs), strict=True
    ):
        torch.testing.assert_close(grad.to_dense(), expected, rtol=1e-6, atol=1e-9)


def test_several_right_classes_are_the_mean_without_each_other():
    head = make(negatives=200).double()
    hidden = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[3, 9, -1], [-1, 7, -1], [0, 1, 2], [9, -1, 3]])
    terms = []
    scores = head(hidden)
    for token, row in enumerate(target):
        right = row[row >= 0]
        each = []
        for one in right:
            masked = scores[token].clone()
            masked[right[right != one]] = float("-inf")
            each.append(cross_entropy(masked[None], one[None]))
        terms.append(torch.stack(each).mean())
    want = torch.stack(terms).mean()
    loss = head.loss(hidden, target)
    torch.testing.assert_close(loss, want, rtol=1e-7, atol=0.0)
    inputs = [hidden, *head.parameters()]
    for grad, expected in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(grad.to_dense(), expected, rtol=1e-6, atol=1e-9)


def test_the_gradient_agrees_with_finite_differences():
    head = make(20, 6).double()
    hidden = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1, -1], [4, 2], [1, 3]])
    candidates = draw(target, 20, 6, None, head.target_counts, head.target_total)

    def loss(hidden, rows, bias):
        return sampled_softmax(hidden, rows, bias, candidates)

    # gradcheck wants dense gradients: with all rows as candidates' rows they are the same numbers.
    def dense(hidden, rows, bias):
        return loss(hidden, *(_Densify.apply(value) for value in (rows, bias)))

    rows, bias = (value.detach().clone().requires_grad_() for value in (head.weight, head.bias))  # pyright: ignore[reportOptionalMemberAccess]
    assert torch.autograd.gradcheck(dense, (hidden, rows, bias))


class _Densify(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0].to_dense()


def test_gradients_hold_the_candidates_and_updates_reach_no_other_row():
    head = make(5000, 30)
    optimizer = sp.optimizer(head, lr=0.1, weight_decay=0.5)
    target = torch.randint(5000, (8,))
    before = copy.deepcopy(head.state_dict())
    head.loss(torch.randn(8, WIDTH), target).backward()
    grad = head.weight.grad
    assert grad is not None and grad.is_sparse
    ids = grad.coalesce().indices()[0]
    assert set(target.tolist()) <= set(ids.tolist())
    assert ids.numel() <= 8 + 30 and torch.equal(head.bias.grad.coalesce().indices()[0], ids)  # pyright: ignore[reportOptionalMemberAccess]
    optimizer.step()
    rest = torch.ones(5000, dtype=torch.bool)
    rest[ids] = False
    for name in ("weight", "bias"):
        after = head.state_dict()[name]
        assert torch.equal(after[rest], before[name][rest])
        assert (after[ids] != before[name][ids]).any(dim=-1).all()


def step_cost(classes: int) -> tuple[int, int]:
    head = make(classes, 64)
    optimizer = sp.optimizer(head)
    target = torch.arange(0, classes, classes // 32)[:32]
    for counted in (False, True):
        with sp.count() as ledger:
            head.loss(torch.randn(32, WIDTH), target).backward()
            optimizer.step()
            optimizer.zero_grad()
        if counted:
            assert ledger.coverage == 1.0, str(ledger)
    return ledger.macs, ledger.bytes


def test_a_step_costs_the_same_with_ten_times_the_classes():
    torch.manual_seed(0)
    small = step_cost(10_000)
    torch.manual_seed(0)
    large = step_cost(100_000)
    # The same targets and strata; now and then a random negative hits a target, and there is one row less.
    assert large[0] == pytest.approx(small[0], rel=0.05)
    assert large[1] == pytest.approx(small[1], rel=0.05)
    assert large[1] < 100_000 * WIDTH * 4 / 5


def test_the_estimated_denominator_has_the_expectation_of_the_true_one():
    classes, tokens, negatives = 60, 6, 8
    share = torch.rand(classes, dtype=torch.float64) ** 3 + 0.01
    share /= share.sum()
    counts = (share * 10**9).long()
    scores = torch.randn(classes, dtype=torch.float64)
    hard = torch.tensor([5, 41, 5])
    sums = []
    for _ in range(3000):
        # Token 0 has class 7; its own right class is no part of the sum.
        target = torch.multinomial(share, tokens, replacement=True)
        target[0] = 7
        found = draw(target[:, None], classes, negatives, hard, counts, counts.sum())
        others = found.ids != 7
        assert (found.log_inclusion[torch.isin(found.ids, hard)] == 0).all()
        sums.append((scores[found.ids] - found.log_inclusion).exp()[others].sum())
    sums = torch.stack(sums)
    want = scores.exp().sum() - scores[7].exp()
    error = sums.std() / len(sums) ** 0.5
    assert abs(sums.mean() - want) < 4 * error
    assert error < 0.02 * want


def test_the_correction_matters_for_that():
    counts = torch.zeros(60, dtype=torch.int64)
    found = draw(torch.tensor([[1], [2]]), 60, 6, None, counts, counts.sum())
    random_only = ~torch.isin(found.ids, torch.tensor([1, 2]))
    torch.testing.assert_close(found.log_inclusion[random_only].exp(), torch.full((int(random_only.sum()),), 0.1))


def test_hard_negatives_take_part_and_leave_fewer_random_ones():
    head = make(1000, 20, selector=Fixed([900, 901, 900]))
    head.selector.fit(head.weight)
    head.loss(torch.randn(4, WIDTH), torch.tensor([1, 2, 3, 4])).backward()
    ids = head.weight.grad.coalesce().indices()[0].tolist()  # pyright: ignore[reportOptionalMemberAccess]
    assert {1, 2, 3, 4, 900, 901} <= set(ids)
    assert len(ids) <= 4 + 2 + 17


def test_hard_negatives_are_asked_for_at_most_half():
    head = make(1000, 4, selector=Fixed(range(100, 160)))
    head.selector.fit(head.weight)
    head.loss(torch.randn(2, WIDTH), torch.tensor([1, 2])).backward()
    ids = head.weight.grad.coalesce().indices()[0].tolist()  # pyright: ignore[reportOptionalMemberAccess]
    assert {100, 101} <= set(ids) and len(ids) <= 2 + 4


def test_what_the_selector_learns_is_added_in_training_only():
    head = make(100, 100, selector=Fixed(routing=1.5))
    head.selector.fit(head.weight)
    hidden, target = torch.randn(4, WIDTH), torch.tensor([1, 2, 3, 4])
    trained = head.loss(hidden, target)
    trained.backward()
    assert head.selector.routing.grad == 2.0
    assert head.target_total == 4
    head.eval()
    assert trained.item() - head.loss(hidden, target).item() == pytest.approx(3.0, abs=1e-4)
    assert head.target_total == 4


def test_targets_are_counted_once_a_step():
    head = make()
    head.loss(torch.randn(3, WIDTH), torch.tensor([[5, 7], [5, -1], [9, -1]]))
    assert head.target_counts.nonzero().flatten().tolist() == [5, 7, 9]
    assert head.target_counts[5] == 2 and head.target_total == 4


@pytest.mark.parametrize(("tokens", "negatives", "classes"), [(1, 0, 50), (1, 5, 50), (3, 0, 50), (2, 3, 1), (2, 9, 2)])
def test_the_smallest_steps_stay_finite(tokens, negatives, classes):
    head = make(classes, negatives)
    optimizer = sp.optimizer(head)
    for _ in range(2):
        head.loss(torch.randn(tokens, WIDTH), torch.randint(classes, (tokens,))).backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in head.parameters())


def test_the_sampled_loss_learns_what_the_full_one_would():
    classes, centres = 2000, torch.randn(2000, WIDTH)
    head = make(classes, 64)
    optimizer = sp.optimizer(head, lr=0.05)
    for _ in range(250):
        target = torch.randint(classes, (256,))
        optimizer.zero_grad()
        head.loss(centres[target] + 0.1 * torch.randn(256, WIDTH), target).backward()
        optimizer.step()
    head.eval()
    assert (head.topk(centres, 1)[1][:, 0] == torch.arange(classes)).float().mean() > 0.9


def test_backward_twice_gives_the_same_gradient_twice():
    head = make()
    loss = head.loss(torch.randn(4, WIDTH), torch.tensor([1, 2, 3, 4]))
    (first,) = torch.autograd.grad(loss, [head.weight], retain_graph=True)
    (second,) = torch.autograd.grad(loss, [head.weight])
    assert torch.equal(first.to_dense(), second.to_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_bfloat16_sum_in_float32(dtype):
    head = make(300, 300).to(dtype)
    hidden, target = torch.randn(8, WIDTH).to(dtype), torch.randint(300, (8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss(hidden, target)
    want = cross_entropy(hidden.double() @ head.weight.double().T + head.bias.double(), target)  # pyright: ignore[reportOptionalMemberAccess]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    assert head.weight.grad.dtype == dtype  # pyright: ignore[reportOptionalMemberAccess]


@pytest.fixture
def trained():
    head = make(400, 20)
    optimizer = sp.optimizer(head)
    head.loss(torch.randn(4, WIDTH), torch.tensor([1, 2, 3, 4])).backward()
    optimizer.step()
    optimizer.zero_grad()
    return head, optimizer


HIDDEN = torch.ones(4, WIDTH)
NAN = torch.ones(4, WIDTH).index_fill_(0, torch.tensor([2]), float("nan"))


@pytest.mark.parametrize(
    ("hidden", "target", "error", "match"),
    [
        (NAN, torch.arange(4), ValueError, "token 2"),
        (HIDDEN, torch.tensor([0, 1, 2, 400]), IndexError, r"0\.\.399, got 400"),
        (HIDDEN, torch.tensor([0, -1, 2, 3]), IndexError, r"0\.\.399, got -1"),
        (HIDDEN, torch.tensor([[0, -2]] * 4), IndexError, "pad, got -2"),
        (HIDDEN, torch.tensor([[0, 1], [-1, -1], [2, 3], [4, 5]]), ValueError, "token 1"),
        (HIDDEN, torch.arange(4).int(), TypeError, "int32"),
        (HIDDEN, torch.arange(5), ValueError, "tokens = 4"),
        (HIDDEN, torch.zeros(4, 0, dtype=torch.int64), ValueError, "at least 1"),
        (HIDDEN * 3e38, torch.arange(4), ValueError, "overflowed"),
    ],
)
def test_a_failed_loss_leaves_every_bit(trained, hidden, target, error, match):
    head, optimizer = trained
    before = snapshot(head, optimizer)
    with pytest.raises(error, match=match):
        head.loss(hidden, target).backward()
    optimizer.step()
    assert same(before, snapshot(head, optimizer))


def test_a_gradient_that_is_not_finite_leaves_every_bit(trained):
    head, optimizer = trained
    before = snapshot(head, optimizer)
    loss = head.loss(HIDDEN, torch.arange(4))
    counts = head.target_counts.clone()
    (loss * float("nan")).backward()
    with pytest.raises(ValueError, match="finite"):
        optimizer.step()
    head.target_counts -= counts - before[0]["target_counts"]
    head.target_total -= 4
    assert same(before, snapshot(head, optimizer))
