"""What an answer and a training example cost, dense and selective, on the three rulers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparingly.compare import paired
from sparingly.energy import count
from sparingly.nn import Plan, SelectiveHead
from sparingly.selectors import Graph
from sparingly.workloads._engines import Best, Torch, best_by_batch, best_engine, dense_engines
from sparingly.workloads._parts import Say
from sparingly.workloads._speller import Recipe, Speller, train_dense, train_selective
from sparingly.workloads.spell_data import Vocabulary

BATCHES = (1, 64, 256)
"""Larger ones made no engine cheaper per token; see _engines.py."""


def inference(speller: Speller, words: Sequence[str], rounds: int, say: Say) -> dict[str, Any]:
    """``{"batch_1": {...}, "best_batch": {...}}``: everything from n-gram ids to the best five words.

    Both sides run the same trunk; the dense one then its cheapest engine and thread count, each side in "best_batch"
    at the batch size that is cheapest for it.
    """
    ids = speller.features.encode(list(words[:1024]))
    result: dict[str, Any] = {"batch_1": {}, "best_batch": {}}
    for precision, key in (("fp32", "saving"), ("int8", "saving_int8")):
        say(f"answering one at a time and in batches, {precision}", None)
        head = speller.head if precision == "fp32" else speller.head.int8()
        engines = dense_engines(speller.head, precision)
        with torch.no_grad():
            states = speller.hidden(ids)
        one = best_engine(engines, states, (1,), batch=1, rounds=rounds)
        by_batch = best_by_batch(
            [one.engine, *(e for e in engines if e is not one.engine)], states, BATCHES[1:], rounds=3
        )
        many = min([one, *by_batch.values()], key=lambda best: best.cpu_s)
        answer = compiled(speller, head)
        own = _best_batch(answer, ids)
        for mode, best, batch in (("batch_1", one, 1), ("best_batch", many, own)):
            saving, costs = _saving(speller, head, answer, best, ids, batch, precision, rounds)
            entry = result[mode]
            entry[key] = saving
            if precision == "fp32":
                entry.update(costs, engine=f"{best.engine!r}, {best.threads} threads, batch {best.batch}")
            else:
                entry.update({f"{name}_int8": value for name, value in costs.items()})
                entry["engine_int8"] = f"{best.engine!r}, {best.threads} threads, batch {best.batch}"
        del engines
    return result


Answer = Callable[[Tensor], tuple[Tensor, Tensor]]


def compiled(speller: Speller, head: SelectiveHead) -> Answer:
    """The network's answer as one compiled call, or module by module where the head answers exactly."""
    if isinstance(head.selector, Graph) and head.selector.fitted and not head.exact:
        return Plan(speller.bag, speller.norm, head, k=min(5, head.selector.setting))
    return torch.inference_mode()(lambda ids: head.topk(speller.hidden(ids), k=5))


def _best_batch(answer: Answer, ids: Tensor, rounds: int = 3) -> int:
    """The batch size with the least processor time per token, each at the best of some rounds in turns."""
    costs = {batch: float("inf") for batch in BATCHES}
    for _ in range(rounds):
        for batch in BATCHES:
            start = time.process_time()
            for part in ids.split(batch):
                answer(part)
            costs[batch] = min(costs[batch], (time.process_time() - start) / len(ids))
    return min(BATCHES, key=costs.__getitem__)


