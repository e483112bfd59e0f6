"""Fashion-MNIST: 70,000 pictures of clothes in ten classes, from a package or a folder, checked by hash.

H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
arXiv:1708.07747, 2017. The results of other classifiers that it ships were reported to its authors.
"""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparingly.workloads._parts import cache_folder, check_sha256, find_file

PIXELS = 28 * 28
PACKAGE = Path("/usr/share/datasets/fashion-mnist")
README = Path("/usr/share/doc/dataset-fashion-mnist/README.md.gz")
# Name -> SHA-256 of what is in the file, unpacked, and the bytes before the first value.
_FILES = {
    "train-images-idx3-ubyte.gz": ("c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888", 16),
    "train-labels-idx1-ubyte.gz": ("bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9", 8),
    "t10k-images-idx3-ubyte.gz": ("5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b", 16),
    "t10k-labels-idx1-ubyte.gz": ("0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34", 8),
}


class Pictures(NamedTuple):
    """images uint8 [n, 784], row by row, and labels int64 [n]."""

    images: Tensor
    labels: Tensor


def load(train: bool, folder: str | os.PathLike[str] | None = None) -> Pictures:
    """The 60,000 pictures for training, or the 10,000 for testing, in the data set's order.

    Raises FileNotFoundError with what to install, ValueError for a file with other contents.
    """
    part = "train" if train else "t10k"
    images, labels = _read(f"{part}-images-idx3-ubyte.gz", folder), _read(f"{part}-labels-idx1-ubyte.gz", folder)
    return Pictures(images.view(-1, PIXELS), labels.long())


def _read(name: str, folder: str | os.PathLike[str] | None) -> Tensor:
    own = cache_folder() / "fashion-mnist"
    folders = (PACKAGE, own) if folder is None else (Path(folder),)
    install = (
        "apt-get install dataset-fashion-mnist, or put the four files of "
        f"https://github.com/zalandoresearch/fashion-mnist (data/fashion) into {own}"
    )
    found = find_file(name, folders, install)
    expected, header = _FILES[name]
    try:
        content = gzip.decompress(found.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{found} is damaged: {error}. {install}") from error
    check_sha256(content, expected, found, install)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())


class Published(NamedTuple):
    """A classifier that somebody reported to the data set's authors, who did not check it."""

    name: str
    preprocessing: str
    accuracy: float


def published() -> list[Published]:
    """The results that the data set ships, best first; empty where it was installed without its documentation."""
    if not README.is_file():
        return []
    rows = []
    for line in gzip.decompress(README.read_bytes()).decode().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:]]
        if len(cells) >= 6 and re.fullmatch(r"0\.\d+", cells[2]):
            rows.append(Published(cells[0], cells[1], float(cells[2])))
    return sorted(rows, key=lambda row: -row.accuracy)
