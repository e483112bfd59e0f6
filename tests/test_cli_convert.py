"""``sparingly convert``, ``explain`` and ``compare`` as a user runs them, on tiny networks."""

from __future__ import annotations

import importlib
import json
import os
import random
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import sparingly as sp
from sparingly import _cli_sources
from sparingly.cli import app
from sparingly.convert import CONTRACT
from sparingly.nn.selective import selective_modules

runner = CliRunner()
WORDS = [f"w{number}" for number in range(60)]

NETWORK = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(8, 5))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 40), nn.GELU(), nn.Linear(40, 8)

    def forward(self, x):
        return self.down(self.act(self.up(x)))

number = lambda: 3

def fails():
    raise KeyError("no such layer")
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder of transformers: a random network of 60 words, and a tokenizer that cuts at spaces."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llama")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", "<s>", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="[UNK]")
    fast.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=62,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.md"
    file.write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    return file


@pytest.fixture
def network(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    name = f"network_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(NETWORK)
    return f"{name}:make"


def examples(tmp_path: Path) -> Path:
    file = tmp_path / "examples.pt"
    torch.save((torch.randn(200, 8), torch.randint(0, 5, (200,))), file)
    return file


def run(*arguments: object):
    return runner.invoke(app, [str(argument) for argument in arguments])


def one_line(result, *words: str) -> None:
    """A user's mistake: exit code 2 and one line that says what is wrong."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("sparingly: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), result.stderr
    assert "Traceback" not in result.output


def test_a_folder_of_transformers_is_converted_explained_and_compared(llama, text, tmp_path, monkeypatch):
    out = tmp_path / "made" / "out"
    result = run("convert", llama, "--data", text, "--max-drop", "50%", "--out", out, "--where", "mlp")
    assert result.exit_code == 0, result.output
    assert "1 layers are selective" in result.stdout and "a drop of at most 0.5 at 95 % confidence" in result.stdout
    assert os.listdir(out.parent) == ["out"] and (out / "tokenizer.json").exists()
    model = sp.load(out)
    contract = getattr(model, CONTRACT)
    assert (contract.max_drop, contract.confidence, contract.metric) == (0.5, 0.95, "perplexity")
    assert list(selective_modules(model)) == ["model.layers.0.mlp"]
    # 2,000 words make 285 windows of 8 tokens; 200 are taken, in batches of four, 13 of which only fit.
    assert contract.n == 200 - 13 * 4

    shown = run("explain", out)
    assert shown.exit_code == 0, shown.output
    assert "model.layers.0.mlp" in shown.stdout and "Threshold" in shown.stdout and "gated_rows" in shown.stdout

    seen = []
    monkeypatch.setattr(
        importlib.import_module("sparingly.compare"), "compare", lambda *args: seen.append(args) or "compared"
    )
    result = run("compare", out, "--data", text, "--windows", 20)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "compared"
    ((model, windows),) = seen
    assert list(selective_modules(model)) == ["model.layers.0.mlp"]
    assert windows.shape == (20, 8) and windows[:, 0].tolist() == [1] * 20


def test_a_module_path_needs_tensors_and_comes_back_with_into(network, tmp_path):
    out = tmp_path / "out"
    data = examples(tmp_path)
    result = run(
        "convert", network, "--data", data, "--metric", "accuracy", "--max-drop", 0.9, "--out", out, "--rows", "int8"
    )
    assert result.exit_code == 0, result.output
    one_line(run("explain", out), "no class of transformers")
    result = run("explain", out, "--into", network)
    assert result.exit_code == 0, result.output
    assert "accuracy: a drop of at most 0.9" in " ".join(result.stdout.split()) and "int8" in result.stdout
    text = tmp_path / "some.txt"
    text.write_text("words")
    one_line(run("convert", network, "--data", text, "--out", tmp_path / "more"), "no tokenizer")


@pytest.mark.parametrize("kind", ["pt", "list.pt", "npy", "safetensors"])
def test_every_kind_of_tensor_file_is_read(kind, tmp_path):
    file, net = tmp_path / f"data.{kind}", nn.Linear(2, 2)
    inputs, targets = torch.arange(20.0).view(10, 2), torch.arange(10)
    if kind == "npy":
        numpy.save(file, inputs.numpy())
        assert torch.equal(_cli_sources.read_data(file, net, None, 4), inputs[[0, 3, 6, 9]])
        return
    if kind == "safetensors":
        save_file({"inputs": inputs, "targets": targets}, file)
    else:
        torch.save((inputs, targets) if kind == "pt" else [inputs, targets], file)
    got = _cli_sources.read_data(file, net, None, 4)
    assert isinstance(got, tuple)
    assert torch.equal(got[0], inputs[[0, 3, 6, 9]]) and got[1].tolist() == [0, 3, 6, 9]


def test_mistakes_are_one_line_and_write_nothing(llama, text, network, tmp_path):
    out = tmp_path / "out"
    base = ("--data", text, "--out", out)
    one_line(run("convert", tmp_path / "none", *base), "there is no", "none")
    one_line(run("convert", tmp_path, *base), "must hold a config.json of transformers or one .gguf file")
    one_line(run("convert", llama, *base, "--max-drop", "little"), "--max-drop must be a share")
    one_line(run("convert", llama, *base, "--max-drop", "-1%"), "max_drop must be more than 0, got -0.01")
    one_line(run("convert", llama, *base, "--confidence", "95"), "confidence must be between 0 and 1")
    one_line(run("convert", llama, *base, "--metric", "beauty"), "metric must be one of perplexity")
    one_line(run("convert", llama, *base, "--where", "nowhere"), "where must be one of", "'nowhere'")
    one_line(run("convert", llama, *base, "--rows", "int4"), "rows must be None", "'int4'")
    one_line(run("convert", llama, "--data", tmp_path / "no.txt", "--out", out), "there is no file")
    one_line(run("convert", llama, "--data", llama / "config.json", "--out", out), "data must be a file ending in .txt")
    one_line(run("convert", network.replace("make", "number"), *base), "must return a torch.nn.Module, got int")
    one_line(run("convert", network.replace("make", "fails"), *base), "raised KeyError: 'no such layer'")
    one_line(run("convert", "no_such_module:make", *base), "ModuleNotFoundError")
    text.write_text("w1 w2 w3")
    one_line(run("convert", llama, *base), "has 3 tokens; at least 14 are needed")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"PK")
    one_line(run("convert", llama, "--data", broken, "--out", out), "cannot be read")
    assert not out.exists()
    one_line(run("explain", tmp_path / "none"), "none")
    one_line(run("explain", llama), "no converted model")


def test_a_folder_with_other_things_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    one_line(run("convert", "nothing", "--data", "nothing", "--out", tmp_path), "holds other things")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_converted_folder_is_not_converted_again(tmp_path):
    (tmp_path / "sparingly.json").write_text(json.dumps({}))
    one_line(run("convert", tmp_path, "--data", "x", "--out", tmp_path / "out"), "converted already")


@pytest.mark.parametrize("step", ["sparingly.calibrate.calibrate", "sparingly._folder._take_place"])
def test_ctrl_c_leaves_nothing_behind(step, network, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    module, _, name = step.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, interrupt)
    data, parent = examples(tmp_path), tmp_path / "parent"
    parent.mkdir()
    options = ("--data", data, "--metric", "accuracy", "--max-drop", "90%", "--out", parent / "out")
    result = run("convert", network, *options)
    assert result.exit_code == 130, result.output
    assert "sparingly: interrupted, nothing was written" in result.stderr
    assert os.listdir(parent) == []
