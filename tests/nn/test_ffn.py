"""A layer of many units of which few run: answers, training, resume, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparingly as sp

D, UNITS = 12, 144
SELECTORS = {
    "ProductKey": lambda: sp.ProductKey(heads=2, k=4, key_dim=6),
    "Experts": lambda: sp.Experts(k=3),
    "Tree": lambda: sp.Tree(trees=3),
    "Random": lambda: sp.Random(6),
    "Oracle": lambda: sp.Oracle(6),
    "Dense": sp.Dense,
}
LEARNED = ("ProductKey", "Experts", "Tree")


def layer(name: str = "ProductKey", block: int = 1, **options: Any) -> Any:
    torch.manual_seed(2)
    made = sp.SelectiveFFN(D, UNITS, selector=SELECTORS[name](), block=block, **options)
    nn.init.normal_(made.bias)
    return made


def network(name: str = "ProductKey", block: int = 1) -> Any:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, D), layer(name, block), nn.LayerNorm(D), nn.Linear(D, 3))


def expected(ffn: sp.SelectiveFFN, x: torch.Tensor) -> torch.Tensor:
    """Every unit, masked and weighted, float64."""
    hidden = x.reshape(-1, D)
    chosen = ffn.selector.select_from(hidden, ffn.up[:: ffn.block], ffn.bias[:: ffn.block])
    ids = chosen.per_token(hidden.shape[0])
    weights = torch.ones(ids.shape) if chosen.weights is None else chosen.weights
    gates = torch.zeros(hidden.shape[0], UNITS // ffn.block + 1, dtype=torch.float64)
    gates = gates.scatter_add(1, ids.where(ids >= 0, UNITS // ffn.block), weights.double())[:, :-1]
    values = F.gelu(hidden.double() @ ffn.up.double().T + ffn.bias.double())
    return ((values * gates.repeat_interleave(ffn.block, 1)) @ ffn.down.double()).view(x.shape)


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "Random"])
@pytest.mark.parametrize("block", [1, 4])
def test_the_answer_is_that_of_the_chosen_units(name, block):
    if name == "Oracle" and block > 1:
        with pytest.raises(ValueError, match="Oracle finds single units; block must be 1, got 4"):
            layer(name, block)
        return
    ffn, x = layer(name, block), torch.randn(3, 5, D)
    torch.testing.assert_close(ffn(x).double(), expected(ffn, x), rtol=1e-5, atol=1e-5)
    assert ffn(x).dtype == torch.float32 and ffn(x[0, 0]).shape == (D,)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("block", [1, 4])
def test_outputs_have_the_same_size_however_many_units_run(name, block):
    if name == "Oracle":
        return
    torch.manual_seed(0)
    sizes = [float(sp.SelectiveFFN(64, 3072, selector=SELECTORS[name](), block=block)(torch.randn(64, 64)).std())
             for _ in range(3)]  # fmt: skip
    assert 0.3 < sum(sizes) / 3 < 1.2


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("block", [1, 4])
def test_training_touches_only_what_ran(name, block):
    model = network(name, block)
    optimizer = sp.optimizer(model, lr=0.01)
    ffn: Any = model[1]
    x = torch.randn(2, 5)
    hidden = model[0](x)
    chosen = ffn.selector.select_from(hidden, ffn.up[::block], ffn.bias[::block]).ids
    ran = torch.zeros(UNITS // block, dtype=torch.bool)
    ran[chosen[chosen >= 0]] = True
    ran = ran.repeat_interleave(block)
    before = copy.deepcopy(ffn.state_dict())
    F.cross_entropy(model(x), torch.tensor([0, 2])).backward()
    for part in ("up", "bias", "down"):
        grad = getattr(ffn, part).grad
        assert grad.is_sparse and grad.coalesce().indices()[0].tolist() == ran.nonzero()[:, 0].tolist()
    optimizer.step()
    for part in ("up", "bias", "down"):
        moved = (getattr(ffn, part) != before[part]).view(UNITS, -1).any(dim=1)
        assert torch.equal(moved, ran), part
    assert torch.equal(ffn.used.repeat_interleave(block), ran)
    assert ffn.share_used == pytest.approx(float(ran.float().mean()))


@pytest.mark.parametrize("name", LEARNED)
def test_it_learns_and_resumes_to_the_same_bits(name, tmp_path):
    torch.manual_seed(1)
    x = torch.randn(256, 5)
    target = (x[:, 0] * x[:, 1] > 0).long()

    def steps(model: nn.Module, optimizer: Any, start: int, stop: int) -> list[float]:
        losses = []
        for step in range(start, stop):
            part = slice(step * 32 % 256, step * 32 % 256 + 32)
            loss = F.cross_entropy(model(x[part]), target[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = network(name)
    optimizer = sp.optimizer(model, lr=0.01)
    losses = steps(model, optimizer, 0, 60)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state")
    rest = steps(model, optimizer, 60, 120)
    assert sum(rest[-8:]) < 0.6 * sum(losses[:8])
    fresh = network(name)
    again = sp.optimizer(fresh, lr=0.01)
    states = torch.load(tmp_path / "state")
    fresh.load_state_dict(states[0])
    again.load_state_dict(states[1])
    assert steps(fresh, again, 60, 120) == rest
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", LEARNED)
def test_accumulated_batches_are_one_batch(name, block):
    x, target = torch.randn(12, 5), torch.randint(3, (12,))
    grads = []
    for parts in (1, 3):
        model = network(name, block)
        for some, right in zip(x.chunk(parts), target.chunk(parts), strict=True):
            (F.cross_entropy(model(some), right) / parts).backward()
        bias: Any = getattr(model[1].selector, "bias", None)
        if bias is not None:
            # The load of a batch is that batch's, whatever the loss is divided by.
            bias.grad /= parts
        grads.append({key: one.grad.to_dense() for key, one in model.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    x = torch.randn(7, 5)
    grads = []
    for recompute in (False, True):
        model = network("Experts", 4)
        hidden = model[0](x)
        out = checkpoint(model[1], hidden, use_reentrant=reentrant) if recompute else model[1](hidden)
        model[3](model[2](out)).square().sum().backward()
        grads.append({name: one.grad.to_dense() for name, one in model.named_parameters()})
    for name, value in grads[0].items():
        assert torch.equal(value, grads[1][name]), name


def test_bfloat16_autocast_and_bfloat16_weights():
    model, x = network(), torch.randn(9, 5)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        F.cross_entropy(out, torch.zeros(9, dtype=torch.int64)).backward()
    assert out.dtype == torch.bfloat16 and model[1].up.grad.is_sparse and model[1].up.grad.dtype == torch.float32
    assert (out - exact).abs().mean() < 0.1 * exact.abs().mean()
    half = layer().bfloat16()
    optimizer = sp.optimizer(half, lr=0.01)
    y = half(torch.randn(4, D, dtype=torch.bfloat16))
    y.square().sum().backward()
    optimizer.step()
    assert y.dtype == torch.bfloat16 and half.up.grad.dtype == torch.bfloat16 and torch.isfinite(half.up).all()
    with pytest.raises(TypeError, match=r"float32, bfloat16.* got torch.float16"):
        layer().half()(torch.randn(4, D, dtype=torch.float16))


@pytest.mark.parametrize("name", LEARNED)
def test_inside_torch_compile_and_export(name):
    model, x = network(name).eval(), torch.randn(6, 5)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    found = model[1].up.grad
    assert found is not None and not found.is_sparse
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(found, model[1].up.grad.to_dense())
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)


def test_copy_state_save_and_load(tmp_path):
    model, other = network(), network()
    for part in other.parameters():
        nn.init.normal_(part)
    x = torch.randn(4, 5)
    sp.save(model, tmp_path / "model")
    sp.load(tmp_path / "model", into=other)
    assert torch.equal(other(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("name", LEARNED)
def test_made_without_memory_and_filled_later(name):
    ffn, x = layer(name), torch.randn(4, D)
    empty = sp.SelectiveFFN(D, UNITS, selector=SELECTORS[name](), device="meta").to_empty(device="cpu")
    empty.load_state_dict(ffn.state_dict())
    assert torch.equal(empty(x), ffn(x))


def test_idle_units_get_a_new_start():
    ffn = layer("Experts", 4)
    used = torch.arange(UNITS // 4) % 2 == 0
    ffn.used.copy_(used)
    before = ffn.up.detach().clone().view(-1, 4, D)
    assert ffn.revive() == UNITS // 2 and not ffn.used.any()
    after = ffn.up.detach().view(-1, 4, D)
    assert torch.equal(after[used], before[used])
    assert all(any(torch.equal(block, other) for other in before[used]) for block in after[~used])
    assert layer("Tree").revive() == 0


def test_evaluation_does_not_count_as_use():
    ffn = layer()
    with torch.no_grad():
        ffn(torch.randn(4, D))
    ffn.eval()(torch.randn(4, D))
    assert ffn.share_used == 0 and ffn.ran.tolist() == [8, 8 * 8, 0, 8 * 8]


@pytest.mark.parametrize("change, message", [
    ({"d_model": 0}, "d_model must be a whole number from 1, got 0"),
    ({"num_units": 2.5}, "num_units must be a whole number from 1, got 2.5"),
    ({"block": 5}, r"block must divide num_units \(144\), got 5"),
    ({"activation": "tanh"}, "activation must be one of relu, gelu, silu, got 'tanh'"),
])  # fmt: skip
def test_bad_options(change, message):
    options = {"d_model": D, "num_units": UNITS} | change
    with pytest.raises(ValueError, match=message):
        sp.SelectiveFFN(**options)


def test_bad_input_changes_nothing():
    model = network()
    before = copy.deepcopy(model.state_dict())
    ffn: Any = model[1]
    x = torch.randn(3, D)
    x[1, 4] = float("nan")
    with pytest.raises(ValueError, match="infinity or NaN for token 1"):
        ffn(x)
    with pytest.raises(ValueError, match=r"x must be floating \[\.\.\., d_model\] with d_model = 12, got \[3, 5\]"):
        ffn(torch.randn(3, 5))
    with pytest.raises(ValueError, match="x must be floating"):
        ffn(torch.ones(3, D, dtype=torch.int64))
    optimizer = sp.optimizer(model, lr=0.01)
    model(torch.randn(3, 5)).sum().backward()
    ffn.down.grad._values()[0] = float("inf")
    with pytest.raises(ValueError, match="gradient"):
        optimizer.step()
    assert not optimizer.state
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.items() if not name.endswith("used"))


def test_explain_tells_what_runs_and_what_never_did():
    model = network()
    with pytest.raises(ValueError, match="no selective layers"):
        sp.explain(model[0])
    assert sp.explain(model).layers[0].share_run is None
    model(torch.randn(1, 5)).sum().backward()
    found: Any = sp.explain(model).layers[0]
    assert (found.name, found.kind, found.selector, found.units) == ("1", "SelectiveFFN", "ProductKey", UNITS)
    assert found.share_run == pytest.approx(8 / UNITS) and 0 < found.share_used <= 8 / UNITS
    choice = (2 * 2 * 6 * D + 2 * 2 * 12 * 6) * 4
    assert found.size_bytes == 8 * (2 * D + 1) * 4 + choice and found.dense_bytes == UNITS * (2 * D + 1) * 4
    text = str(sp.explain(model))
    assert "mlp_rows (cpu)" in text and "ever)" in text and "not calibrated" not in text
