from __future__ import annotations

import sys
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparingly.workloads import _noise, spell_data
from sparingly.workloads._noise import Rates
from sparingly.workloads.spell_data import Features, Noise, Vocabulary, letter_array, misspellings, words_of

_ONLY = dict.fromkeys(["delete", "transpose", "substitute", "insert", "undouble"], 0.0) | {"one_change": 1.0}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(limit=3000)


def _misspelt(vocabulary: Vocabulary, word: str, count: int = 400, **rates: float) -> set[str]:
    noise = Noise(vocabulary, rates=Rates(**(_ONLY | rates)))
    classes = np.full(count, vocabulary.class_of(word), np.int64)
    return set(words_of(*noise.misspell(classes, 0)))


def test_vocabulary_is_sorted_and_encoded(vocabulary):
    assert len(vocabulary) == len(vocabulary.words) == 3000
    assert vocabulary.words[:3] == ["the", "to", "and"]
    assert (np.diff(vocabulary.zipf) <= 0).all()
    assert vocabulary.zipf[0] == 7.73
    assert vocabulary.letters[0].tolist()[:4] == [20, 8, 5, 0]
    assert words_of(vocabulary.letters, vocabulary.lengths) == vocabulary.words
    assert vocabulary.class_of("and") == 2
    assert "and" in vocabulary
    assert "accomodate" not in vocabulary


def test_whole_vocabulary_has_the_stated_size():
    assert len(Vocabulary()) == 288_992


@pytest.mark.parametrize("limit", [0, 1, 288_993])
def test_limit_out_of_range(limit):
    with pytest.raises(ValueError, match=r"limit must be in 2\.\.288992"):
        Vocabulary(limit)


def test_other_words_are_refused(monkeypatch):
    monkeypatch.setattr("wordfreq.top_n_list", lambda *_, **__: ["the", "of"])
    with pytest.raises(RuntimeError, match=r"wordfreq==3\.1\.1"):
        Vocabulary()


def test_missing_packages_are_named(monkeypatch, vocabulary):
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(ImportError, match=r"sparingly\[bench\]"):
        Vocabulary()
    monkeypatch.setattr(spell_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"codespell.*sparingly\[bench\]"):
        misspellings(vocabulary)


def test_misspellings_are_split_by_correction(vocabulary):
    dev, test = misspellings(vocabulary)
    pairs = dict(zip(dev.typed + test.typed, np.concatenate([dev.classes, test.classes]).tolist(), strict=True))
    assert vocabulary.words[pairs["recieve"]] == "receive"
    assert not set(dev.classes.tolist()) & set(test.classes.tolist())
    for part, remainders in ((dev, {0}), (test, {1, 2, 3, 4})):
        words = {vocabulary.words[number] for number in part.classes.tolist()}
        assert {zlib.crc32(word.encode()) % 5 for word in words} == remainders
    assert all(typed.isascii() and typed.isalpha() and 2 <= len(typed) <= 30 for typed in pairs)


def test_another_dictionary_is_refused(monkeypatch, tmp_path, vocabulary):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dictionary.txt").write_text("recieve->receive\n")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(spell_data.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(RuntimeError, match=r"codespell==2\.4\.3"):
        misspellings(vocabulary)


def test_any_typed_text_has_features():
    words = ["  Recieve ", "recieve", "naïve", "naáve", "日本", "x", "a" * 100, "a" * 32]
    ids = Features().encode(words)
    assert ids.dtype == torch.int64
    assert ids.shape == (8, Features().width(32))
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[2], ids[3])
    assert torch.equal(ids[6], ids[7])
    assert (ids < 1 << 18).all()
    assert words_of(*letter_array(["Naïve"])) == ["na?ve"]


@pytest.mark.parametrize("word", ["", "   ", "\t\n"])
def test_empty_word_is_refused(word):
    with pytest.raises(ValueError, match="word 1 is empty"):
        Features().encode(["good", word])


@pytest.mark.parametrize(
    ("features", "count"),
    [(Features(), 4 + 3 + 2 + 3), (Features(ngrams=(3,), skips=False), 3), (Features(ngrams=()), 3)],
)
def test_features_of_a_short_word(features, count):
    """^cat$ has 4 pairs, 3 triples, 2 quadruples and 3 pairs with a gap; pads are at the end."""
    ids = features.encode(["cat", "category"])
    assert (ids[0, :count] >= 0).all()
    assert (ids[0, count:] == -1).all()
    assert (ids[1] >= 0).all()


