"""The file: whole or the old one, the same answers after loading, and nothing foreign."""

import json
import os
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import sparingly as sp
from sparingly import store

WIDTH, CLASSES = 8, 120


def trained(selector=None, **options) -> sp.SelectiveHead:
    head = sp.SelectiveHead(WIDTH, CLASSES, selector=selector or sp.Random(CLASSES), **options)
    optimizer = sp.optimizer(head)
    head.loss(torch.randn(8, WIDTH), torch.randint(CLASSES, (8,))).backward()
    optimizer.step()
    head.refresh()
    return head


@pytest.fixture
def hidden():
    return torch.randn(5, WIDTH)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_head_answers_alike_without_a_refresh(hidden, path, dtype, bias):
    head = trained(bias=bias, negatives=33).to(dtype)
    head.selector.setting = 3
    sp.save(head, path)
    twin = sp.load(path)
    assert torch.equal(twin.topk(hidden, 4)[1], head.topk(hidden, 4)[1])
    assert twin.fallbacks == {}
    assert (twin.negatives, twin.selector.setting, twin.selector.budget, twin.weight.dtype) == (33, 3, CLASSES, dtype)
    assert type(twin.selector) is sp.Random and twin.training and twin.weight.requires_grad
    state = twin.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())
    twin.loss(hidden.to(dtype), torch.arange(5)).backward()


@pytest.mark.parametrize("name", ["Graph", "Partition"])
def test_the_selectors_state_is_in_the_file(name, path):
    torch.manual_seed(1)
    hidden = torch.randn(20, 16)
    head = sp.SelectiveHead(16, 3000, selector=getattr(sp, name)())
    head.refresh()
    sp.save(head, path)
    twin = sp.load(path)
    for one, other in zip(head.topk(hidden, 3), twin.topk(hidden, 3), strict=True):
        assert torch.equal(one, other)
    assert twin.fallbacks == head.fallbacks


def test_an_int8_head_stays_int8(hidden, path):
    head = trained().int8()
    sp.save(head, path)
    twin = sp.load(path)
    assert twin.weight.dtype == torch.int8
    assert torch.equal(twin(hidden), head(hidden))
    assert torch.equal(twin.topk(hidden, 4)[1], head.topk(hidden, 4)[1])
    with pytest.raises(RuntimeError, match="int8"):
        twin.loss(hidden, torch.arange(5))


def test_an_unfitted_or_exact_head_stays_so(hidden, path):
    head = sp.SelectiveHead(WIDTH, CLASSES, selector=sp.Random(5))
    head.exact = True
    sp.save(head, path)
    twin = sp.load(path)
    assert not twin.selector.fitted and twin.exact
    with pytest.warns(UserWarning, match="no setting"):
        twin.topk(hidden)


def model(classes=CLASSES, selector=None, tied=False) -> Any:
    made: Any = torch.nn.ModuleDict(
        {
            "bag": sp.SelectiveBag(30, WIDTH),
            "norm": torch.nn.BatchNorm1d(WIDTH),
            "head": sp.SelectiveHead(WIDTH, classes, selector=selector or sp.Dense()),
        }
    )
    if tied:
        made["out"] = made["head"].to_linear()
    return made


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_filled_and_its_selectors_replaced(hidden, path, tied):
    whole, other = model(selector=sp.Random(CLASSES), tied=tied), model(tied=tied)
    whole["head"].refresh()
    whole["norm"](hidden)
    sp.save(whole, path)
    assert sp.load(path, into=other) is other
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))
    assert torch.equal(whole["norm"].running_mean, other["norm"].running_mean)
    assert isinstance(other["head"].selector, sp.Random)
    assert torch.equal(whole["head"].topk(hidden, 3)[1], other["head"].topk(hidden, 3)[1])
    if tied:
        assert other["out"].weight is other["head"].weight
        size = sum(value.nbytes for value in {v.data_ptr(): v for v in whole.state_dict().values()}.values())
        assert path.stat().st_size < size + 4000


