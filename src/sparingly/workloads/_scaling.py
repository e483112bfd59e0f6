"""Cost of an answer against the number of classes, at equal agreement, on weights and inputs like trained ones.

Up to the trained number of classes, its first ones, which are the most frequent words. Beyond, *copies*: the trained
rows turned (by an orthogonal matrix) a little way, so far that a class and its copy are as alike as a trained class and
its nearest neighbour, and the inputs turned with them. A turn keeps norms, biases, the cosines among a class's
neighbours and the scores of an input for them; it pairs axes of like variance, so that the spectrum stays too; and
copies lie between each other, so that there are more classes near every input, not only more of them elsewhere.

Other ways were tried at 1,000,000 classes from 288,992 trained ones, whose own figures are: margin of the best score
over the next one, quartiles 1.8, 3.6, 5.4; cosine to the nearest class 0.63, 0.73, 0.82 (deciles 1, 5, 9). Copies have
2.0, 3.7, 5.6 and 0.68, 0.77, 0.85. A row plus the difference of two neighbours elsewhere, with inputs moved alike, has
8.1, 11.4, 14.6 (4.4, 6.3, 8.0 if rows keep their norm): answers that are far easier to tell apart.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparingly.energy import count
from sparingly.nn import SelectiveHead
from sparingly.ops._pages import request_huge_pages
from sparingly.selectors import Graph
from sparingly.selectors._exact import exact_topk
from sparingly.workloads._engines import Engine, OnnxRuntime, TorchTuned, best_engine
from sparingly.workloads._parts import Say
from sparingly.workloads._shares import share
from sparingly.workloads._speller import Speller
from sparingly.workloads._threads import one_thread
from sparingly.workloads.spell_data import Noise, Pairs

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)
AGREEMENT = 0.99
ASKED = 0.992
"""Of the tuning inputs, so that AGREEMENT holds for the test inputs as well."""
TOKENS = 2_000
"""Inputs that tune, and as many others that test."""
INPUTS_PER_CLASS = 1.0
"""Synthetic misspellings for ``refresh``, at every size: 1.5 GB of them at 3,000,000 classes."""
STILL_AXES = 2
"""Main axes that no turn moves: the rows' mean lies there, and their variances have no like."""

Part = Callable[[str, Callable[[], Any]], Any]


