"""What reads a description: a linear model of its words, and all-MiniLM-L6-v2 with exits, PyTorch and ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.nn._exit_batch import pooled
from sparingly.nn.cascade import NEVER, Staged, multiplied
from sparingly.nn.exits import ExitNetwork
from sparingly.workloads import minilm_data
from sparingly.workloads._encoders import _attended, _embedded, _Graph, _Parts
from sparingly.workloads._fit import multiplies_bfloat16
from sparingly.workloads.topic_data import Package

INSTALL = 'the words need scikit-learn: pip install "sparingly[bench]"'
TOKENS, TAIL = 32, 10
"""Tokens that the network reads; of a longer description the last ten are kept: "this package contains the headers"."""

WORDS = 40
"""So many words at each end of the long description count."""

LEAST = 1e-3
"""Added to each of the linear model's probabilities: none of its classes is ruled out."""

_WORD = re.compile(r"\w+")


def words(package: Package, pairs: bool) -> list[str]:
    """Words of both descriptions, those of the short one again with a mark, its last one too; pairs of neighbours."""
    short, long = _WORD.findall(package.short.lower()), _WORD.findall(package.long.lower())
    if len(long) > 2 * WORDS:
        long = long[:WORDS] + long[-WORDS:]
    found = short + long + ["^" + word for word in short] + ["$" + word for word in short[-1:]]
    if pairs:
        for part in (short, long):
            found += [f"{a} {b}" for a, b in pairwise(part)]
    return found


class Linear:
    """Logistic regression on TF-IDF of words, one class against the rest, fitted by scikit-learn.

    Answers come from its arrays: at one description a call, scikit-learn's own way takes most of its time in Python.
    Raises ImportError without scikit-learn.
    """

    def __init__(self, packages: Sequence[Package], labels: np.ndarray, classes: int, size: int, pairs: bool = True):
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import SGDClassifier
        except ImportError as error:
            raise ImportError(INSTALL) from error
        self.classes, self.pairs = classes, pairs
        split: Any = partial(words, pairs=pairs)
        made: Any = TfidfVectorizer(analyzer=split, max_features=size, sublinear_tf=True, min_df=2)
        table = made.fit_transform(packages)
        # Fewer words want more decay, alpha 1e-6 and 3e-6: 79.1 and 78.6 % of one package of each held-out source.
        decay = 1e-6 if pairs else 3e-6
        options: dict[str, Any] = {"loss": "log_loss", "max_iter": 8, "tol": None, "random_state": 0}
        model: Any = SGDClassifier(alpha=decay, **options)
        model.fit(table, labels)
        self.vocabulary = {word: int(place) for word, place in made.vocabulary_.items()}
        self.rarity = made.idf_.astype(np.float32)
        self.rows = np.zeros((len(self.rarity), classes), np.float32)
        # What was never seen in training keeps the chance of nothing.
        self.bias = np.full(classes, -20.0, np.float32)
        binary = len(model.classes_) == 2
        weights, bias = (np.concatenate([-x, x]) if binary else x for x in (model.coef_, model.intercept_))
        self.rows[:, model.classes_], self.bias[model.classes_] = weights.T, bias

    def __call__(self, packages: Sequence[Package]) -> np.ndarray:
        """Probabilities float32 [n, classes]."""
        scores = np.empty((len(packages), self.classes), np.float32)
        for place, package in enumerate(packages):
            counts: dict[int, int] = {}
            for word in words(package, self.pairs):
                number = self.vocabulary.get(word)
                if number is not None:
                    counts[number] = counts.get(number, 0) + 1
            numbers = np.fromiter(counts, np.int64, len(counts))
            often = np.fromiter(counts.values(), np.float32, len(counts))
            values = (1 + np.log(often)) * self.rarity[numbers]
            length = float(np.sqrt(values @ values)) or 1.0
            scores[place] = (values / np.float32(length)) @ self.rows[numbers] + self.bias
        chances = 1 / (1 + np.exp(-scores))
        chances = chances / np.maximum(chances.sum(1, keepdims=True), 1e-12) + np.float32(LEAST)
        return chances / chances.sum(1, keepdims=True)

    def counted(self, packages: Sequence[Package]) -> Tensor:
        """The same; the product of weights and words is done again in PyTorch, where a ledger sees it."""
        rows = torch.from_numpy(self.rows)
        for package in packages:
            numbers = [self.vocabulary[word] for word in set(words(package, self.pairs)) if word in self.vocabulary]
            torch.mm(torch.ones(1, len(numbers)), rows[numbers])
        return torch.from_numpy(self(packages))


