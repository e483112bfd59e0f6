"""Encoders give what transformers gives, dense and with layers that skip; the kernel reads what was kept."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparingly.calibrate import fit_selectors
from sparingly.convert import convert_
from sparingly.energy import count
from sparingly.nn.linear import SelectiveInputs, SelectiveLinear
from sparingly.nn.selective import dense_answers, selective_modules
from sparingly.selectors import InputThreshold, Threshold
from sparingly.workloads._encoders import Kept, Modules, Onnx, Slim

transformers = pytest.importorskip("transformers")


def network(activation: str = "gelu") -> Any:
    """A tiny random BERT with weights large enough that every part of it shows."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "vocab_size": 90}
    config = transformers.BertConfig(
        **sizes, num_attention_heads=4, max_position_embeddings=32, hidden_act=activation, initializer_range=0.3
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or "bias" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


def ids(batch: int = 3, tokens: int = 7) -> Tensor:
    return torch.randint(0, 90, (batch, tokens), generator=torch.Generator().manual_seed(1))


def selective(setting: int = 40) -> Any:
    model = network()
    convert_(model, Threshold(), where="mlp")
    fit_selectors(model, [ids(), ids(2, 9)])
    for layer in selective_modules(model).values():
        layer.selector.setting = setting
    return model


def layer_of(n: int, d: int, setting: int | None = 40, bias: bool = True) -> SelectiveInputs:
    torch.manual_seed(n)
    layer = SelectiveLinear.from_dense(nn.Linear(n, d, bias=bias), InputThreshold())
    layer.selector.fit(layer.weight.t(), None, torch.randn(64, n) + 0.5)
    if setting is not None:
        layer.selector.setting = setting
    return layer


def reference(layer: SelectiveInputs, x: Tensor) -> Tensor:
    values = layer.selector.masked(x).double()
    out = values @ layer.weight.detach().double().t()
    return out if layer.bias is None else out + layer.bias.detach().double()


def error(found: Any, wanted: Tensor) -> float:
    return float((torch.as_tensor(found) - wanted).abs().max() / wanted.abs().max())


# Blocks of 64 units and tiles of 96 outputs: less than one, several, and what is left over.
@pytest.mark.parametrize(("n", "d"), [(8, 16), (200, 112), (64, 96), (136, 208)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_kept_rows_against_float64(n: int, d: int, tokens: int):
    layer = layer_of(n, d, bias=tokens > 1)
    kept, x = Kept(layer), torch.randn(tokens, n) + 0.5
    found = kept(x.numpy())
    assert error(found, reference(layer, x)) < 1e-6
    # One kept unit less would show.
    unit = int(layer.selector.keeps(x)[0].nonzero()[0])
    layer.selector.cut = layer.selector.cut.clone()
    layer.selector.cut[unit] = float("inf")
    assert error(found, reference(layer, x)) > 1e-4
    assert error(kept(x.numpy()), reference(layer, x)) < 1e-6


def test_kept_rows_count_what_ran_and_read_each_row_once():
    layer, x = layer_of(200, 112), torch.randn(6, 200) + 0.5
    keeps, kept = layer.selector.keeps(x), Kept(layer)
    kept(x.numpy())
    layer.reset()
    with count() as ledger:
        kept(x.numpy())
    assert layer.ran.tolist()[:2] == [6, int(keeps.sum())]
    assert ledger.macs == int(keeps.sum()) * 112
    vectors = 4 * (x.numel() + 6 * 112 + 2 * 200 + 112)
    assert ledger.bytes == int(keeps.any(0).sum()) * 112 * 4 + vectors


def test_nan_is_never_cut():
    layer, x = layer_of(64, 96), torch.zeros(2, 64)
    x[1, 9] = float("nan")
    found = Kept(layer)(x.numpy())
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


def test_an_unfitted_layer_and_one_that_is_off_run_every_row():
    layer, x = layer_of(64, 96), torch.randn(3, 64)
    wanted = torch.nn.functional.linear(x, layer.weight, layer.bias).detach().double()
    layer.off = True
    assert error(Kept(layer)(x.numpy()), wanted) < 1e-6
    fresh = SelectiveLinear.from_dense(nn.Linear(64, 96), InputThreshold())
    wanted = torch.nn.functional.linear(x, fresh.weight, fresh.bias).detach().double()
    assert error(Kept(fresh)(x.numpy()), wanted) < 1e-6


def test_sizes_and_dtypes_that_the_kernel_does_not_take():
    for n, d in ((12, 32), (16, 20)):
        with pytest.raises(ValueError, match="divisible"):
            Kept(SelectiveLinear.from_dense(nn.Linear(n, d), InputThreshold()))
    with pytest.raises(ValueError, match="float32"):
        Kept(SelectiveLinear.from_dense(nn.Linear(16, 32).bfloat16(), InputThreshold()))


@torch.no_grad()
def expected(model: Any, given: Tensor) -> Tensor:
    states = copy.deepcopy(model).double()(input_ids=given).last_hidden_state
    return nn.functional.normalize(states.mean(1), dim=1)


@pytest.mark.parametrize("kind", [Modules, Slim, Onnx])
def test_dense_engines_give_what_transformers_gives(kind: Any):
    pytest.importorskip("onnxruntime")
    model = network()
    engine = kind(model)
    for given in (ids(), ids(1, 1), ids(2, 20)):
        assert error(engine.embed(given), expected(model, given)) < 2e-6


@pytest.mark.parametrize("kind", [Slim, Onnx])
def test_selective_engines_give_what_the_modules_give(kind: Any):
    pytest.importorskip("onnxruntime")
    model = selective()
    engine, given = kind(model), ids(2, 6)
    wanted = Modules(model).embed(given).double()
    assert error(engine.embed(given), wanted) < 1e-5
    dense = expected(network(), given)
    assert error(wanted, dense) > 1e-3
    # Another setting, and none, are noticed.
    for layer in selective_modules(model).values():
        layer.selector.setting = 80
    assert error(engine.embed(given), Modules(model).embed(given).double()) < 1e-5
    with dense_answers(model):
        assert error(engine.embed(given), dense) < 2e-6


def test_a_sparser_setting_multiplies_less():
    given, macs = ids(2, 6), []
    model = selective(100)
    engine = Slim(model)
    layers = list(selective_modules(model).values())
    for setting in (100, 40):
        for layer in layers:
            layer.selector.setting = setting
        engine.embed(given)
        for layer in layers:
            layer.reset()
        with count() as ledger:
            engine.embed(given)
        macs.append(ledger.macs)
        ran = sum(int(layer.ran[1]) for layer in layers)
        if setting == 100:
            assert ran == 2 * 72 * given.numel()
    assert macs[0] - macs[1] == (2 * 72 * given.numel() - ran) * 32


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="BERT networks with gelu"):
        Slim(network("relu"))
