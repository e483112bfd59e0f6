"""Words before an encoder with exits, on made-up packages and a tiny random BERT; MiniLM itself is not needed."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sparingly as sp
from sparingly.nn.cascade import Cascade
from sparingly.workloads import _topic_models as models
from sparingly.workloads import topic
from sparingly.workloads.topic_data import Package, Topics, read_index

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
sklearn = pytest.importorskip("sklearn.linear_model")

SECTIONS = ("admin", "games", "libs")
WORDS = {"admin": "daemon server host", "games": "play puzzle level", "libs": "shared runtime header"}


def package(number: int) -> Package:
    """A few words of its section among others; in one of five the section's words are missing."""
    rng = np.random.default_rng(number)
    section = SECTIONS[number % 3]
    own = WORDS[section].split() if number % 5 else ["thing"]
    text = [*rng.choice(own, 2), *rng.choice([f"w{i}" for i in range(30)], 3 + number % 4)]
    return Package(f"s{number}", section, " ".join(map(str, text[:3])), " ".join(map(str, text[3:])))


class Tokenizer:
    """A number for each word."""

    def encode_batch(self, texts: list[str]) -> list[Any]:
        return [SimpleNamespace(ids=[1 + sum(word.encode()) % 60 for word in text.split()]) for text in texts]


def encoder() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "vocab_size": 64}
    torch.manual_seed(0)
    return transformers.BertModel(
        transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, initializer_range=0.2)
    ).eval()


def with_exits(packages: list[Package]) -> Any:
    net = models.Reader(encoder(), models.Tokens(Tokenizer()), 3).eval()
    model = sp.add_exits_(net, at=topic.AT, measure="margin")
    sp.train_exits(model, [(packages, torch.zeros(len(packages)))], lr=1e-2)
    return model


@pytest.fixture(scope="module")
def many() -> list[Package]:
    return [package(number) for number in range(1500)]


def test_own_answers_of_the_linear_model_are_those_of_scikit_learn(many):
    from sklearn.feature_extraction.text import TfidfVectorizer

    labels = np.array([SECTIONS.index(one.section) for one in many])
    made = models.Linear(many, labels, 4, 500)
    split: Any = lambda one: models.words(one, True)  # noqa: E731
    table: Any = TfidfVectorizer(analyzer=split, max_features=500, sublinear_tf=True, min_df=2)
    options: dict[str, Any] = {"loss": "log_loss", "max_iter": 8, "tol": None, "random_state": 0}
    model = sklearn.SGDClassifier(alpha=1e-6, **options).fit(table.fit_transform(many), labels)
    expected = model.predict_proba(table.transform(many[:50])) + models.LEAST
    found = made(many[:50])
    assert found.shape == (50, 4) and (found[:, 3] < 2 * models.LEAST).all()
    np.testing.assert_allclose(found[:, :3], expected / (1 + 4 * models.LEAST), atol=1e-4)
    assert made([Package("s", "libs", "", "")]).shape == (1, 4)
    np.testing.assert_allclose(made.counted(many[:3]).numpy(), found[:3])


def test_onnx_answers_as_the_network_with_masks_does(many):
    few = many[:40]
    model = with_exits(few)
    graph = models.InOnnx(model)
    for own, other in zip(graph.stage_answers(few), model.stage_answers(few), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
    for place in range(3):
        alone = models.InOnnx(model, [place])(few)
        torch.testing.assert_close(alone, model.stage_answers(few)[place], rtol=1e-3, atol=1e-4)
    scout = models.Linear(many, np.array([SECTIONS.index(one.section) for one in many]), 3, 300)
    both = [Cascade([scout, last], measure="margin", committee=True) for last in (graph, model)]
    answers = both[0].stage_answers(few)
    levels = [float(both[0].sure(stage, 0).quantile(0.7)) for stage in answers[:-1]]
    for made in both:
        made.thresholds.copy_(torch.tensor(levels, dtype=torch.float64))
    torch.testing.assert_close(both[0](few), both[1](few), rtol=1e-3, atol=1e-4)
    assert torch.equal(both[0].exits, both[1].exits) and len(both[0].exits.unique()) >= 3


def test_tokens_are_the_beginning_and_the_end():
    long = " ".join(f"word{i}" for i in range(200))
    (ids,) = models.Tokens(Tokenizer())([Package("s", "libs", " ".join(["a"] * 60), long)])
    assert len(ids) == models.TOKENS and len(models.words(Package("s", "libs", "a b", long), False)) == 2 + 80 + 3


def nothing(what: str, part: float | None) -> None:
    pass


def test_the_whole_run(many, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models.minilm_data, "load_model", encoder)
    monkeypatch.setattr(models.minilm_data, "load_tokenizer", Tokenizer)
    known = Topics(tuple(package(number) for number in range(2600)), "0" * 64)
    monkeypatch.setattr(topic.Topics, "load", lambda: known)
    content = topic.bench(topic.Mode("tiny", None, None, 6, 5, (8, 16)), nothing)
    entry = content["workloads"]["topic"]
    assert entry["quality"]["selective"]["value"] > 0.5 and entry["data"] == {"sha256": "0" * 64, "published": False}
    assert [stage["name"] for stage in entry["stages"]] == list(topic.NAMES)
    for job in ("batch_1", "best_batch"):
        assert {*entry["inference"][job]["saving"]} == {"cpu_s", "macs", "bytes"}
    assert entry["resplits"]["of"] == 20 and len(entry["equal_quality"]["sweep"]) == 6
    assert entry["training_cpu_s"] > 0


def write(folder: Path, name: str, text: str) -> None:
    (folder / f"deb.debian.org_debian_dists_bookworm_main_{name}.gz").write_bytes(gzip.compress(text.encode()))


def test_packages_are_read_joined_split_and_kept(tmp_path):
    with pytest.raises(FileNotFoundError, match="no lists of packages"):
        read_index(tmp_path)
    stanza = "Package: {0}\nSource: {1}\nSection: {2}\nDescription-md5: {3}\n"
    rows = [("libx1", "x (1.2)", "libs", "a1"), ("libx-dev", "x", "contrib/libdevel", "a2"), ("none", "y", "net", "a9")]
    rows += [(f"p{i}", f"p{i}", "games", f"b{i}") for i in range(40)]
    write(tmp_path, "binary-amd64_Packages", "\n".join(stanza.format(*row) for row in rows))
    texts = {"a1": "short x\n Long of x.\n .\n More.", "a2": "dev files"} | {
        f"b{i}": f"game {i}\n Long." for i in range(40)
    }
    told = "\n".join(f"Package: q\nDescription-md5: {md5}\nDescription-en: {text}\n" for md5, text in texts.items())
    write(tmp_path, "i18n_Translation-en", told)
    copy = tmp_path / "kept" / "packages.json.gz"
    found = Topics.load(tmp_path, copy)
    assert Package("x", "libs", "short x", "Long of x.\nMore.") in found.packages and len(found.packages) == 42
    assert found.sections == ["games", "libdevel", "libs"] and not found.published
    train, other = ({one.source for one in part} for part in (found.train(), found.held_out()))
    assert not train & other and len(train) + len(found.held_out()) == 41
    assert Topics.load(tmp_path / "gone", copy) == found
    copy.write_bytes(gzip.compress(gzip.decompress(copy.read_bytes()).replace(b"short x", b"other x")))
    with pytest.raises(ValueError, match="not what its hash says"):
        Topics.load(tmp_path, copy)
