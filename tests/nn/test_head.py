"""SelectiveHead's answers: exact where promised, counted fallbacks, bad input, conversions, copies."""

import copy
import warnings

import pytest
import torch

import sparingly as sp

CLASSES, WIDTH = 300, 16


@pytest.fixture
def hidden():
    return torch.randn(6, WIDTH)


def make(selector=None, **options) -> sp.SelectiveHead:
    return sp.SelectiveHead(WIDTH, CLASSES, selector=selector, **options)


def oracle(budget: int = 20, **options) -> sp.SelectiveHead:
    head = make(sp.Oracle(budget), **options)
    head.refresh()
    return head


def exact(head, hidden, k):
    bias = 0.0 if head.bias is None else head.bias.double()
    return (hidden.double() @ head.weight.double().T + bias).topk(k, dim=1)


def test_the_default_selector_depends_on_the_number_of_classes():
    assert isinstance(sp.SelectiveHead(4, 8191).selector, sp.Dense)
    assert isinstance(sp.SelectiveHead(4, 8192).selector, sp.Graph)


@pytest.mark.parametrize("bias", [True, False])
def test_every_class_is_the_linear_layer(hidden, bias):
    head = make(bias=bias)
    want = torch.nn.functional.linear(hidden, head.weight, head.bias)
    assert torch.equal(head(hidden), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_topk_is_best_first_and_exact_when_the_selector_is(hidden, bias, dtype):
    head = oracle(bias=bias).to(dtype)
    head.refresh()
    scores, classes = head.topk(hidden.to(dtype), 5)
    want = exact(head, hidden.to(dtype), 5)
    assert torch.equal(classes, want.indices)
    torch.testing.assert_close(scores.double(), want.values, rtol=1e-5, atol=1e-5)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not scores.requires_grad
    assert head.fallbacks == {}
    with torch.no_grad():
        head.weight[classes[0, 0], 0] += 10.0
    assert not torch.equal(head.topk(hidden.to(dtype), 5)[0], scores)


def test_an_unfitted_selector_falls_back_to_the_exact_answer_and_says_so_once(hidden):
    head = make(sp.Random(5))
    with pytest.warns(UserWarning, match="not fitted"):
        _, classes = head.topk(hidden, 3)
    assert torch.equal(classes, exact(head, hidden, 3).indices)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.topk(hidden, 3)
    ((reason, tokens),) = head.fallbacks.items()
    assert "not fitted" in reason and tokens == 12


def test_weights_loaded_without_the_selector_count_as_unrefreshed(hidden):
    head, other = oracle(), make()
    weights = {name: value for name, value in other.state_dict().items() if not name.startswith("selector.")}
    head.load_state_dict(weights, strict=False)
    with pytest.warns(UserWarning, match="loaded without"):
        _, classes = head.topk(hidden, 3)
    assert torch.equal(classes, exact(head, hidden, 3).indices)
    head.refresh()
    head.topk(hidden, 3)
    assert sum(head.fallbacks.values()) == 6


def test_only_tokens_with_too_few_classes_are_answered_exactly(hidden):
    head = oracle(4)
    chosen = torch.arange(4).expand(6, -1).clone()
    chosen[2, 1:] = -1
    head.selector.select = lambda hidden: sp.Selection(chosen, CLASSES)
    with pytest.warns(UserWarning, match="fewer than k"):
        scores, classes = head.topk(hidden, 3)
    want = exact(head, hidden, 3)
    assert torch.equal(classes[2], want.indices[2])
    torch.testing.assert_close(scores[2].double(), want.values[2], rtol=1e-5, atol=1e-5)
    assert (classes[[0, 1, 3, 4, 5]] < 4).all()
    assert list(head.fallbacks.values()) == [1]


def test_k_beyond_what_the_selector_returns_is_exact(hidden):
    head = oracle(4)
    with pytest.warns(UserWarning, match="fewer than k"):
        _, classes = head.topk(hidden, CLASSES)
    assert torch.equal(classes.sort().values, torch.arange(CLASSES).expand(6, -1))


def test_a_fitted_head_reads_only_what_it_selects(hidden):
    head = make(sp.Random(10), bias=False)
    head.refresh()
    with sp.count() as ledger:
        head.topk(hidden, 5)
    assert ledger.macs == 6 * 10 * WIDTH
    assert ledger.bytes_read < 2 * 6 * 10 * WIDTH * 4
    assert ledger.coverage == 1.0


def test_no_tokens_give_no_answers():
    head = oracle()
    scores, classes = head.topk(torch.empty(0, WIDTH), 4)
    assert scores.shape == classes.shape == (0, 4)
    assert head(torch.empty(0, WIDTH)).shape == (0, CLASSES)


@pytest.mark.parametrize("k", [0, -1, CLASSES + 1])
def test_k_out_of_range_is_refused(hidden, k):
    with pytest.raises(ValueError, match=rf"1\.\.num_classes \({CLASSES}\), got {k}"):
        oracle().topk(hidden, k)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_hidden_that_is_not_finite_is_refused_by_its_first_token(hidden, value):
    hidden[3, 1] = hidden[5, 0] = value
    head = oracle()
    for call in (lambda: head.topk(hidden, 2), lambda: head.loss(hidden, torch.zeros(6, dtype=torch.int64))):
        with pytest.raises(ValueError, match="token 3"):
            call()


def test_hidden_whose_sum_overflows_is_finite():
    head = oracle()
    with torch.no_grad():
        head.weight.mul_(1e-30)
    head.refresh()
    assert (head.topk(torch.full((2, WIDTH), 3e38), 2)[1] >= 0).all()


@pytest.mark.parametrize(
    ("hidden", "error"),
    [
        (torch.zeros(WIDTH), ValueError),
        (torch.zeros(2, WIDTH + 1), ValueError),
        (torch.zeros(2, 2, WIDTH), ValueError),
        (torch.zeros(2, WIDTH, dtype=torch.int64), TypeError),
        (torch.zeros(2, WIDTH, dtype=torch.float16), TypeError),
    ],
)
def test_hidden_of_another_shape_or_dtype_is_refused(hidden, error):
    head = oracle()
    for call in (head, head.topk, lambda hidden: head.loss(hidden, torch.zeros(2, dtype=torch.int64))):
        with pytest.raises(error, match="hidden"):
            call(hidden)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((0, 5), {}), ((5, 0), {}), ((4, 5), {"negatives": -1})],
)
def test_a_head_of_nothing_is_refused(arguments, options):
    with pytest.raises(ValueError, match="must"):
        sp.SelectiveHead(*arguments, **options)


