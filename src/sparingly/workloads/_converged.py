"""The spelling network at 20,000 classes trained towards convergence, dense and selective, each at its own best rates.

Rates and batch sizes were chosen on the dev part of the misspellings; only the figures at the end are of the test part.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from sparingly.workloads._parts import Say
from sparingly.workloads._shares import difference, share
from sparingly.workloads._speller import Recipe, Speller, exact_best, other_than_typed, train_dense, train_selective
from sparingly.workloads.spell_data import Pairs, Vocabulary, misspellings

CLASSES = 20_000
RECIPES = {
    "dense": Recipe(700_000, batch=256, lr=1e-5),
    "selective": Recipe(3_200_000, lr=3e-4),
}
"""Chosen on dev, P@1 there after short trainings; the full softmax wants a far lower rate.

Dense, 60,000 examples, batch 256: 0.709 at lr 1e-3, 0.839 at 3e-4, 0.861 at 1e-4, 0.869 at 3e-5; with batch 128, 0.878
at 3e-5 and 0.881 at 1e-5. 300,000 examples, batch 256: 0.910 at 3e-5, 0.911 at 1e-5. Selective, 400,000 examples: 0.900
at 1e-3, 0.907 at 3e-4, 0.904 at 1e-4. A ``bag_lr`` of 1e-2 was the best or within 0.001 of it wherever it was varied.
Numbers of examples are what fits 10 minutes, the selective ones at less than half the dense processor time. Both curves
still rise there: dense 0.911 at 300,000, 0.921 at 700,000 and 0.928 at 1,400,000; selective 0.928 at 2,000,000, 0.933
at 3,200,000 and 0.944 at 6,400,000.
"""


def converged(say: Say, num_classes: int = CLASSES, recipes: dict[str, Recipe] = RECIPES) -> dict[str, Any]:
    """Both networks trained from the start, each by its own recipe.

    Returns a dict: for "dense" and "selective" P@1 on the test part with its 95 % interval, processor-seconds, examples
    and rates; "difference", selective - dense over the same pairs; "n".
    """
    vocabulary = Vocabulary(num_classes)
    _, test = misspellings(vocabulary)
    rights, result = {}, {}
    for which, recipe in recipes.items():
        speller, trained = _train(which, vocabulary, recipe, say)
        rights[which] = right(speller, test)
        result[which] = {**share(rights[which]), **trained}
    return {**result, "difference": difference(rights["selective"], rights["dense"]), "n": len(test.typed)}


def right(speller: Speller, pairs: Pairs) -> np.ndarray:
    """Which pairs [n] the network corrects, from the exact scores of all classes; bools [n]."""
    best = exact_best(speller.eval(), speller.states(pairs.typed))
    return other_than_typed(best, pairs.typed, speller.vocabulary) == pairs.classes


def _train(which: str, vocabulary: Vocabulary, recipe: Recipe, say: Say) -> tuple[Speller, dict[str, Any]]:
    speller = Speller(vocabulary, negatives=recipe.negatives)
    start = time.process_time()
    speller.name_classes()
    init_s, spent = time.process_time() - start, 0.0
    what = f"{len(vocabulary):,} classes, {which}, {recipe.examples:,} examples"
    for part, spent in _steps(which, speller, recipe):  # noqa: B007
        say(what, part)
    rates = {name: value for name, value in asdict(recipe).items() if name in ("batch", "lr", "bag_lr")}
    examples = recipe.steps * recipe.batch
    return speller, {"cpu_s": init_s + spent, "examples": examples, **rates}


def _steps(which: str, speller: Speller, recipe: Recipe) -> Iterator[tuple[float, float]]:
    """Train step by step: (share done, processor-seconds so far)."""
    if which == "dense":
        for _, part, spent in train_dense(speller, recipe, float("inf")):
            yield part, spent
    else:
        for step, steps, spent in train_selective(speller, recipe):
            yield step / steps, spent