def test_a_model_without_its_modules_is_refused_with_what_is_missing(path):
    sp.save(model(), path)
    with pytest.raises(ValueError, match=r"'head'.*load\(path, into=model\)"):
        sp.load(path)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: model(classes=CLASSES + 1), r"head\.bias is torch.float32 \[120\], the model's torch.float32 \[121\]"),
        (lambda: model().to(torch.bfloat16), "float32"),
        (lambda: torch.nn.ModuleDict({"head": sp.SelectiveHead(WIDTH, CLASSES)}), "bag.weight is not in the model"),
        (lambda: model(tied=True), "out.weight is missing"),
        (lambda: torch.nn.Linear(3, 4), r"heads at \['head'\], the model at \[\]"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(path, other, match):
    sp.save(model(), path)
    into = other()
    before = {name: value.clone() for name, value in into.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        sp.load(path, into=into)
    assert all(torch.equal(value, into.state_dict()[name]) for name, value in before.items())


def _fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


def _half(tensors, name, metadata):
    with open(name, "wb") as file:
        file.write(b"half a file")
    _fail()


@pytest.mark.parametrize(
    ("where", "what", "how"),
    [(store, "save_file", _half), (store.os, "replace", _fail), (store.os, "fsync", _fail)],
)
def test_a_crash_while_saving_leaves_the_old_file_whole(hidden, path, monkeypatch, where, what, how):
    head = trained()
    sp.save(head, path)
    before = path.read_bytes()
    with torch.no_grad():
        head.weight.zero_()
    monkeypatch.setattr(where, what, how)
    with pytest.raises(OSError, match="No space"):
        sp.save(head, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    assert sp.load(path).weight.abs().sum() > 0


def test_saving_again_replaces_the_file_and_loaded_tensors_are_not_the_files(path):
    head = trained()
    sp.save(head, path)
    twin = sp.load(path)
    kept = twin.weight.detach().clone()
    with torch.no_grad():
        head.weight.zero_()
    sp.save(head, path)
    assert torch.equal(twin.weight, kept)
    assert sp.load(path).weight.abs().sum() == 0


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_truncated_file_is_refused(path, keep):
    sp.save(trained(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        sp.load(path)


def test_foreign_files_are_refused(path):
    path.write_text("not a model")
    with pytest.raises(ValueError, match="no safetensors file"):
        sp.load(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="no safetensors file"):
        sp.load(path)
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="format is 'pt'"):
        sp.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        sp.load(path.with_name("nothing"))


def rewrite(path, tensors=None, **changes):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(kept | (tensors or {}), path, metadata | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": "2"}, "version '2'; this Sparingly reads versions 1..1"),
        ({"version": "one"}, "version 'one'"),
        ({"heads": "{"}, "damaged metadata"),
        ({"aliases": '{"a": "nothing"}'}, "damaged metadata"),
        ({"heads": '{"": {}}'}, "damaged metadata"),
    ],
)
def test_other_versions_and_damaged_metadata_are_refused(path, changes, match):
    sp.save(trained(), path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=match):
        sp.load(path)


def test_a_selector_that_is_not_in_the_table_is_neither_saved_nor_loaded(path):
    class Own(sp.Random):
        pass

    with pytest.raises(ValueError, match="selector Own cannot be saved"):
        sp.save(trained(Own(3)), path)
    assert not path.exists()
    head = trained()
    sp.save(head, path)
    with safe_open(path, "pt") as file:
        heads = json.loads(file.metadata()["heads"])
    wrong = {"": heads[""] | {"selector_config": {"depth": 3}}}
    rewrite(path, heads=json.dumps(wrong))
    with pytest.raises(ValueError, match="Random takes other arguments"):
        sp.load(path)
    heads[""]["selector"] = "Popen"
    rewrite(path, heads=json.dumps(heads))
    with pytest.raises(ValueError, match="got 'Popen'"):
        sp.load(path)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"weight": torch.zeros(CLASSES, WIDTH + 1)}, "weight is torch.float32"),
        ({"bias": torch.zeros(CLASSES, dtype=torch.float64)}, "bias is torch.float64"),
        ({"selector.fitted_units": torch.tensor(7)}, "a selector for 7 units"),
        ({"selector.other": torch.tensor(7)}, "damaged selector"),
    ],
)
def test_tensors_of_another_shape_or_dtype_are_refused(path, tensors, match):
    sp.save(trained(), path)
    rewrite(path, tensors)
    with pytest.raises(ValueError, match=match):
        sp.load(path)


def test_views_of_one_storage_are_saved_as_their_own(path):
    module = torch.nn.Module()
    table = torch.arange(12.0)
    module.register_buffer("left", table[:6])
    module.register_buffer("right", table[3:9])
    sp.save(module, path)
    other: Any = torch.nn.Module()
    other.register_buffer("left", torch.zeros(6))
    other.register_buffer("right", torch.zeros(6))
    sp.load(path, into=other)
    assert other.right.tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
