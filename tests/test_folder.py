"""The folder of a converted model: the same model after loading, whole or the old one, and nothing foreign."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparingly as sp
from sparingly import _folder
from sparingly.calibrate import calibrate
from sparingly.convert import CONTRACT, convert_, restore_
from sparingly.nn.selective import selective_modules
from sparingly.selectors import SELECTORS, InputThreshold, LowRank, Screen, Threshold, Zeros

WIDTH = 16


class Net(nn.Module):
    """Two MLPs with one activation, and an output layer."""

    def __init__(self, activation: str = "module"):
        super().__init__()
        self.first = Block(activation)
        self.second = Block(activation)
        self.out = nn.Linear(WIDTH, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x)))


class Block(nn.Module):
    def __init__(self, activation: str):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        if activation == "module":
            self.act = nn.ELU(0.7)
        if activation == "attribute":
            self.act = lambda x: torch.relu(x) + 0.05 * x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return self.down(self.act(hidden) if hasattr(self, "act") else torch.relu(hidden))


def settled(activation: str = "module", selector=None) -> Net:
    """A converted network whose selectors are fitted and leave units out."""
    net = Net(activation).eval()
    convert_(net, selector or Threshold(), where="mlp")
    calibrate(net, torch.randn(60, 3, WIDTH), metric=lambda model, x: model(x).mean((1, 2)) * 0, max_drop=0.5)
    for layer in selective_modules(net).values():
        layer.selector.setting, layer.off = 50, False
    return net


def answers(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net(x)


@pytest.fixture
def x():
    return torch.randn(2, WIDTH)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def saved(path) -> Path:
    sp.save(settled(), path)
    return path


# Models of any class.


@pytest.mark.parametrize("activation", ["module", "attribute", "function"])
@pytest.mark.parametrize("selector", [Threshold(), LowRank(8), Zeros(), sp.Random(12)], ids=lambda s: type(s).__name__)
def test_a_loaded_network_answers_bit_for_bit_alike(activation, selector, path, x):
    net = settled(activation, selector)
    dense = answers(restore_twin(net), x)
    sp.save(net, path)
    twin = sp.load(path, into=Net(activation).eval())
    again = answers(twin, x)
    if not isinstance(selector, sp.Random):
        assert torch.equal(again, answers(net, x))
        assert torch.equal(answers(twin, torch.cat([x] * 5)), answers(net, torch.cat([x] * 5)))
    if isinstance(selector, (Threshold, LowRank)) and not isinstance(selector, Zeros):
        assert not torch.allclose(answers(twin, x), dense, atol=1e-4)  # units are left out
    for name, layer in selective_modules(net).items():
        other = selective_modules(twin)[name]
        assert type(other) is type(layer) and type(other.selector) is type(layer.selector)
        assert other.selector.fitted and other.selector.setting == layer.selector.setting
        assert other.selector.num_units == 40
        state = other.selector.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in layer.selector.state_dict().items())
        assert other.ran[0] > 0, "it ran selectively, not as the dense product"
    restore_(twin)
    assert type(twin.first) is Block
    assert torch.equal(answers(twin, x), dense)


def restore_twin(net: nn.Module) -> nn.Module:
    twin = copy.deepcopy(net)
    restore_(twin)
    return twin


def test_the_contract_and_the_switch_come_back(path):
    net = settled()
    selective_modules(net)["second"].off = True
    sp.save(net, path)
    twin = sp.load(path, into=Net())
    assert getattr(twin, CONTRACT) == getattr(net, CONTRACT)
    assert [layer.off for layer in selective_modules(twin).values()] == [False, True]


def test_int8_rows_come_back_and_version_1_had_none(path, x):
    net = settled()
    selective_modules(net)["second"].rows = "int8"
    sp.save(net, path)
    twin = sp.load(path, into=Net().eval())
    assert [layer.rows for layer in selective_modules(twin).values()] == [None, "int8"]
    assert torch.equal(answers(twin, x), answers(net, x))
    layers = json.loads((path / "sparingly.json").read_text())["layers"]
    edit(path, version=1, layers=[{key: value for key, value in layer.items() if key != "rows"} for layer in layers])
    older = sp.load(path, into=Net().eval())
    assert [layer.rows for layer in selective_modules(older).values()] == [None, None]
    selective_modules(net)["second"].rows = None
    assert torch.equal(answers(older, x), answers(net, x))


def test_layers_inside_layers_and_a_screened_output_come_back(path, x):
    net = Net().eval()
    convert_(net, {"mlp": Threshold(0.3), "linear": InputThreshold(0.2), "head": Screen(4, 8)})
    calibrate(net, torch.randn(60, 3, WIDTH), metric=lambda model, x: model(x).mean((1, 2)) * 0, max_drop=0.5)
    selective_modules(net)["out"].selector.setting = 8
    selective_modules(net)["out"].off = False
    sp.save(net, path)
    twin = sp.load(path, into=Net().eval())
    assert list(selective_modules(twin)) == list(selective_modules(net))
    assert {"first", "first.up", "out"} <= set(selective_modules(twin))
    assert torch.equal(answers(twin, x), answers(net, x))
    assert restore_(twin)


def test_saving_does_not_touch_the_model(path, x):
    net = settled()
    before = {name: (value.clone(), value.stride()) for name, value in net.state_dict().items()}
    modules, want = list(net.modules()), answers(net, x)
    sp.save(net, path)
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name][0]) and value.stride() == before[name][1]
    assert torch.equal(answers(net, x), want)


def test_without_into_a_class_of_ones_own_is_refused(saved):
    with pytest.raises(ValueError, match=r"no class of transformers.*into=model"):
        sp.load(saved)


# Writing.


def test_a_newer_model_replaces_the_older_and_keeps_the_tokenizer(saved, x):
    (saved / "tokenizer.json").write_text("{}")
    net = settled(selector=LowRank(4))
    sp.save(net, saved)
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert torch.equal(answers(sp.load(saved, into=Net().eval()), x), answers(net, x))
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_whoever_may_read_ordinary_files_may_read_these(saved):
    (saved.parent / "ordinary").touch()
    ordinary = (saved.parent / "ordinary").stat().st_mode
    assert {file.stat().st_mode for file in saved.iterdir()} == {ordinary}


@pytest.mark.parametrize("step", ["save_file", "_write_config", "_take_place", "_sync"])
def test_a_crash_while_writing_leaves_the_older_folder(step, saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def crash(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(_folder, "is_transformers", lambda model: True)
    monkeypatch.setattr(_folder, "_write_config", lambda model, folder: None)
    monkeypatch.setattr(_folder, step, crash)
    with pytest.raises(KeyboardInterrupt):
        sp.save(settled(), saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_failed_rename_puts_the_older_folder_back(saved, monkeypatch):
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        sp.save(settled(), saved)
    assert len(calls) == 3 and os.listdir(saved.parent) == [saved.name]
    sp.load(saved, into=Net())


def test_after_a_crash_between_two_renames_the_older_one_loads_and_can_be_replaced(saved):
    (saved / "tokenizer.json").write_text("{}")
    os.rename(saved, saved.with_name(f".{saved.name}.old"))
    sp.load(saved, into=Net())
    sp.save(settled(), saved)
    assert (saved / "tokenizer.json").exists() and os.listdir(saved.parent) == [saved.name]


def test_other_things_are_never_overwritten(path):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="other things"):
        sp.save(settled(), path)
    assert [file.name for file in path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="is a file"):
        sp.save(settled(), path / "thesis.txt")
    assert (path / "thesis.txt").read_text() == "mine"


def test_what_cannot_be_saved_says_why(path, monkeypatch):
    net = settled()
    monkeypatch.delitem(SELECTORS, "Threshold")
    with pytest.raises(ValueError, match=r"selector Threshold cannot be saved.*SELECTORS"):
        sp.save(net, path)
    monkeypatch.undo()
    net.out.lora_A = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="adapters"):
        sp.save(net, path)
    assert not path.exists()


# Reading what is damaged.


def edit(folder: Path, **values) -> None:
    file = folder / "sparingly.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_layer(folder: Path, **values) -> None:
    layers = json.loads((folder / "sparingly.json").read_text())["layers"]
    edit(folder, layers=[layers[0] | values, *layers[1:]])


def cut(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["out.bias"] = weights["out.bias"] + 1
    save_file(weights, folder / "model.safetensors")


def other_mlp(folder: Path, **values) -> None:
    (layer, *_) = json.loads((folder / "sparingly.json").read_text())["layers"]
    edit_layer(folder, mlp=layer["mlp"] | values)


DAMAGE = {
    "weights cut": (lambda f: cut(f, "model.safetensors"), "truncated"),
    "selectors cut": (lambda f: cut(f, "selectors.safetensors"), "truncated"),
    "description cut": (lambda f: cut(f, "sparingly.json"), "truncated"),
    "weights gone": (lambda f: (f / "model.safetensors").unlink(), "not whole"),
    "description gone": (lambda f: (f / "sparingly.json").unlink(), "no converted model"),
    "foreign": (lambda f: edit(f, format="another"), "not one of Sparingly's"),
    "a list": (lambda f: (f / "sparingly.json").write_text("[]"), "not one of Sparingly's"),
    "newer": (lambda f: edit(f, version=3), "version 3; this Sparingly reads versions 1 to 2"),
    "other weights": (other_weights, "base model's hash differs"),
    "unknown key": (lambda f: edit(f, extra=1), r"unknown keys \['extra'\]"),
    "unknown key of a layer": (lambda f: edit_layer(f, extra=1), r"unknown keys \['extra'\]"),
    "wrong type": (lambda f: edit_layer(f, units="40"), "wrong type"),
    "unknown rows": (lambda f: edit_layer(f, rows="int4"), "rows must be None .* got 'int4'"),
    "unknown selector": (lambda f: edit_layer(f, selector="Oops"), "got 'Oops'.*SELECTORS"),
    "unknown option": (lambda f: edit_layer(f, config={"speed": 3}), "Threshold takes other arguments"),
    "bad setting": (lambda f: edit_layer(f, config={"setting": 500}), "other arguments: setting must be a percentage"),
    "no such layer": (lambda f: edit_layer(f, path="nowhere"), "nowhere"),
    "another size": (lambda f: edit_layer(f, units=41), "40 units in a layer of 41"),
    "unknown activation": (lambda f: other_mlp(f, activation="function:evil"), "unknown activation"),
    "another activation": (lambda f: other_mlp(f, activation="function:exp"), "does not compute what the saved one"),
    "contract": (lambda f: edit(f, contract={"metric": 1}), "contract: missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_and_the_model_left_alone(name, saved, x):
    damage, message = DAMAGE[name]
    damage(saved)
    net = Net().eval()
    before = {key: (value.clone(), value.stride()) for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        sp.load(saved, into=net)
    assert not selective_modules(net) and not hasattr(net, CONTRACT)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key][0]) and value.stride() == before[key][1]


def test_a_model_that_does_not_fit_is_left_alone(saved):
    net = Net()
    net.out = nn.Linear(WIDTH, 31)
    weight = net.first.up.weight.clone()
    with pytest.raises(ValueError, match=r"out.weight is torch.float32 \[30, 16\], the model's .* \[31, 16\]"):
        sp.load(saved, into=net)
    assert torch.equal(net.first.up.weight, weight) and not selective_modules(net)
    with pytest.raises(ValueError, match="does not compute what the saved one did"):
        sp.load(saved, into=Relu())
    tied = Net()
    tied.second.up.weight = tied.first.up.weight
    with pytest.raises(ValueError, match=r"second.up.weight is the same tensor as second.up.weight, the model's as fi"):
        sp.load(saved, into=tied)


class Relu(Net):
    """The same weights and modules, another forward."""

    def __init__(self):
        super().__init__()
        self.second.forward = lambda x: self.second.down(torch.relu(self.second.up(x)))


def test_a_converted_model_is_not_filled(saved):
    with pytest.raises(ValueError, match=r"selective already.*restore_"):
        sp.load(saved, into=sp.load(saved, into=Net()))
    with pytest.raises(FileNotFoundError):
        sp.load(saved.with_name("none"), into=Net())


# Models of transformers.


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def llama(transformers, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


@pytest.fixture(scope="module")
def calibrated(transformers):
    model = llama(transformers)
    convert_(model, {"mlp": Threshold(), "linear": InputThreshold(), "head": Screen(8, 32)})
    calibrate(model, torch.randint(0, 160, (120, 8)), max_drop=0.5)
    return model


IDS = torch.arange(18).view(2, 9)


def test_a_language_model_comes_back_whole(calibrated, transformers, path):
    config = calibrated.config.to_dict()
    sp.save(calibrated, path)
    assert calibrated.config.to_dict() == config
    model = sp.load(path)
    assert type(model) is transformers.LlamaForCausalLM and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :1]):
            assert torch.equal(model(ids).logits, calibrated(ids).logits)
    assert getattr(model, CONTRACT) == getattr(calibrated, CONTRACT)
    layers, twins = selective_modules(calibrated), selective_modules(model)
    assert list(layers) == list(twins) and len(layers) == 13
    assert [x.selector.setting for x in layers.values()] == [x.selector.setting for x in twins.values()]
    assert len({layer.selector.setting for layer in layers.values()}) > 1
    given = [m.generate(IDS[:1], max_new_tokens=5, do_sample=False) for m in (model, calibrated)]
    assert torch.equal(*given)
    restore_(model)
    fresh = llama(transformers)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, fresh(IDS).logits)


def test_transformers_reads_the_folder_as_the_dense_network(calibrated, transformers, path):
    sp.save(calibrated, path)
    dense = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        assert torch.equal(dense(IDS).logits, llama(transformers)(IDS).logits)


def test_half_precision_and_mixed_precision_come_back(transformers, path):
    model = llama(transformers, torch.bfloat16)
    model.model.norm.float()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().float())
    model.config.tie_word_embeddings = False
    convert_(model, Threshold(0.01), where="mlp")
    sp.save(model, path)
    twin = sp.load(path)
    assert {n: p.dtype for n, p in twin.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert {n: b.dtype for n, b in twin.named_buffers()} == {n: b.dtype for n, b in model.named_buffers()}
    with torch.no_grad():
        hidden, other = (m.model(IDS[:1, :3]).last_hidden_state for m in (model, twin))
    assert torch.equal(hidden, other)


def test_experts_in_one_weight_come_back(transformers, path):
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    convert_(model, InputThreshold(0.1), where="attention")
    sp.save(model, path)
    with torch.no_grad():
        assert torch.equal(sp.load(path)(IDS[:1, :1]).logits, model(IDS[:1, :1]).logits)


def test_what_a_gguf_leaves_behind_is_not_written(transformers, path):
    model = llama(transformers)
    model.config.quantization_config = {"quant_method": "gguf"}
    convert_(model, Threshold(0.01), where="mlp")
    sp.save(model, path)
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert model.config.quantization_config == {"quant_method": "gguf"}
    sp.load(path)


@pytest.mark.parametrize("name", ["AutoTokenizer", "NoSuchModel", "LlamaConfig"])
def test_only_models_of_transformers_are_built(calibrated, path, name):
    sp.save(calibrated, path)
    edit(path, **{"class": {"module": "transformers.models.llama", "name": name}})
    with pytest.raises(ValueError, match=f"no model {name}"):
        sp.load(path)
    edit(path, **{"class": {"module": "os", "name": "system"}})
    with pytest.raises(ValueError, match=r"os.system, which is no class of transformers"):
        sp.load(path)


def test_a_folder_without_its_configuration_is_not_whole(calibrated, path):
    sp.save(calibrated, path)
    (path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config.json"):
        sp.load(path)
    shutil.rmtree(path)