class Tokens:
    """Descriptions -> token ids, at most TOKENS: the beginning and the end."""

    def __init__(self, tokenizer: Any):
        self._one: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if hasattr(self._one, "no_padding"):
            self._one.no_padding()
            self._one.no_truncation()

    def __call__(self, packages: Sequence[Package]) -> list[list[int]]:
        """Letters beyond what can be needed are cut before they are split."""
        found = []
        for encoded in self._one.encode_batch([_ends(package) for package in packages]):
            ids = encoded.ids
            found.append(ids if len(ids) <= TOKENS else ids[: TOKENS - TAIL] + ids[-TAIL:])
        return found


def _ends(package: Package, letters: int = 110) -> str:
    long = package.long
    if len(long) > letters:
        half = letters // 2
        long = f"{long[:half].rsplit(' ', 1)[0]} ... {long[-half:].split(' ', 1)[-1]}"
    return f"{package.short}. {long}"


class Mean(nn.Module):
    """:func:`pooled` as a layer, which exits cut the mask of: states [n, tokens, d], mask [n, tokens] -> [n, d]."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return pooled(states, mask)


class Reader(nn.Module):
    """An encoder with a linear layer on the mean of its last states: list of packages -> logits [n, classes]."""

    def __init__(self, encoder: Any, tokens: Tokens, classes: int):
        super().__init__()
        self.encoder, self.tokens = encoder, tokens
        # A few thousand steps move rows of 30,000 words that most of them never see; they stay.
        self.encoder.embeddings.requires_grad_(False)
        width = encoder.config.hidden_size
        self.pool, self.norm, self.out = Mean(), nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, packages: Sequence[Package]) -> Tensor:
        ids = [torch.tensor(row) for row in self.tokens(packages)]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        places = torch.arange(padded.shape[1])
        mask = (places < torch.tensor([len(row) for row in ids]).unsqueeze(1)).long()
        states = self.encoder(input_ids=padded, attention_mask=mask).last_hidden_state
        return self.out(self.norm(self.pool(states, mask)))


class InOnnx(Staged):
    """A network with exits in ONNX Runtime on one thread: a graph from each exit to the next.

    Descriptions of one length go together, so that nothing is padded. ``keep``: only these of its stages, in rising
    order; what lies behind the last one is left out.
    """

    def __init__(self, model: ExitNetwork, keep: Sequence[int] | None = None):
        net: Any = model.net
        kept = list(keep if keep is not None else range(len(model.names)))
        super().__init__([model.names[place] for place in kept], model.measure)
        self.tokens = net.tokens
        parts = _Parts(net.encoder)
        whole = len(parts.blocks)
        depths = [*(int(name.rsplit(".", 1)[1]) + 1 for name in model.names[:-1]), whole]
        heads = [*((head.norm, head.linear) for head in model.heads), (net.norm, net.out)]
        graph, state = _Graph(ids=["batch", "tokens"]), ["batch", "tokens", parts.width]
        x, begin = _embedded(graph, parts), 0
        self.sessions = []
        for place in kept:
            depth, (norm, linear) = depths[place], heads[place]
            for block in parts.blocks[begin:depth]:
                x, hidden = _attended(graph, block, x, parts)
                assert block.down is not None
                x = graph.norm(graph.linear(hidden, block.down), x, block.norm_out, parts.eps, block.down[1])
            mean = graph.node("ReduceMean", x, graph.value([1]), keepdims=0)
            values = [graph.value(value.detach().float()) for value in (norm.weight, norm.bias)]
            normed = graph.node("LayerNormalization", mean, *values, epsilon=norm.eps)
            scores = graph.linear(normed, (linear.weight.detach().float().t(), linear.bias))
            scores = graph.node("Add", scores, graph.value(linear.bias.detach().float()))
            found = graph.node("Softmax", scores, axis=1)
            outputs = {found: ["batch", linear.out_features]} | ({x: state} if place != kept[-1] else {})
            self.sessions.append(graph.session(outputs))
            graph, x, begin = _Graph(state=state), "state", depth

    def stage_answers(self, inputs: Sequence[Package]) -> list[Tensor]:
        """See :meth:`Staged.stage_answers`."""
        answers: list[list[Tensor]] = [[] for _ in self.names]
        groups = self._groups(inputs)
        for _, ids in groups:
            given = {"ids": ids}
            for place, session in enumerate(self.sessions):
                found, *state = session.run(None, given)
                answers[place].append(torch.from_numpy(found))
                given = {"state": state[0]} if state else {}
        order = torch.cat([torch.from_numpy(places) for places, _ in groups]).argsort()
        return [torch.cat(stage)[order] for stage in answers]

    def _groups(self, packages: Sequence[Package]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each length: (places [m], ids [m, tokens])."""
        rows = self.tokens(packages)
        lengths = np.array([len(row) for row in rows])
        found = []
        for length in np.unique(lengths):
            places = (lengths == length).nonzero()[0]
            found.append((places, np.array([rows[place] for place in places], np.int64)))
        return found

    def leaving(
        self, inputs: Sequence[Package], by: Staged, first: int, said: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Staged.leaving`."""
        thresholds, last = [*by.thresholds[first:].tolist(), -NEVER], len(self.sessions) - 1
        out, exits = torch.empty(0), torch.empty(len(inputs), dtype=torch.int64)
        for places, ids in self._groups(inputs):
            given, waiting = {"ids": ids}, torch.from_numpy(places)
            for place, session in enumerate(self.sessions):
                raw, *state = session.run(None, given)
                found = torch.from_numpy(raw)
                if said is not None:
                    found = multiplied(found, said[waiting])
                out = out if len(out) else found.new_empty(len(inputs), found.shape[1])
                goes = torch.full((len(waiting),), place == last)
                if place < last and thresholds[place] != NEVER:
                    goes = by.sure(found, first + place) >= thresholds[place]
                out[waiting[goes]], exits[waiting[goes]] = found[goes], place
                waiting = waiting[~goes]
                if not len(waiting):
                    break
                given = {"state": state[0][(~goes).numpy()]}
        return out, exits

    def forward(self, inputs: Sequence[Package]) -> Tensor:
        """Probabilities float32 [n, classes]."""
        out, exits = self.leaving(inputs, self, 0)
        self._told(exits)
        return out


def losses(model: ExitNetwork, packages: Sequence[Package], said: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the network and, with less weight, of its exits; each adds to ``said``, the logarithm of what
    the words alone say of packages that they were not fitted to, [n, classes]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
        logits, hidden = model.collect(packages)
    found = [head(part) for head, part in zip(model.heads, hidden, strict=True)]
    parts = [F.cross_entropy(one.float() + said, labels) for one in (*found, logits)]
    return parts[-1] + 0.3 * torch.stack(parts[:-1]).sum()


def load_reader(classes: int) -> Reader:
    """all-MiniLM-L6-v2 with a new head."""
    return Reader(minilm_data.load_model(), Tokens(minilm_data.load_tokenizer()), classes)
