"""The network of the spelling workload, selective or dense, and how it is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.nn import SelectiveBag, SelectiveHead
from sparingly.optim import optimizer
from sparingly.workloads._threads import one_thread
from sparingly.workloads.spell_data import Features, Noise, Vocabulary

WIDTH = 256
LOGITS = 20.0
"""Scores at the start are this times the cosine between typed word and vocabulary word."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; chosen on the dev part of the misspellings (see docs/benchmark.md).

    ``examples`` in all, ``batch`` a step, ``alpha``: words are drawn by frequency ** alpha, ``lr`` of the output
    layer, ``bag_lr`` of the n-gram table, both falling linearly to 0 after 50 steps of warm-up.
    """

    examples: int
    batch: int = 512
    negatives: int = 512
    alpha: float = 0.7
    lr: float = 1e-3
    bag_lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.99)

    @property
    def steps(self) -> int:
        """Whole batches that the examples fill, at least one."""
        return max(1, self.examples // self.batch)


class Speller(nn.Module):
    """Typed words -> scores of every word of the vocabulary: hashed n-grams, a bag, a LayerNorm and the output layer.

    ``head`` is a :class:`SelectiveHead`; the dense twin is the same network with ``head.to_linear()``.
    """

    def __init__(self, vocabulary: Vocabulary, *, negatives: int = 512, seed: int = 0):
        super().__init__()
        self.vocabulary, self.features = vocabulary, Features()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.bag = SelectiveBag(self.features.buckets, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)
            self.head = SelectiveHead(WIDTH, len(vocabulary), negatives=negatives)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids int64 [tokens, k] from ``features.encode`` -> [tokens, 256]."""
        return self.norm(self.bag(ids))

    @torch.no_grad()
    def name_classes(self) -> None:
        """Start each class at the direction of its own word, as label texts do in extreme classification.

        One pass over the classes, before training. Source: Dahiya et al., SiameseXML, ICML 2021, section 4.
        """
        for start in range(0, len(self.vocabulary), 8192):
            part = slice(start, start + 8192)
            ids = self.features.encode_codes(self.vocabulary.letters[part], self.vocabulary.lengths[part])
            rows = nn.functional.normalize(nn.functional.layer_norm(self.bag(ids), (WIDTH,)), dim=1)
            self.head.weight[part] = rows * (LOGITS / math.sqrt(WIDTH))
        assert self.head.bias is not None
        self.head.bias.zero_()

    @torch.inference_mode()
    def states(self, words: Sequence[str]) -> Tensor:
        """Hidden states [words, 256] of typed words."""
        return torch.cat([self.hidden(self.features.encode(words[i : i + 4096])) for i in range(0, len(words), 4096)])


@torch.inference_mode()
def inputs(speller: Speller, count: int, alpha: float = 0.5) -> Tensor:
    """Hidden states [count, 256] of synthetic misspellings that training has not seen, of rarer words than it saw."""
    noise = Noise(speller.vocabulary, speller.features, alpha=alpha, seed=1)
    states = torch.empty(count, WIDTH)
    for step, part in enumerate(states.split(4096)):
        part.copy_(speller.hidden(noise.batch(len(part), step)[1]))
    return states


def other_than_typed(classes: Tensor | np.ndarray, typed: Sequence[str], vocabulary: Vocabulary) -> np.ndarray:
    """First of the best two classes [n, >= 2] that is not the typed word: a misspelling is not its own correction."""
    best = np.asarray(classes)
    own = np.array([vocabulary.class_of(word) if word in vocabulary else -1 for word in typed])
    return np.where(best[:, 0] == own, best[:, 1], best[:, 0])


def exact_best(speller: Speller, states: Tensor, k: int = 2, tick: Callable[[], None] | None = None) -> Tensor:
    """Classes int64 [n, k] of the best k of all classes, by the dense product."""
    found = []
    with torch.inference_mode():
        for part in states.split(256):
            found.append(speller.head(part).topk(k).indices)
            if tick:
                tick()
    return torch.cat(found)


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 50) * (1.0 - step / steps)