def test_a_selector_fitted_to_something_else_is_refused():
    selector = sp.Random(3)
    selector.fit(torch.randn(7, WIDTH))
    with pytest.raises(ValueError, match="300 classes, got 7"):
        make(selector)


@pytest.mark.parametrize("bias", [True, False])
def test_from_and_to_linear_share_the_parameters(hidden, bias):
    linear = torch.nn.Linear(WIDTH, CLASSES, bias=bias)
    head = sp.SelectiveHead.from_linear(linear, selector=sp.Oracle(20))
    assert head.weight is linear.weight and head.bias is linear.bias
    assert torch.equal(head(hidden), linear(hidden))
    head.refresh()
    assert torch.equal(head.topk(hidden, 1)[1][:, 0], linear(hidden).argmax(dim=1))
    back = head.to_linear()
    assert type(back) is torch.nn.Linear and back.weight is linear.weight and back.bias is linear.bias
    assert (back.in_features, back.out_features) == (WIDTH, CLASSES)


def test_from_linear_takes_linear_layers_only():
    with pytest.raises(TypeError, match="got Embedding"):
        sp.SelectiveHead.from_linear(torch.nn.Embedding(3, 4))  # pyright: ignore[reportArgumentType]


def test_a_deepcopy_shares_nothing(hidden):
    head = oracle()
    twin = copy.deepcopy(head)
    before = head.topk(hidden, 3)
    with torch.no_grad():
        head.weight.zero_()
    assert torch.equal(twin.topk(hidden, 3)[0], before[0])
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in head.parameters())


def test_a_state_dict_round_trip_keeps_answers_and_counts(hidden):
    head = make(sp.Dense())
    head.loss(hidden, torch.tensor([1, 2, 3, 4, 5, 5]))
    twin = make(sp.Dense())
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin.topk(hidden, 3)[1], head.topk(hidden, 3)[1])
    assert twin.target_counts[5] == 2 and twin.target_total == 6


def test_bfloat16_keeps_counts_and_a_float_bias_that_follows_the_bias(hidden):
    head = make(sp.Oracle(20)).to(torch.bfloat16)
    assert head.weight.dtype == torch.bfloat16 and head.target_counts.dtype == torch.int64
    head.refresh()
    first = head.topk(hidden, 1)[0]
    with torch.no_grad():
        head.bias += 1.0  # pyright: ignore[reportOperatorIssue]
    assert (head.topk(hidden, 1)[0] - first > 0.5).all()


@pytest.mark.parametrize("bias", [True, False])
def test_int8_rows_keep_the_answers_and_cannot_be_trained(hidden, bias):
    head = oracle(CLASSES, bias=bias)
    small = head.int8()
    assert small.weight.dtype == torch.int8 and small.selector is head.selector
    assert small.weight.abs().amax(dim=1).eq(127).all()
    rows = small.weight.double() * small.scale.double()[:, None]  # pyright: ignore[reportOptionalMemberAccess]
    assert ((rows - head.weight.double()).abs() <= small.scale.double()[:, None] * 0.5001).all()  # pyright: ignore[reportOptionalMemberAccess]
    want = hidden.double() @ rows.T + (head.bias.double() if bias else 0.0)  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(small(hidden).double(), want, rtol=1e-5, atol=1e-5)
    scores, classes = small.topk(hidden, 5)
    torch.testing.assert_close(scores.double(), want.topk(5).values, rtol=1e-5, atol=1e-5)
    assert torch.equal(classes, want.topk(5).indices)
    assert list(small.parameters()) == []
    for call in (lambda: small.loss(hidden, torch.zeros(6, dtype=torch.int64)), small.refresh, small.int8):
        with pytest.raises(RuntimeError, match="int8"):
            call()


def test_an_int8_head_survives_to_bfloat16_and_a_row_of_zeros(hidden):
    head = oracle(CLASSES)
    with torch.no_grad():
        head.weight[7] = 0.0
    small = head.int8().to(torch.bfloat16)
    assert small.scale is not None and small.scale.dtype == torch.float32
    scores = small(hidden)
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores[:, 7], head.bias[7].bfloat16().float().expand(6))  # pyright: ignore[reportOptionalSubscript]
