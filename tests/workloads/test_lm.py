"""The decoder, its engines and the whole workload on made-up text; counts, not times."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparingly as sp
from sparingly.workloads import _parts, lm, lm_data
from sparingly.workloads._lm_model import CONTEXT, Compiled, Decoder, Modules, NgramBank, Onnx, Shape
from sparingly.workloads._trained import dense_ffn


def nothing(what: str, part: float | None) -> None:
    pass


def product_keys(width: int) -> sp.SelectiveFFN:
    return sp.SelectiveFFN(width, 64, selector=sp.ProductKey(heads=2, k=4, key_dim=8))


SHAPES = {
    "dense": Shape(32, 2, partial(dense_ffn, units=48)),
    "selective": Shape(64, 1, product_keys, (2, 3, 5), bits=6),
    "no feed-forward": Shape(32, 1, None, (2,), bits=6),
    "no attention": Shape(32, 0, None, (2, 4), bits=6),
}


def decoder(shape: Shape) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(shape).eval()
    if model.bank is not None:
        torch.nn.init.normal_(model.bank.bag.weight)
    return model


def text(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, CONTEXT), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", [Modules, Onnx, Compiled])
def test_every_engine_decodes_what_the_network_says(name: str, kind: Any):
    model = decoder(SHAPES[name])
    if kind is Onnx:
        pytest.importorskip("onnxruntime")
        if name != "dense":
            pytest.skip("dense networks only")
    with torch.no_grad():
        wanted = model(text(1))[0]
    engine = kind(model)
    for _ in range(2):
        engine.begin()
        for place, byte in enumerate(text(1)[0, :40].tolist()):
            scores = torch.as_tensor(engine.step(byte))
            torch.testing.assert_close(scores, wanted[place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_no_byte_is_told_in_advance(name: str):
    model, one = decoder(SHAPES[name]), text(1)
    other = one.clone()
    other[0, 20] ^= 1
    with torch.no_grad():
        changed = (model(one) != model(other)).any(dim=2)[0]
    assert not changed[:20].any() and changed[20]


def test_a_compiled_step_reads_its_own_parameters_and_refuses_bad_bytes():
    model = decoder(SHAPES["selective"])
    engine = Compiled(model)
    before = engine.step(7).copy()
    with torch.no_grad():
        model.embedding.weight[7] += 1.0
    engine.begin()
    assert not np.allclose(engine.step(7), before)
    with pytest.raises(ValueError, match=r"0\.\.255"):
        engine.step(256)
    engine.begin()
    for _ in range(CONTEXT):
        engine.step(1)
    with pytest.raises(ValueError, match=f"{CONTEXT} places"):
        engine.step(1)
    with pytest.raises(ValueError, match="at most"):
        model(torch.zeros(1, CONTEXT + 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiple"):
        Decoder(Shape(width=40))


def test_a_row_of_the_bank_is_named_by_the_last_bytes_and_nothing_else():
    bank = NgramBank(8, (2, 3), bits=10)
    given = torch.tensor([list(b"abcxabcyabc")], dtype=torch.uint8)
    ids = bank.names(given)
    assert ids.shape == (11, 2)
    assert (ids[0] == -1).all() and ids[1, 1] == -1 and (ids[2:] >= 0).all()
    assert torch.equal(ids[2], ids[6]) and torch.equal(ids[2], ids[10])
    assert ids[1, 0] == ids[5, 0] and ids[3, 0] != ids[7, 0]
    # Each order has rows of its own; a window's place does not matter, nor how it is cut.
    assert (ids[2:, 0] < 1024).all() and (ids[2:, 1] >= 1024).all()
    assert torch.equal(bank.names(given, 9), ids[9:])
    assert torch.equal(bank.names(given.repeat(2, 1))[11:], ids)


def test_training_touches_only_the_rows_that_the_text_names():
    model = decoder(SHAPES["no feed-forward"])
    assert model.bank is not None
    some = text(1)[:, :6]
    lm._loss(model, some).backward()
    grad = model.bank.bag.weight.grad
    assert grad is not None and grad.is_sparse
    named = model.bank.names(some[:, :-1]).unique()
    assert set(grad.coalesce().indices()[0].tolist()) == set(named[named >= 0].tolist())


def test_counts_are_chances_that_add_up_to_one():
    rng = np.random.default_rng(0)
    given = rng.integers(97, 101, 400).astype(np.uint8)
    counts = lm_data.Counts(given, order=3)
    windows = np.tile(given[:9], (256, 1))
    windows[:, -1] = np.arange(256)
    bits = counts.bits(windows)
    assert bits.shape == (256, 8)
    assert (2.0 ** -bits[:, -1]).sum() == pytest.approx(1.0)
    # By hand: after one byte, order 0 and 1 only.
    one = lm_data.Counts(np.frombuffer(b"abab", np.uint8), order=1)
    order0 = (2 + 2 / 256) / (4 + 2)
    chance = (2 + 1 * order0) / (2 + 1)
    assert one.bits(np.frombuffer(b"ab", np.uint8)[None])[0, 0] == pytest.approx(-math.log2(chance))
    with pytest.raises(ValueError, match=r"0\.\.7"):
        lm_data.Counts(given, order=8)


class MadeUp(lm_data.Corpus):
    """Words of a small language."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        words = [bytes(rng.integers(97, 110, 4).astype(np.uint8)) for _ in range(40)]
        joined = {part: b" ".join(words[i] for i in rng.integers(0, 40, 8_000)) for part in lm_data.PARTS}
        self.parts = {part: torch.frombuffer(bytearray(one), dtype=torch.uint8) for part, one in joined.items()}
        self.sha256, self.frozen = {"made up": "0"}, False


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> lm.Mode:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_parts, "source_mark", lambda: "these sources")
    for name, value in (("Corpus", MadeUp), ("CONTEXT", 8), ("UNITS", 64)):
        monkeypatch.setattr(lm, name, value)
    small = {name: replace(one, shape=replace(one.shape, bits=8), batch=2) for name, one in lm.NETWORKS.items()}
    small["twin"] = replace(small["twin"], shape=replace(small["selective"].shape, ffn=partial(dense_ffn, units=64)))
    monkeypatch.setattr(lm, "NETWORKS", small)
    monkeypatch.setattr(lm.Lm, "step_costs", lambda self: dict.fromkeys(self.names, 1e-2))
    return lm.Mode("tiny", 0.1, 0.05, 8, 5, 1_000, (2,), lm.SHORT, ("dense_32", "dense_64"))