def test_features_are_the_ngrams_of_a_word():
    features = Features(buckets=1 << 30, ngrams=(2,), skips=False)
    ids = dict(zip(["^a", "ab", "ba", "a$"], features.encode("aba")[0].tolist(), strict=True))
    assert len(set(ids.values())) == 4
    # ^b bb ba ab bc c$ shares ba and ab.
    assert set(ids.values()) & set(features.encode("bbabc")[0].tolist()) == {ids["ab"], ids["ba"]}
    assert set(Features(buckets=7).encode("aba")[0].tolist()) <= set(range(7))


@pytest.mark.parametrize(
    "options", [{"buckets": 0}, {"ngrams": (0,)}, {"ngrams": (2, 2)}, {"ngrams": (), "skips": False}]
)
def test_bad_feature_options(options):
    with pytest.raises(ValueError, match=r"must be|at least"):
        Features(**options)


def test_batches_depend_on_seed_and_step_alone(vocabulary):
    noise = Noise(vocabulary, seed=3)
    classes, ids = noise.batch(64, step=5)
    assert classes.dtype == ids.dtype == torch.int64
    again, same = Noise(vocabulary, seed=3).batch(64, step=5)
    assert torch.equal(classes, again)
    assert torch.equal(ids, same)
    shorter, _ = noise.batch(16, step=5)
    assert torch.equal(shorter, classes[:16])
    assert not torch.equal(classes, noise.batch(64, step=6)[0])
    assert not torch.equal(classes, Noise(vocabulary, seed=4).batch(64, step=5)[0])


def test_batch_encodes_the_misspelt_words(vocabulary):
    noise = Noise(vocabulary)
    classes, ids = noise.batch(50, step=1)
    typed = words_of(*noise.misspell(classes.numpy(), 1))
    assert torch.equal(ids, noise.features.encode(typed))
    assert sum(word == vocabulary.words[c] for word, c in zip(typed, classes.tolist(), strict=True)) <= 2


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_classes_follow_their_frequency(vocabulary, alpha):
    noise = Noise(vocabulary, alpha=alpha)
    drawn = np.concatenate([noise.batch(5000, step)[0].numpy() for step in range(8)])
    counts = np.bincount(drawn, minlength=len(vocabulary))
    expected = 40_000 * vocabulary.probabilities(alpha)
    head = expected[:10].sum()
    assert abs(counts[:10].sum() - head) < 5 * head**0.5
    assert abs(counts[1500:].sum() - expected[1500:].sum()) < 5 * expected[1500:].sum() ** 0.5


def test_one_kind_of_error_at_a_time(vocabulary):
    letters = "abcdefghijklmnopqrstuvwxyz"
    word = "letter"
    assert _misspelt(vocabulary, word, delete=1.0) == {word[:i] + word[i + 1 :] for i in range(6)}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(5)}
    assert _misspelt(vocabulary, word, transpose=1.0) == swapped - {word}
    inserted = _misspelt(vocabulary, word, insert=1.0)
    assert inserted <= {word[:i] + c + word[i:] for i in range(7) for c in letters}
    replaced = _misspelt(vocabulary, word, substitute=1.0)
    assert replaced <= {word[:i] + c + word[i + 1 :] for i in range(6) for c in letters}
    assert min(len(inserted), len(replaced)) > 20
    assert _misspelt(vocabulary, word, undouble=1.0) == {"leter"}
    assert {"phone", "fone", "phon"} & _misspelt(vocabulary, "phone") == {"fone", "phon"}


def test_words_stay_within_their_limits(vocabulary):
    noise = Noise(vocabulary, rates=Rates(one_change=0.0, two_changes=0.0))
    classes = np.arange(3000, dtype=np.int64)
    for step in range(5):
        codes, lengths = noise.misspell(classes, step)
        assert lengths.min() >= 2
        assert lengths.max() <= 29
        assert ((codes > 0).sum(1) == lengths).all()
        assert codes.max() <= 26


def test_errors_come_at_their_rates(vocabulary):
    rates = Rates(one_change=1.0, delete=0.5, transpose=0.0, substitute=0.0, insert=0.5, undouble=0.0)
    classes = np.full(20_000, vocabulary.class_of("people"), np.int64)
    lengths = Counter(Noise(vocabulary, rates=rates).misspell(classes, 0)[1].tolist())
    assert set(lengths) == {5, 7}
    assert abs(lengths[5] - 10_000) < 5 * 5000**0.5


def test_rates_leave_room_for_spellings():
    rates = Rates()
    assert 0 < rates.delete + rates.transpose + rates.substitute + rates.insert + rates.undouble < 1
    assert rates.insert_double + rates.insert_neighbour + rates.insert_vowel + rates.insert_nearby < 1


def test_neighbouring_keys():
    near = {chr(96 + code) for code in _noise._NEAR[ord("s") - 96].tolist() if code}
    assert near == set("adwexz")


def test_negative_seed_is_refused(vocabulary):
    with pytest.raises(ValueError, match="seed"):
        Noise(vocabulary, seed=-1)