def train_selective(speller: Speller, recipe: Recipe, seed: int = 0) -> Iterator[tuple[int, int, float]]:
    """Train in place; yields (steps done, steps in all, own processor-seconds so far) after every step."""
    noise = Noise(speller.vocabulary, speller.features, alpha=recipe.alpha, seed=seed)
    groups = [
        {"params": list(speller.bag.parameters()), "lr": recipe.bag_lr},
        {"params": [*speller.norm.parameters(), *speller.head.parameters()], "lr": recipe.lr},
    ]
    rule = optimizer(groups, betas=recipe.betas, weight_decay=0.0)
    steps = recipe.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: _schedule(step, steps))
    torch.manual_seed(seed)
    speller.train()
    spent = 0.0
    for step in range(steps):
        with one_thread():
            start = time.process_time()
            target, ids = noise.batch(recipe.batch, step)
            loss = speller.head.loss(speller.hidden(ids), target)
            rule.zero_grad(set_to_none=True)
            loss.backward()
            rule.step()
            schedule.step()
            spent += time.process_time() - start
        yield step + 1, steps, spent
    speller.eval()


def train_dense(speller: Speller, recipe: Recipe, budget_s: float, seed: int = 0) -> Iterator[tuple[int, float, float]]:
    """Train in place with the full softmax and AdamW; yields (steps done, share of the end reached, processor-seconds).

    Ends after ``recipe.examples``, or when ``budget_s`` processor-seconds are used up; the rate falls accordingly.
    The n-gram table learns as in the selective network (a dense update of its 262,144 rows would only add cost).
    """
    noise = Noise(speller.vocabulary, speller.features, alpha=recipe.alpha, seed=seed)
    sparse = optimizer(
        [{"params": list(speller.bag.parameters()), "lr": recipe.bag_lr}], betas=recipe.betas, weight_decay=0.0
    )
    linear = speller.head.to_linear()
    dense = torch.optim.AdamW(
        [*speller.norm.parameters(), *linear.parameters()],
        lr=recipe.lr,
        betas=recipe.betas,
        weight_decay=0.0,
        fused=True,
    )
    steps = recipe.steps
    speller.train()
    linear.weight.grad, scores = torch.empty_like(linear.weight), torch.empty(recipe.batch, linear.out_features)
    spent, step, done = 0.0, 0, 0.0
    while done < 1.0:
        rate = min(1.0, max(0.1, done / 0.03)) * (1.0 - done)
        for rule, lr in ((sparse, recipe.bag_lr), (dense, recipe.lr)):
            for group in rule.param_groups:
                group["lr"] = lr * rate
        with one_thread():
            start = time.process_time()
            target, ids = noise.batch(recipe.batch, step)
            speller.bag.zero_grad(set_to_none=True)
            speller.norm.zero_grad(set_to_none=True)
            hidden = speller.hidden(ids)
            hidden.backward(_softmax_backward(linear, hidden.detach(), target, scores))
            sparse.step()
            dense.step()
            spent += time.process_time() - start
        step += 1
        done = max(step / steps, spent / budget_s)
        yield step, min(1.0, done), spent
    linear.zero_grad(set_to_none=True)
    speller.eval()


@torch.no_grad()
def _softmax_backward(linear: nn.Linear, hidden: Tensor, target: Tensor, scores: Tensor) -> Tensor:
    """Gradient of the mean cross entropy by ``hidden`` [batch, 256]; the layer's own gradients are written in place.

    ``scores`` [batch, classes] is overwritten. What autograd does with cross_entropy costs 14 % more for a whole step
    at 20,000 classes and batch 256, most of it for fresh memory.
    """
    assert linear.weight.grad is not None
    torch.addmm(linear.bias, hidden, linear.weight.T, out=scores)
    torch.softmax(scores, dim=1, out=scores)
    scores[torch.arange(len(target)), target] -= 1.0
    scores /= len(target)
    torch.mm(scores.T, hidden, out=linear.weight.grad)
    linear.bias.grad = scores.sum(dim=0)
    return scores @ linear.weight