def test_the_whole_run_has_the_shape_of_the_others(tiny: lm.Mode):
    entry = lm.bench(tiny, nothing)["workloads"]["lm"]
    quality = entry["quality"]
    assert quality["n"] == 8 and quality["lower_is_better"] and quality["unit"] == "bits per byte"
    for name in ("selective", "dense", "dense_same_capacity", "dense_equal_cost"):
        row = quality[name]
        assert row["lo"] <= row["value"] <= row["hi"] < 8 and row["cpu_s"] > 0 and row["training_cpu_s"] > 0
    gap = quality["differences"]["dense"]["value"]
    assert gap == pytest.approx(quality["selective"]["value"] - quality["dense"]["value"])
    assert entry["equal_training"]["lower_by"] == pytest.approx(-gap / quality["dense"]["value"])
    assert {*entry["others"]} == {"bank_no_attention", "dense_bank"}
    for cost in (entry["training"], *entry["inference"].values()):
        assert {*cost["saving"]} == {"cpu_s", "macs", "bytes"} and cost["saving"]["macs"] > 1
    sweep = entry["equal_quality"]["sweep"]
    assert [row["name"] for row in sweep] == ["dense_32", "dense_64"]
    assert sweep[0]["macs"] < sweep[1]["macs"] and all(row["batch_1"]["value"] > 0 for row in sweep)
    assert entry["equal_cost"]["dense"] in ("dense_32", "dense_64")
    if entry["as_good"]:
        assert entry["as_good"]["dense"] in ("dense_32", "dense_64") and entry["as_good"]["saving"]["macs"] > 0
    assert {*entry["at_length"]["networks"]} == {"dense_64", "selective", "dense_bank"}
    # What is finished is not done again.
    run: Any = lm.Lm(tiny, nothing)
    run.quality = run.counts = run.decoding = run.compared = lambda *_: pytest.fail("done again")
    assert run.run() == entry


def test_missing_documents_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(lm, "Corpus", partial(lm_data.Corpus, tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install anarchism linux-doc"):
        lm.bench(lm.MODES["quick"], nothing)


def test_the_parts_of_the_text_are_of_different_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for folder, end in (("anarchism/markdown", "md"), ("linux-doc-6.1/Documentation", "rst")):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(40):
            (tmp_path / folder / f"file{i}.{end}").write_text(f"{end} {i:04} " * 700)
    with pytest.warns(UserWarning, match="not comparable"):
        corpus = lm_data.Corpus(tmp_path)
    assert not corpus.frozen
    numbers = [{*bytes(corpus.parts[part].numpy()).decode().split(" ")} for part in lm_data.PARTS]
    words = [{w for w in found if w.isdigit()} for found in numbers]
    assert all(words)
    sizes = {part: len(one) for part, one in corpus.parts.items()}
    assert sizes["train"] > sizes["test"] > sizes["dev"]
    windows = corpus.windows("test", 4, 100)
    assert windows.shape == (4, 100) and windows.dtype == torch.uint8
    with pytest.raises(ValueError, match="asked for"):
        corpus.windows("dev", 10**6, 100)
    drawn = corpus.sample(3, 50, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, corpus.sample(3, 50, torch.Generator().manual_seed(1)))
