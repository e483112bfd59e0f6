"""Language identification: messages of a folder, n-grams, the compiled scout, the transformer, a whole small run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparingly.report import result
from sparingly.workloads import langid, langid_data
from sparingly.workloads._langid_models import ByteTransformer, InOnnx, Ngrams, OneCall, from_list

ENDINGS = {"aa": "ati eno", "bb": "ung der", "cc": "ské něco", "dd": "ão não"}


def write(folder, languages: dict[str, dict[str, str]], name: str = "i18n") -> None:
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    for language, messages in languages.items():
        (place / f"{language}.json").write_text(json.dumps(messages), encoding="utf-8")


def made_up(folder, keys: int = 600) -> None:
    """Four languages that differ by their endings, beside English."""
    rng = np.random.default_rng(0)
    languages: dict[str, dict[str, str]] = {"en": {}, **{name: {} for name in ENDINGS}}
    for key in range(keys):
        stems = ["".join(rng.choice(list("abdefgiklmnoprstuv"), 4)) for _ in range(5)]
        languages["en"][f"k{key}"] = " ".join(stem + "ing" for stem in stems)
        for name, ending in ENDINGS.items():
            tails = ending.split()
            languages[name][f"k{key}"] = " ".join(stem + tails[i % 2] for i, stem in enumerate(stems))
    write(folder, languages)


def test_messages_are_cleaned_and_chosen(tmp_path):
    long = "a message that is long enough"
    write(tmp_path, {
        "en": {"@metadata": "authors of this file, no message", "one": long, "two": f"{long} too"},
        "xx": {"one": long, "two": "{{PLURAL:$1|{{x}} one|more}} <b>eine</b> Nachricht, $2 lang genug", "no": "short"},
        "qqq": {"one": "what the message is for, in English"},
    })  # fmt: skip
    write(tmp_path, {"xx": {"four": "in another file, and long enough"}}, "other/i18n")
    (tmp_path / "i18n" / "broken.json").write_text("{")
    found = sorted(langid_data.messages(tmp_path))
    assert found == [
        ("en", "one", long),
        ("en", "two", f"{long} too"),
        ("xx", "four", "in another file, and long enough"),
        ("xx", "two", "eine Nachricht, lang genug"),
    ]


def test_translations_of_a_message_are_in_one_part_and_no_text_is_in_two(tmp_path):
    made_up(tmp_path)
    corpus = langid_data.Corpus(tmp_path, fewest=100)
    assert corpus.languages == ["aa", "bb", "cc", "dd", "en"] and not corpus.frozen
    texts = {name: set(part.bytes_of(torch.arange(len(part)))) for name, part in corpus.parts.items()}
    assert not texts["train"] & (texts["dev"] | texts["calibration"] | texts["test"])
    assert sum(map(len, corpus.parts.values())) == 3000
    assert all(len(part) % 5 == 0 for part in corpus.parts.values())


def test_without_the_package_it_says_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install --no-install-recommends mediawiki"):
        langid_data.Corpus(tmp_path)


def test_names_of_ngrams_do_not_depend_on_what_stands_beside():
    model = Ngrams(3, 8, (1, 2, 3), 10)
    both = model.names(from_list([b"abc", b"a longer text"]))
    alone = model.names(from_list([b"abc"]))
    # 5 places with the marks of start and end: 5 + 4 + 3 n-grams.
    assert torch.equal(both[0][:12], alone[0][:12]) and (both[0][12:] == -1).all() and (alone[0][:12] >= 0).all()


@pytest.mark.parametrize("texts", [[b"some text"], [b"", b"x", "längerer Text".encode() * 3, b"y" * 500]])
def test_the_compiled_scout_answers_as_its_modules_do(texts):
    torch.manual_seed(0)
    model = Ngrams(7, 16, (1, 2, 3, 4), 12).eval()
    with torch.no_grad():
        model.bag.weight.mul_(1000)
        wanted = model(from_list(texts)).softmax(1)
    np.testing.assert_allclose(OneCall(model)(texts), wanted.numpy(), rtol=2e-4, atol=1e-6)


def test_padding_changes_no_answer_and_onnx_gives_the_same():
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = ByteTransformer(Ngrams(5, 8, (1, 2), 10), 5, width=32, layers=2, longest=40).eval()
    torch.nn.init.normal_(model.out.weight)
    texts = [b"short", b"a text that is longer than the others", b"middling text", b"z" * 90]
    with torch.no_grad():
        together = model(from_list(texts)).softmax(1)
        for place, text in enumerate(texts):
            torch.testing.assert_close(model(from_list([text])).softmax(1)[0], together[place])
    engine = InOnnx(model)
    np.testing.assert_allclose(engine(texts), together.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(engine(texts[:1]), together[:1].numpy(), rtol=1e-3, atol=1e-5)
    assert not any(name.startswith("ngrams") for name in model.state_dict())


def test_a_small_run(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    made_up(tmp_path / "wiki", 1500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(langid, "Corpus", lambda: langid_data.Corpus(tmp_path / "wiki", fewest=100))
    monkeypatch.setattr(langid, "BATCH", 64)
    monkeypatch.setattr(langid, "SINGLE", {})
    for name, shape in (
        ("SCOUT", (8, (1, 2), 10, 0.0)),
        ("WIDE", (8, (1, 2, 3), 10, 0.0)),
        ("LINEAR", (0, (1, 2), 10, 0.0)),
    ):
        monkeypatch.setattr(langid, name, shape)
    mode = replace(langid.MODES["quick"], held_out=None, trained=None, passes=4, width=16, timed=64)
    told: list[str] = []
    document = langid.bench(mode, lambda what, part: told.append(what))
    (workload,) = result.parse(document).workloads
    entry = document["workloads"]["langid"]
    assert workload.is_cascade and entry["num_classes"] == 5
    assert entry["quality"]["selective"]["value"] > 0.9 and set(entry["inference"]) == {"batch_1", "best_batch"}
    assert [stage["name"] for stage in entry["stages"]] == ["n-grams, 8 wide", "byte transformer"]
    assert any(isinstance(example, str) for stage in entry["stages"] for example in stage["examples"])
    before = len([what for what in told if what.startswith("training")])
    again = langid.bench(mode, lambda what, part: told.append(what))
    assert again["workloads"] == document["workloads"]
    assert len([what for what in told if what.startswith("training")]) == before
