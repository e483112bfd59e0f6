from __future__ import annotations

import sys

import faiss
import numpy as np
import pytest
import torch

from sparingly.workloads._incumbents import FAISS_KINDS, Faiss, SymSpell
from sparingly.workloads.spell_data import Pairs, Vocabulary

CLASSES, D = 2000, 16


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(limit=2000)


@pytest.fixture(scope="module")
def layer() -> torch.nn.Linear:
    torch.manual_seed(1)
    layer = torch.nn.Linear(D, CLASSES)
    with torch.no_grad():  # Rows of different lengths, so that nearest by distance is not best by score.
        layer.weight *= torch.rand(CLASSES, 1) * 5
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize("skip_itself", [False, True])
def test_symspell_answers(vocabulary, skip_itself):
    speller = SymSpell(vocabulary, skip_itself=skip_itself)
    assert speller.load_cpu_s > 0
    words = ["goverment", "peple", "xqzvkjwxqz", "form"]
    answers = [None if c < 0 else vocabulary.words[c] for c in speller.answer(words).tolist()]
    assert answers[:3] == ["government", "people", None]
    # "form" is a word; the most frequent one at one change is "for".
    assert answers[3] == ("for" if skip_itself else "form")


def test_symspell_quality_counts_no_answer_as_wrong(vocabulary):
    pairs = Pairs(["goverment", "xqzvkjwxqz", "peple"], np.array([vocabulary.class_of("government"), 0, 0]))
    result = SymSpell(vocabulary).evaluate(pairs)
    assert result.right.tolist() == [True, False, False]
    assert result.precision_at_1 == pytest.approx(1 / 3)
    assert result.answered == pytest.approx(2 / 3)
    assert result.cpu_s > 0
    with pytest.raises(ValueError, match="at least one pair"):
        SymSpell(vocabulary).evaluate(Pairs([], np.array([], np.int64)))


def _exact(layer: torch.nn.Linear, hidden: torch.Tensor) -> torch.return_types.topk:
    with torch.no_grad():
        return layer(hidden).topk(5)


@pytest.mark.parametrize("kind", FAISS_KINDS)
def test_faiss_at_its_broadest_finds_the_best(layer, kind):
    index = Faiss(layer, kind)
    hidden = torch.randn(200, D)
    exact = _exact(layer, hidden)
    scores, classes = index.answer(hidden)
    assert index.build_cpu_s > 0
    assert scores.dtype == torch.float32
    assert classes.shape == (200, 5)
    assert (classes == exact.indices).double().mean() > 0.99
    found = classes == exact.indices
    torch.testing.assert_close(scores[found], exact.values[found], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", FAISS_KINDS)
def test_tuning_takes_the_cheapest_setting_that_agrees(layer, kind):
    index = Faiss(layer, kind)
    hidden = torch.randn(300, D)
    exact = _exact(layer, hidden).indices[:, 0]
    reached = index.tune(hidden, exact, agreement=0.9)
    assert reached == index.agreement(hidden, exact) >= 0.9
    chosen = index.settings.index(index.setting)
    for setting in index.settings[:chosen]:
        index.setting = setting
        assert index.agreement(hidden, exact) < 0.9
    # No setting agrees with wrong answers: the dearest one stays.
    assert index.tune(hidden, (exact + 1) % CLASSES, agreement=0.9) < 0.1
    assert index.setting == index.settings[-1]


def test_agreement_needs_breadth(layer):
    index = Faiss(layer, "ivf")
    hidden = torch.randn(300, D)
    exact = _exact(layer, hidden).indices[:, 0]
    broad = index.agreement(hidden, exact)
    index.setting = 1
    assert index.agreement(hidden, exact) < broad


def test_faiss_threads_are_put_back(layer):
    faiss.omp_set_num_threads(2)
    index = Faiss(layer, "ivf")
    index.answer(torch.randn(2, D))
    assert faiss.omp_get_max_threads() == 2


def test_bad_arguments(layer, vocabulary, monkeypatch):
    with pytest.raises(ValueError, match="'pq'"):
        Faiss(layer, "pq")
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setitem(sys.modules, "symspellpy", None)
    with pytest.raises(ImportError, match=r"faiss.*sparingly\[bench\]"):
        Faiss(layer)
    with pytest.raises(ImportError, match=r"symspellpy.*sparingly\[bench\]"):
        SymSpell(vocabulary)
