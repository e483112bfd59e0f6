"""The pictures are those of the data set, whole, or it is said what to install."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from sparingly.workloads import fashion_data

INSTALLED = fashion_data.PACKAGE.is_dir()


@pytest.mark.skipif(not INSTALLED, reason="dataset-fashion-mnist is not installed")
def test_the_data_set():
    train, test = fashion_data.load(train=True), fashion_data.load(train=False)
    for part, size in ((train, 60_000), (test, 10_000)):
        assert part.images.shape == (size, 784) and part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64 and torch.bincount(part.labels).tolist() == [size // 10] * 10
    # The first picture is an ankle boot, dark above, light below.
    assert train.labels[0] == 9 and train.images[0].view(28, 28)[:3].sum() == 0 < train.images[0].view(28, 28)[20].sum()
    rows = fashion_data.published()
    assert rows[0].accuracy == 0.967 and any(row.name == "MLP 256-128-100" and row.accuracy == 0.8833 for row in rows)
    assert [row.accuracy for row in rows] == sorted((row.accuracy for row in rows), reverse=True)


def test_missing_damaged_and_other_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist, or put the four files"):
        fashion_data.load(train=False, folder=tmp_path)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(ValueError, match=r"holds other data: SHA-256 .*expected 5b4141f0afbad91e"):
        fashion_data.load(train=False, folder=tmp_path)
    file.write_bytes(gzip.compress(b"x" * 2000)[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        fashion_data.load(train=False, folder=tmp_path)


def test_published_results_are_none_without_the_documentation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(fashion_data, "README", tmp_path / "README.md.gz")
    assert fashion_data.published() == []
