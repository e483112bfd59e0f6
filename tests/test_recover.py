"""Recovery: what it learns, that it stops cleanly, and that it goes on to the same bits."""

import copy
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly._distill import divergence, token_weights
from sparingly.convert import convert_
from sparingly.nn.linear import SelectiveLinear
from sparingly.nn.mlp import SelectiveMLP
from sparingly.nn.selective import selective_modules
from sparingly.recover import Recovery, recover
from sparingly.selectors.threshold import InputThreshold, Threshold

VOCABULARY, WIDTH, HIDDEN = 40, 16, 48


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TinyLM(nn.Module):
    """A network of two converted layers with tied embeddings; answers as transformers' do, or as a plain tensor."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix: Any = nn.Linear(WIDTH, WIDTH)
        self.mlp: Any = GatedMLP()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, fill: float = 0.0) -> Any:
        x = self.embed(input_ids)
        x = x + self.mix(x.cumsum(1) / 4)
        x = self.drop(x + 3 * self.mlp(2 * x))
        return x if self.plain else SimpleNamespace(logits=self.head(x) + fill)


def converted(plain: bool = False, keep: int = 25) -> TinyLM:
    torch.manual_seed(3)
    model = TinyLM(plain)
    ids = torch.randint(VOCABULARY, (16, 8))
    x = model.embed(ids).flatten(0, 1)
    mlp: Any = SelectiveMLP(model.mlp, "up", "down", F.silu, Threshold(), gate="gate")
    mlp.selector.fit(torch.randn(HIDDEN, WIDTH), None, F.silu(mlp.gate(2 * x)).detach())
    mix = SelectiveLinear.from_dense(model.mix, InputThreshold())
    mix.selector.fit(model.mix.weight.detach().t(), None, x.detach())
    model.mlp, model.mix = mlp, mix
    mlp.selector.setting, mix.selector.setting = keep, 60
    return model


def windows(n: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (4, 8), generator=generator) for _ in range(n)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def interrupt(model: nn.Module, at: int, error: type[BaseException] = KeyboardInterrupt) -> Any:
    """Raise in the forward with selection of that number, after the one of the dense side."""
    calls = [0]

    def hook(_module: nn.Module, _inputs: Any) -> None:
        calls[0] += not any(layer.off for layer in selective_modules(model).values())
        if calls[0] == at:
            raise error

    return model.register_forward_pre_hook(hook)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("plain", [False, True])
def test_the_distance_to_the_dense_twin_falls(rank, plain):
    model = converted(plain)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    strides = {name: p.stride() for name, p in model.named_parameters()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    made = recover(model, windows(), rank=rank, lr=3e-3, steps=80)
    assert isinstance(made, Recovery) and made.steps == 80 and made.examples == 320 and len(made.losses) == 80
    assert made.loss_after < 0.8 * made.loss_before
    # A later run measures against the recovered weights' own dense twin, so measure against the old one here.
    for name, p in model.named_parameters():
        converted_layer = name.startswith(("mlp.", "mix."))
        trained = converted_layer and (rank is None or p.dim() == 2)
        assert torch.equal(p, before[name]) != trained, name
        assert p.stride() == strides[name] and id(p) == objects[name] and p.requires_grad and p.grad is None
    assert model.training and model.drop.training


def test_held_out_answers_come_nearer_to_those_of_the_dense_model():
    model = converted()
    dense = copy.deepcopy(model)
    for layer in selective_modules(dense).values():
        layer.selector.setting = 100
    held = torch.randint(VOCABULARY, (32, 8), generator=torch.Generator().manual_seed(9))

    def distance() -> float:
        with torch.no_grad():
            right, got = dense.eval()(held).logits.log_softmax(-1), model.eval()(held).logits.log_softmax(-1)
        return float(F.kl_div(got, right, log_target=True, reduction="sum")) / held.numel()

    before = distance()
    recover(model, windows(40), lr=3e-3, steps=120)
    assert distance() < 0.6 * before


@pytest.mark.parametrize("rank", [None, 2])
def test_a_converted_transformer_recovers(rank):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.model.layers.parameters():
        parameter.data *= 8
    convert_(model, Threshold(0.4), where="mlp")
    attention = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    ids = torch.randint(64, (12, 16))
    with torch.no_grad():
        model.eval()(ids[:1, :1])
    made = recover(model, {"input_ids": ids, "labels": ids}, rank=rank, lr=3e-3, steps=60)
    assert made.loss_after < 0.8 * made.loss_before
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, attention)
    # One token runs in the kernels: they must see the new weights, also what they keep of them.
    with torch.no_grad():
        kernels = model.eval()(ids[:1, :1]).logits
    torch.testing.assert_close(kernels, model(ids[:1, :1]).logits.detach(), rtol=1e-4, atol=1e-4)


def test_a_low_rank_run_moves_each_matrix_by_that_rank():
    model = converted()
    before = state(model)
    recover(model, windows(), rank=2, lr=1e-2, steps=10)
    for name in ("mlp.up.weight", "mlp.gate.weight", "mlp.down.weight", "mix.weight"):
        sizes = torch.linalg.svdvals((model.state_dict()[name] - before[name]).double())
        assert sizes[1] > 1e-5 and sizes[2] < 1e-3 * sizes[0], name
    assert torch.equal(model.state_dict()["mlp.down.bias"], before["mlp.down.bias"])


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("at", [1, 2, 8, 15])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, rank, at):
    options: dict[str, Any] = {"rank": rank, "lr": 3e-3, "steps": 15}
    whole = converted()
    expected = recover(whole, windows(6), **options)
    model = converted()
    before, counts = state(model), [layer.ran.clone() for layer in selective_modules(model).values()]
    hook = interrupt(model, at)
    with pytest.raises(KeyboardInterrupt):
        recover(model, windows(6), folder=tmp_path / "state", **options)
    hook.remove()
    assert same(state(model), before) and model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b.ran) for a, b in zip(counts, selective_modules(model).values(), strict=True))
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["recovery.safetensors"] * (at > 1)
    torch.manual_seed(99)
    made = recover(model, windows(6), folder=tmp_path / "state", **options)
    assert same(state(model), state(whole)) and made.losses == expected.losses and made.examples == expected.examples
    # A finished run only has to be merged; the model must not run again.
    fresh = converted()
    interrupt(fresh, 1)
    assert recover(fresh, windows(6), folder=tmp_path / "state", **options).losses == expected.losses
    assert same(state(fresh), state(whole))


def test_the_state_is_saved_while_it_runs(tmp_path, monkeypatch):
    saved = []
    # A package may export the function under its module's name.
    module = sys.modules["sparingly.recover"]
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(module, "save_state", lambda path, tensors, values: saved.append(values["step"]))
    clock = SimpleNamespace(monotonic=itertools.count(step=1e9).__next__, process_time=lambda: 0.0)
    monkeypatch.setattr(module, "time", clock)
    recover(converted(), windows(), steps=3, folder=tmp_path)
    # Saving takes 2 % of the time at most: each took a tick, so the next comes 50 ticks later; and at the end.
    assert saved == [1, 3]


def test_a_crash_while_saving_keeps_the_old_state(tmp_path, monkeypatch):
    model = converted()
    hook = interrupt(model, 4)
    with pytest.raises(KeyboardInterrupt):
        recover(model, windows(), steps=6, folder=tmp_path)
    hook.remove()
    kept = (tmp_path / "recovery.safetensors").read_bytes()

    def fail(*_arguments: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sparingly.store.os.replace", fail)
        with pytest.raises(OSError, match="no space"):
            recover(model, windows(), steps=6, folder=tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [kept]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated or damaged"),
        (lambda path: path.write_bytes(b"junk"), "truncated or damaged"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"sparingly recovery", b"sparingly recoverz")),
            "reads",
        ),
        ({"lr": 1e-3}, "lr=0.003, got lr=0.001"),
        ({"rank": None}, "rank=16, got rank=None"),
        ({"steps": 7}, "steps=6, got steps=7"),
        ({"batches": windows(5)}, "batches are not those"),
        ({"model": converted(keep=30)}, "selectors"),
        ({"model": 1}, "weights are not those"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, change, match):
    call: dict[str, Any] = {"model": converted(), "batches": windows(6), "lr": 3e-3, "steps": 6, "folder": tmp_path}
    hook = interrupt(call["model"], 3)
    with pytest.raises(KeyboardInterrupt):
        recover(**call)
    hook.remove()
    if callable(change):
        change(tmp_path / "recovery.safetensors")
    elif change == {"model": 1}:
        call["model"].mlp.up.weight.data[0, 0] += 1
    else:
        call |= change
    before = state(call["model"])
    with pytest.raises(ValueError, match=match):
        recover(**call)
    assert same(state(call["model"]), before)


@pytest.mark.parametrize("rank", [None, 2])
def test_nan_is_refused_with_the_batchs_number_and_costs_nothing(tmp_path, rank):
    model, good = converted(), [{"input_ids": ids} for ids in windows(4)]
    bad = [*good[:2], good[2] | {"fill": float("nan")}, good[3]]
    before = state(model)
    with pytest.raises(ValueError, match="nan of batch 2 of 4"):
        recover(model, bad, rank=rank, steps=4, folder=tmp_path)
    assert same(state(model), before) and model.training
    # Weights and moments of the steps before it are kept: the same call fails at once and changes nothing.
    kept = [path.read_bytes() for path in tmp_path.iterdir()]
    with pytest.raises(ValueError, match="nan of batch 2 of 4"):
        recover(model, bad, rank=rank, steps=4, folder=tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == kept
    # The same when the loss is finite and only a gradient is not.
    handle = model.head.register_forward_hook(_spoil_gradient)
    with pytest.raises(ValueError, match="gradient's norm is nan of batch"):
        recover(model, good, rank=rank, steps=4)
    handle.remove()
    assert same(state(model), before)


def _spoil_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * float("nan"))


def test_padding_counts_nothing():
    given, wanted = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with torch.no_grad():
        given[mask == 0] = float("nan")
    weights = token_weights({"attention_mask": mask}, given.shape[:-1], given.device)
    loss = divergence(given, wanted, True, weights)
    loss.backward()
    assert given.grad is not None and bool((given.grad[mask == 0] == 0).all())
    kept = given.detach()[mask == 1].double().requires_grad_()
    right = wanted[mask == 1].double().log_softmax(-1)
    expected = F.kl_div(kept.log_softmax(-1), right, log_target=True, reduction="batchmean")
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(given.grad[mask == 1].double(), kept.grad, rtol=1e-5, atol=1e-8)
    squared = divergence(given, wanted, False, weights)
    expected = (kept - wanted[mask == 1]).square().mean() / wanted[mask == 1].square().mean()
    torch.testing.assert_close(squared.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"minutes": 1, "steps": 1}, "minutes or steps, not both"),
        ({"rank": 0}, "rank must be"),
        ({"rank": 2.5}, "rank must be"),
        ({"steps": True}, "steps must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"minutes": -1}, "minutes must be"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        recover(converted(), windows(), **options)


def test_the_weights_from_before_come_back_bit_for_bit():
    model = converted()
    before = state(model)
    made = recover(model, windows(), steps=3)
    twin = copy.deepcopy(model)
    made.undo_(twin)
    assert same(state(twin), before) and not same(state(model), before)
    for name, layer in selective_modules(twin).items():
        setattr(twin, name, layer.dense())
    recovered = copy.deepcopy(model)
    for name, layer in selective_modules(recovered).items():
        setattr(recovered, name, layer.dense())
    made.undo_(recovered)
    assert same(state(recovered), state(twin))
    with pytest.raises(ValueError, match="the model has no m"):
        made.undo_(nn.Linear(2, 2))


@pytest.mark.parametrize("how", ["off", "all"])
def test_nothing_to_recover_is_said(how):
    model = converted()
    for layer in selective_modules(model).values():
        if how == "off":
            layer.off = True
        else:
            layer.selector.setting = 100
    with pytest.raises(ValueError, match="nothing is left out"):
        recover(model, windows(), steps=2)


def test_a_model_that_is_not_converted_and_empty_data_are_refused():
    with pytest.raises(ValueError, match="convert_ first"):
        recover(TinyLM(), windows(), steps=1)
    with pytest.raises(ValueError, match="empty"):
        recover(converted(), [], steps=1)


def test_weights_that_another_layer_uses_too_are_not_trained():
    model: Any = converted()
    model.twin = nn.Linear(WIDTH, WIDTH)
    model.twin.weight = model.mix.weight
    before = model.mix.weight.detach().clone()
    recover(model, windows(), steps=2)
    assert torch.equal(model.mix.weight, before)


def test_minutes_are_processor_minutes():
    made = recover(converted(), windows(), minutes=0.005)
    assert 0.3 <= made.cpu_s < 30 and made.steps >= 1


def test_a_data_set_is_cut_and_labels_do_not_reach_the_model():
    ids = torch.randint(VOCABULARY, (7, 8))
    made = recover(converted(), {"input_ids": ids, "labels": ids}, steps=4)
    assert made.examples == 7
    assert recover(converted(), [(ids, ids)], steps=1).examples == 7


def test_no_gain_is_said():
    with pytest.warns(UserWarning, match="nothing was won"):
        recover(converted(), windows(), rank=None, lr=30.0, steps=10)


def test_bfloat16_weights_are_trained_in_float32(tmp_path):
    model = converted().to(torch.bfloat16)
    made = recover(model, windows(), lr=3e-3, steps=80)
    assert model.mlp.up.weight.dtype == torch.bfloat16
    assert made.loss_after < 0.8 * made.loss_before