def _saving(
    speller: Speller,
    head: SelectiveHead,
    answer: Answer,
    best: Best,
    ids: Tensor,
    batch: int,
    precision: str,
    rounds: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    width = 1 if precision == "int8" else 4
    dense_ids = ids[torch.arange(best.batch) % len(ids)]
    # One word after the other: a batch of one that repeats would find its rows in the cache.
    turns = {"dense": 0, "selective": 0}

    def part(name: str, source: Tensor, size: int) -> Tensor:
        start = turns[name] % max(1, len(source) - size + 1)
        turns[name] += size
        return source[start : start + size]

    @torch.inference_mode()
    def dense() -> None:
        best.engine.answer(speller.hidden(part("dense", dense_ids if best.batch > 1 else ids, best.batch)))

    def selective() -> None:
        # As many tokens as the dense side: the ratio of the calls is that of the tokens.
        for _ in range(max(1, best.batch // batch)):
            answer(part("selective", ids, batch))

    scale = max(1, best.batch // batch) * batch / best.batch
    # Samples of 50 ms: either side runs as it would in a row, not on caches that the other has just emptied.
    ratio = paired(dense, selective, pairs=max(10, rounds * 3), threads=best.threads, min_sample_s=0.05)
    with torch.inference_mode(), count() as full:
        Torch(speller.head).answer(speller.hidden(dense_ids))
    tokens = ids[:256]
    with torch.inference_mode(), count() as sparse:
        for group in tokens.split(batch):
            head.topk(speller.hidden(group), k=5)
    # Counted on the fp32 twin; at int8 the same reads are a quarter as many bytes of weights.
    spared = speller.head.weight.numel() * (4 - width)
    saving = {
        "cpu_s": {"value": ratio.value * scale, "lo": ratio.lo * scale, "hi": ratio.hi * scale},
        "macs": full.macs / best.batch / (sparse.macs / len(tokens)),
        "bytes": (full.bytes - spared) / best.batch / (sparse.bytes / len(tokens)),
    }
    costs = {
        "dense_cpu_s": ratio.a_s / best.batch,
        "selective_cpu_s": ratio.b_s / (max(1, best.batch // batch) * batch),
        "dense_batch": best.batch,
        "selective_batch": batch,
        "threads": best.threads,
        "dense_tried": best.tried,
    }
    return saving, costs


def training(vocabulary: Vocabulary, recipe: Recipe, rounds: int, say: Say) -> dict[str, Any]:
    """Dense ÷ selective for one example of training, each side at its cheapest batch, whole steps with optimiser."""
    best = None
    for batch in (256, 512, 1024):
        say(f"steps of the dense twin, batch {batch}", None)
        twin = Speller(vocabulary)
        steps = train_dense(twin, Recipe(1 << 40, batch=batch, alpha=recipe.alpha), float("inf"))
        _, _, before = next(steps)
        with_first = [before]
        for _ in range(2 if rounds > 3 else 1):
            _, _, after = next(steps)
            with_first.append(after)
        costs = [(b - a) / batch for a, b in pairwise(with_first)]
        if best is None or min(costs) < min(best[1]):
            best = (batch, costs)
        del steps, twin
    assert best is not None
    batch, dense = best
    say("steps of the selective network", None)
    speller = Speller(vocabulary, negatives=recipe.negatives)
    marks = []
    for step, _, spent in train_selective(
        speller, Recipe(recipe.batch * 120, recipe.batch, recipe.negatives, recipe.alpha)
    ):
        if step % 20 == 0:
            marks.append(spent)
    own = sorted((b - a) / (20 * recipe.batch) for a, b in pairwise(marks))
    middle = own[len(own) // 2]
    dense_s = sorted(dense)[len(dense) // 2]
    macs, size = _step_counts(speller, recipe, batch)
    return {
        "saving": {
            "cpu_s": {"value": dense_s / middle, "lo": min(dense) / own[-1], "hi": max(dense) / own[0]},
            "macs": macs,
            "bytes": size,
        },
        "dense_cpu_s_per_step": dense_s * batch,
        "dense_batch": batch,
        "dense_cpu_s_per_example": dense_s,
        "selective_cpu_s_per_example": middle,
        "selective_batch": recipe.batch,
    }


def _step_counts(speller: Speller, recipe: Recipe, dense_batch: int) -> tuple[float, float]:
    """Dense ÷ selective MACs and bytes of one example's training, each at its own batch, optimiser included."""
    own = Recipe(1 << 40, recipe.batch, recipe.negatives, recipe.alpha)
    dense = train_dense(speller, Recipe(1 << 40, batch=dense_batch, alpha=recipe.alpha), float("inf"))
    counts = []
    for steps, batch in ((dense, dense_batch), (train_selective(speller, own), recipe.batch)):
        next(steps)
        with count() as ledger:
            next(steps)
        counts.append((ledger.macs / batch, ledger.bytes / batch))
    return counts[0][0] / counts[1][0], counts[0][1] / counts[1][1]