class Copies:
    """Rows, biases and inputs for more classes than were trained: copy 0 is the trained bank, copy j a turned one.

    weight [n, d] and bias [n], float32. Banks of different sizes agree in the classes that both have: class
    ``j * n + c`` is copy j of class c.
    """

    def __init__(self, weight: Tensor, bias: Tensor, seed: int = 0):
        self.weight, self.bias = weight.detach(), bias.detach()
        self.seed = seed
        self._turns = [torch.eye(weight.shape[1])]

    def counts(self, size: int) -> list[int]:
        """How many classes of each copy are in a bank of ``size``: all, but for the last copy."""
        n = len(self.weight)
        return [min(n, size - start) for start in range(0, size, n)]

    @cached_property
    def _axes(self) -> Tensor:
        """[d, d] float64, one main axis a column, by falling variance."""
        return torch.linalg.eigh((self.weight.T @ self.weight).double())[1].flip(1)

    @cached_property
    def _cosines(self) -> Tensor:
        """Cosines of a sample of rows to the row nearest each, sorted."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(self.weight), generator=generator)[:1024]
        rows = torch.nn.functional.normalize(self.weight, dim=1)
        similar = torch.full((len(chosen),), -1.0)
        for start in range(0, len(rows), 1 << 15):
            part = rows[chosen] @ rows[start : start + (1 << 15)].T
            own = (chosen >= start) & (chosen < start + part.shape[1])
            part[own, chosen[own] - start] = -1.0
            similar = torch.maximum(similar, part.amax(1))
        return similar.sort().values

    def turn(self, copy: int) -> Tensor:
        """[d, d] orthogonal: rows and inputs times this are those of the copy.

        In each of many planes it turns by the angle whose cosine is the cosine of class and copy: one quantile of the
        cosines of trained classes to their nearest ones, a golden-ratio sequence of them over the copies.
        """
        while len(self._turns) <= copy:
            number, d = len(self._turns), self.weight.shape[1]
            generator = torch.Generator().manual_seed(self.seed * 100_003 + number)
            quantile = (0.5 + 0.6180339887498949 * number) % 1.0
            angle = torch.quantile(self._cosines, quantile).clamp(0.0, 1.0).acos().double()
            groups = torch.arange(STILL_AXES, d).split(8)  # Axes of like variance are paired.
            order = torch.cat([group[torch.randperm(len(group), generator=generator)] for group in groups])
            one, other = order[: len(order) // 2 * 2].view(-1, 2).T
            signs = torch.randint(2, (len(one),), generator=generator).double() * 2 - 1
            turn = torch.eye(d, dtype=torch.float64)
            turn[one, one] = turn[other, other] = angle.cos()
            turn[one, other], turn[other, one] = signs * angle.sin(), -signs * angle.sin()
            self._turns.append((self._axes @ turn @ self._axes.T).float())
        return self._turns[copy]

    def bank(self, size: int) -> tuple[Tensor, Tensor]:
        """Weight [size, d] and bias [size], float32."""
        rows, shifts, start = torch.empty(size, self.weight.shape[1]), torch.empty(size), 0
        request_huge_pages(rows)
        for copy, many in enumerate(self.counts(size)):
            part = slice(start, start + many)
            if copy:
                torch.mm(self.weight[:many], self.turn(copy), out=rows[part])
            else:
                rows[part] = self.weight[:many]
            shifts[part] = self.bias[:many]
            start += many
        return rows, shifts

    def inputs(self, states: Tensor, classes: Tensor, size: int, most: int) -> tuple[Tensor, Tensor]:
        """Up to ``most`` inputs [m, d] of a bank of ``size`` and their classes [m], of each copy in its share.

        states [k, d] are inputs for trained classes [k]. Only those whose class is in the copy are turned into it,
        and none is used twice.
        """
        generator = torch.Generator().manual_seed(self.seed)
        left = torch.randperm(len(states), generator=generator)
        turned, wanted = [], []
        for copy, many in enumerate(self.counts(size)):
            fits = classes[left] < many
            chosen = left[fits][: round(min(most, len(states)) * many / size)]
            left = left[~torch.isin(left, chosen)]
            turned.append(states[chosen] @ self.turn(copy))
            wanted.append(classes[chosen] + copy * len(self.weight))
        order = torch.randperm(sum(map(len, wanted)), generator=generator)
        return torch.cat(turned)[order], torch.cat(wanted)[order]


def learning_inputs(speller: Speller, copies: Copies, size: int, per_class: float = INPUTS_PER_CLASS) -> Tensor:
    """Inputs like those of training, bfloat16 [about per_class * size, d]: misspellings of the bank's classes.

    They are drawn for the trained classes, as for the main job, and turned into each copy.
    """
    noise = Noise(speller.vocabulary, speller.features, seed=1)
    counts = copies.counts(size)
    chances = speller.vocabulary.probabilities(0.5)[: counts[0]]
    drawn = int(per_class * counts[0])
    classes = np.random.default_rng(copies.seed).choice(counts[0], drawn, p=chances / chances.sum())
    trained = torch.empty(drawn, copies.weight.shape[1])
    for step, rows in enumerate(trained.split(8192)):
        letters = noise.misspell(classes[step * 8192 :][: len(rows)], step)
        with torch.inference_mode():
            rows.copy_(speller.hidden(speller.features.encode_codes(*letters)))
    kept = [np.flatnonzero(classes < many)[: int(per_class * many)] for many in counts]
    states, begin = torch.empty(sum(map(len, kept)), trained.shape[1], dtype=torch.bfloat16), 0
    for copy, chosen in enumerate(kept):
        for rows in torch.from_numpy(chosen).split(1 << 16):
            states[begin : begin + len(rows)] = trained[rows] @ copies.turn(copy)
            begin += len(rows)
    return states


def answer_cpu_s(head: SelectiveHead, states: Tensor, rounds: int = 5) -> float:
    """Processor-seconds of one selective answer at batch 1, one thread: median over rounds, no input twice in one."""
    costs, parts = [], states.split(1)
    with one_thread():
        for state in parts[:50]:
            head.topk(state, 5)
        for _ in range(rounds):
            start = time.process_time()
            for state in parts:
                head.topk(state, 5)
            costs.append((time.process_time() - start) / len(parts))
    return float(np.median(costs))


def engines(head: SelectiveHead) -> Sequence[Engine]:
    """Dense engines that fit: ONNX Runtime packs the weights into a third copy, and at batch 1 saves little."""
    if head.weight.nbytes > 1.5e9:
        return [TorchTuned(head)]
    return [TorchTuned(head), OnnxRuntime(head, kind="gemm")]


def agreement(head: SelectiveHead, states: Tensor) -> dict[str, float]:
    """How often the selective top-1 is the exact one, with its 95 % interval."""
    best = head.selector.topk(states, head.weight, head.bias, 1)[1][:, 0]
    exact = exact_topk(states, head.weight, head.bias, 1)[1][:, 0]
    return share((best == exact).numpy())


@torch.no_grad()
def measure(
    speller: Speller, copies: Copies, size: int, tuning: Tensor, testing: Tensor, say: Callable[[str, float], None]
) -> dict[str, Any]:
    """One row of the sweep. ``selective_cpu_s`` is None, and ``why`` says so, where no setting kept the agreement."""
    wall = time.perf_counter()
    say("making classes and inputs", 0.0)
    weight, bias = copies.bank(size)
    hidden = learning_inputs(speller, copies, size)
    head = SelectiveHead(weight.shape[1], size, selector=Graph(), device="meta")
    head.adopt(weight, bias)
    say("building the index", 0.1)
    start, began = time.process_time(), time.perf_counter()
    head.refresh(hidden)
    index_cpu_s, index_s = time.process_time() - start, time.perf_counter() - began
    inputs = len(hidden)
    del hidden
    gc.collect()
    say("choosing the setting", 0.75)
    report = head.tune(tuning, agreement=ASKED, confidence=0.95)
    row: dict[str, Any] = {
        "num_classes": size, "dense_cpu_s": None, "selective_cpu_s": None, "index_cpu_s": index_cpu_s,
        "index_s": index_s, "inputs": inputs, "tuned_on": len(tuning), "tested_on": len(testing),
        "setting": report.chosen, "agreement": None,
    }  # fmt: skip
    if report.chosen is None:
        dearest = report.tried[0]
        row["why"] = f"no setting kept {ASKED}: {dearest.setting} gave {dearest.agreement:.4f}"
    else:
        say("answering", 0.85)
        row["agreement"] = agreement(head, testing)
        row["selective_cpu_s"] = answer_cpu_s(head, testing)
        with count() as ledger:
            head.topk(testing, 5)
        row["selective_macs"], row["selective_bytes"] = ledger.macs / len(testing), ledger.bytes / len(testing)
    head.selector = Graph()  # The dense engine needs the memory.
    say("answering densely", 0.95)
    dense = best_engine(engines(head), testing, (1,), batch=1, rounds=3)
    row |= {"dense_cpu_s": dense.cpu_s, "engine": repr(dense.engine), "wall_s": time.perf_counter() - wall}
    return row


def scaling(
    speller: Speller, pairs: tuple[Pairs, Pairs], say: Say, part: Part, sizes: Sequence[int] = SIZES
) -> list[dict[str, Any]]:
    """One row a size: processor-seconds of an answer, dense and selective, at batch 1; index building apart.

    The beam is tuned on inputs of ``pairs[0]`` to an agreement of ASKED (lower bound), the agreement stated on
    inputs of ``pairs[1]``; ``part(name, work)`` keeps each row once it is there.
    """
    head = speller.head
    assert head.bias is not None
    copies = Copies(head.weight, head.bias)
    states = [(speller.states(one.typed), torch.from_numpy(one.classes)) for one in pairs]

    def work(size: int, before: int) -> dict[str, Any]:
        def tell(what: str, done: float) -> None:
            say(f"{size:,} classes: {what}", (before + done * size) / sum(sizes))

        tuning, testing = (copies.inputs(*one, size, TOKENS)[0] for one in states)
        return measure(speller, copies, size, tuning, testing, tell)

    before = [sum(sizes[:number]) for number in range(len(sizes))]
    return [part(f"scaling_{size}", partial(work, size, done)) for size, done in zip(sizes, before, strict=True)]
