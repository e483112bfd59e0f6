"""Debian's package index as texts with a topic: the section of a package from its description, split by source.

A package's name gives its section away more often than not (``lib…-dev``, ``python3-…``), so it is left out. One source
package makes many packages whose descriptions are alike: every source belongs to one part, and of those that calibrate
and test one package each is taken, so that they are independent draws.

The index changes with every point release: it is read once and a frozen copy kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from sparingly.workloads._debian_index import description, frozen_copy, index_files, stanzas
from sparingly.workloads._parts import cache_folder

PUBLISHED_SHA256 = "2bc569e7cc5f42c21dbd38d128821311802b82a9abd3649141a4421acd07fea6"
"""Of Debian 12.15, main: 62,068 descriptions of packages in 58 sections."""

TRAINED = range(5)
"""Tenths of the sources (by SHA-256 of the name) that train."""


class Package(NamedTuple):
    """Its source package, section, and both parts of its description."""

    source: str
    section: str
    short: str
    long: str


@dataclass(frozen=True)
class Topics:
    """Packages, sorted; ``sha256`` of them as they are used."""

    packages: tuple[Package, ...]
    sha256: str

    @classmethod
    def load(cls, index: str | os.PathLike[str] = "/var/lib/apt/lists", cache: Path | None = None) -> Topics:
        """The frozen copy in ``cache`` (by default in the cache folder); made from ``index`` where there is none.

        Raises FileNotFoundError if there is neither, ValueError if the copy is damaged.
        """
        copy = cache or cache_folder() / "debian-topics" / "packages.json.gz"
        return cls(*frozen_copy(copy, index, read_index, Package))

    @property
    def published(self) -> bool:
        """Whether these are the packages that published figures are of."""
        return self.sha256 == PUBLISHED_SHA256

    @cached_property
    def sections(self) -> list[str]:
        """The classes, sorted."""
        return sorted({package.section for package in self.packages})

    def train(self, n: int | None = None) -> list[Package]:
        """All packages of the sources that train, or n of them, in a random order that is always the same."""
        found = [package for package in self.packages if _mark(package.source)[0] % 10 in TRAINED]
        return sorted(found, key=lambda package: _mark("\n".join(package)))[:n]

    def held_out(self, n: int | None = None) -> list[Package]:
        """A package of each other source, or n of them, in a random order that is always the same."""
        found: dict[str, list[Package]] = {}
        for package in self.packages:
            if _mark(package.source)[0] % 10 not in TRAINED:
                found.setdefault(package.source, []).append(package)
        chosen = [min(some, key=lambda package: _mark("\n".join(package))) for some in found.values()]
        return sorted(chosen, key=lambda package: _mark(package.source)[1:])[:n]


def _mark(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def read_index(folder: Path) -> list[Package]:
    """Every package with a section and a description, in English, sorted; two with the same text count as one.

    Raises FileNotFoundError if lists are missing.
    """
    indices, translations = index_files(folder)
    texts = {fields["Description-md5"]: fields.get("Description-en", "") for fields in stanzas(translations)}
    found = set()
    for fields in stanzas(indices):
        text = texts.get(fields.get("Description-md5", ""))
        if text and fields.get("Section"):
            source = fields.get("Source", fields["Package"]).split(" ")[0]
            found.add(Package(source, fields["Section"].split("/")[-1], *description(text)))
    return sorted(found)
