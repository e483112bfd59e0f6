"""Train back what leaving units out has cost: a short distillation from the dense twin, with selection on.

The converted layers are trained to give the network its dense answers again although units are left out, which is what
self-distillation under a fixed sparsity does in Mirzadeh et al., ReLU Strikes Back (ICLR 2024, section 4; BibTeX in
``sparingly.selectors.threshold``). The loss is that of Hinton et al., Distilling the Knowledge in a Neural Network
(arXiv 1503.02531, section 2), at temperature 1; adapters are those of Hu et al., LoRA (ICLR 2022, section 4.1)::

    @article{hinton2015distilling, title={Distilling the Knowledge in a Neural Network}, author={Hinton, Geoffrey and
      Vinyals, Oriol and Dean, Jeff}, journal={arXiv:1503.02531}, year={2015}}
    @inproceedings{hu2022lora, title={{LoRA}: Low-Rank Adaptation of Large Language Models}, author={Hu, Edward J. and
      Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and Wang, Lu and Chen,
      Weizhu}, booktitle={ICLR}, year={2022}}
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparingly._data import batches as as_batches
from sparingly._data import data_hash, to_device
from sparingly._distill import (
    adapters,
    answers,
    copies,
    divergence,
    half_precision,
    inputs,
    token_weights,
    trainable,
)
from sparingly._recovery_state import FILE, load_state, save_state
from sparingly.nn._modes import frozen
from sparingly.nn.selective import dense_answers, selective_modules

__all__ = ["Recovery", "recover"]

DEFAULT_MINUTES = 15.0
LEARNING_RATES = {False: 5e-5, True: 5e-4}
"""By whether adapters are trained. Chosen on SmolLM2-135M with 30 % of the MLPs' units kept around their centres, by
the KL divergence from the dense answers on windows not yet seen, half prose and half kernel documentation, in the last
six of 24 steps of 256 tokens (one processor-minute, constant rate) against that without training: rank 16 at 5e-4
0.836; all weights at 5e-5 0.855, at 1.5e-4 0.980."""
WARMUP_STEPS = 5
LAST_RATE = 0.1
"""The cosine ends at this share of the learning rate."""
CLIP_NORM = 1.0
NOTHING = 1e-9
"""A loss below means that both sides computed the same."""
EXAMPLES = 2
"""Examples per step where ``batches`` is one data set."""
SAVE_EVERY_S = 120.0


@dataclass(frozen=True)
class Recovery:
    """What :func:`recover` did.

    Attributes:
        losses: of every step, before its update, on data not yet seen in the first pass: nats per token for scores of
            classes, else squared error relative to the dense output's mean square.
        steps, cpu_s, examples: how long it took, earlier parts of a resumed run included.
        rank: of the adapters; None: all weights of the converted layers were trained.
        trained: how many numbers were trained.
        before: the weights from before, by name; see :meth:`undo_`.
    """

    losses: list[float] = field(repr=False)
    steps: int
    cpu_s: float
    examples: int
    rank: int | None
    trained: int
    before: dict[str, Tensor] = field(repr=False)

    @torch.no_grad()
    def undo_(self, model: nn.Module) -> None:
        """Put the weights from before back into the model, or into a copy of it, converted or restored: bit for bit.

        A recovered model's dense answers are no longer those of the network that it came from: compare it, and
        calibrate it, against a copy that this was done to.

        Raises ValueError if the model is another one; nothing is changed then.
        """
        weights = dict(model.named_parameters())
        wrong = [
            name for name, value in self.before.items() if name not in weights or weights[name].shape != value.shape
        ]
        if wrong:
            raise ValueError(f"the model has no {wrong[0]} of shape {list(self.before[wrong[0]].shape)}: not the one")
        for name, value in self.before.items():
            weights[name].copy_(value)

    @property
    def loss_before(self) -> float:
        """Mean loss of the first tenth of the steps."""
        return _mean(self.losses[: self._tenth()])

    @property
    def loss_after(self) -> float:
        """Mean loss of the last tenth of the steps."""
        return _mean(self.losses[-self._tenth() :])

    def _tenth(self) -> int:
        return max(1, len(self.losses) // 10)

    def __str__(self) -> str:
        what = "all weights" if self.rank is None else f"adapters of rank {self.rank}"
        return (
            f"recovered with {what} ({self.trained:,} numbers): loss {self.loss_before:.3g} -> {self.loss_after:.3g} "
            f"in {self.steps} steps, {self.cpu_s / 60:.1f} processor-minutes"
        )


def recover(
    model: nn.Module,
    batches: Any,
    *,
    rank: int | None = 16,
    lr: float | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Recovery:
    """Train the selective layers of a converted model, in place, towards the answers of its dense twin.

    What is selected follows the selectors' settings of today; set them (or calibrate with a generous ``max_drop``)
    before, and calibrate again afterwards, on other data and against the network from before (:meth:`Recovery.undo_`).
    The model runs in evaluation mode, so without dropout. An output layer that is screened keeps its weights.

    Args:
        model: converted by ``sparingly.convert_``, on one device.
        batches: what the model takes, as for ``calibrate``: a tensor or mapping of tensors [n, ...] is cut into two
            examples a step; any other iterable is one of batches. Each pass takes them in another order. Mappings go
            in by keyword (``labels`` are left out), of a tuple or list (inputs, targets) the first; where
            ``attention_mask`` is 0 no answer is compared.
        rank: of low-rank adapters on the converted weights, merged into them at the end. None trains the weights
            themselves, biases too: no better in a few minutes, and ten times the memory and the size of the state.
        lr: AdamW's learning rate after a warm-up of 5 steps; it falls along a cosine to a tenth. None: 5e-4, or 5e-5
            without adapters.
        minutes, steps: how long; processor-minutes count every thread. One of them; neither is 15 minutes.
        folder: where the state is kept, about every two minutes and when anything stops the run. The same call on the
            same converted model goes on from there; with ``steps`` and one number of threads to the same bits.

    Whatever stops it (an error, ``KeyboardInterrupt``), the model is as it was before the call, and the folder holds
    the last whole step.

    Raises:
        ValueError: no layer of the model is selective; an option is out of range; the data are empty; a loss or
            gradient is infinite or NaN (with the number of the batch); the state in ``folder`` is damaged, or of
            another run.

    Scores of classes (an output with ``.logits``) are compared by KL divergence, dense to selective; other outputs by
    squared error. With bfloat16 instructions the products of float32 models run in bfloat16 while training.
    """
    started = time.process_time()
    _check_options(rank, lr, minutes, steps)
    if minutes is None and steps is None:
        minutes = DEFAULT_MINUTES
    lr = LEARNING_RATES[rank is not None] if lr is None else float(lr)
    weights = trainable(model, matrices=rank is not None)
    data = as_batches(batches, EXAMPLES)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    run = _Run(model, weights, data, rank, lr, minutes, steps)
    path = None if folder is None else Path(folder) / FILE
    if path is not None:
        run.same = {"rank": rank, "lr": lr, "minutes": minutes, "steps": steps} | _identity(model, weights, data)
        run.resume(path)
    with _unmoved(model):
        run.train(path, started)
    trained = sum(value.numel() for value in run.trained.values())
    made = Recovery(run.losses, run.step, run.cpu_s, run.examples, rank, trained, run.merge())
    if not made.loss_after <= made.loss_before:
        warnings.warn(f"nothing was won: {made}. Lower lr, or train longer", stacklevel=2)
    return made


class _Run:
    """One distillation: what is trained, its optimiser, and where it stands."""

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, nn.Parameter],
        data: list[Any],
        rank: int | None,
        lr: float,
        minutes: float | None,
        steps: int | None,
    ):
        self.model, self.weights, self.data = model, weights, data
        self.lr, self.minutes, self.steps = lr, minutes, steps
        self.same: dict[str, Any] = {}
        self.step, self.examples, self.cpu_s = 0, 0, 0.0
        self.losses: list[float] = []
        self.device = next(iter(weights.values())).device
        self.trained = copies(weights) if rank is None else adapters(weights, rank)
        # fused: one pass over the weights instead of about ten; at 80 million of them a tenth of a step's time.
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=lr, weight_decay=0.0, fused=True)
        # False while weights and moments are between two steps.
        self.whole = True

    def share_done(self) -> float:
        """0..1"""
        if self.steps is not None:
            return self.step / self.steps
        assert self.minutes is not None
        return min(1.0, self.cpu_s / (60.0 * self.minutes))

    def train(self, path: Path | None, started: float) -> None:
        """Until done; the state goes to ``path`` now and then, and when anything stops it."""
        earlier, due, first = self.cpu_s, time.monotonic() + SAVE_EVERY_S, self.step
        if self.share_done() >= 1.0:
            return
        with _progress() as show:
            try:
                while self.share_done() < 1.0:
                    self.one_step()
                    self.cpu_s = earlier + time.process_time() - started
                    show(self.share_done(), self.losses[-1])
                    if path is not None and time.monotonic() > due:
                        due = self.save(path)
            finally:
                if path is not None and self.whole and self.step > first:
                    self.save(path)

    def one_step(self) -> None:
        """Raises ValueError if the loss or a gradient is not finite; weights and moments are then as before."""
        number = self._batch_number()
        batch = to_device(inputs(self.data[number]), self.device)
        with half_precision(self.device, self.weights.values()):
            # The model's own weights stay as they were until the end: with every unit running it is its own dense twin.
            with torch.no_grad(), dense_answers(self.model):
                wanted, _ = answers(self.model, {}, batch)
            given, is_scores = answers(self.model, self._substitutes(), batch)
        loss = divergence(given, wanted, is_scores, token_weights(batch, given.shape[:-1], given.device))
        where = f"of batch {number} of {len(self.data)} in step {self.step}; the weights are as before"
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {float(loss.detach())} {where}. Look for NaN in that batch, or lower lr")
        if self.step == 0 and float(loss.detach()) < NOTHING:
            raise ValueError(
                "nothing is left out, so that there is nothing to recover: set the selectors' settings, or calibrate "
                "with a generous max_drop (such as 0.1) first"
            )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), CLIP_NORM)
        if not torch.isfinite(norm):
            raise ValueError(f"the gradient's norm is {float(norm)} {where}. Lower lr")
        rate = self.lr * min(1.0, (self.step + 1) / WARMUP_STEPS) * _cosine(self.share_done())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.whole = False
        self.optimizer.step()
        self.step, self.examples = self.step + 1, self.examples + len(given)
        self.losses.append(float(loss.detach()))
        self.whole = True
        self.optimizer.zero_grad()

    def _batch_number(self) -> int:
        turn, place = divmod(self.step, len(self.data))
        # A new order for each pass, and the same one after a restart.
        return int(torch.randperm(len(self.data), generator=torch.Generator().manual_seed(turn))[place])

    def _substitutes(self) -> dict[str, Tensor]:
        """The weights of this step, with their gradients' way to what is trained."""
        return {name: self._value(name).to(weight.dtype) for name, weight in self.weights.items()}

    def _value(self, name: str) -> Tensor:
        if name in self.trained:
            return self.trained[name]
        return self.weights[name].detach().float() + self.trained[f"{name}:out"] @ self.trained[f"{name}:in"]

    @torch.no_grad()
    def merge(self) -> dict[str, Tensor]:
        """Write what was learned into the model's own parameters, whose memory stays -> copies from before."""
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.copy_(self._value(name))
        return before

    def save(self, path: Path) -> float:
        """Write the state after the last whole step -> when to do it again: saving takes 2 % of the time at most."""
        begun, tensors = time.monotonic(), {}
        for name, value in self.trained.items():
            tensors[f"value:{name}"] = value
            for key, moment in self.optimizer.state[value].items():
                tensors[f"{key}:{name}"] = moment
        where = {"step": self.step, "examples": self.examples, "cpu_s": self.cpu_s, "losses": self.losses}
        save_state(path, tensors, self.same | where)
        took = time.monotonic() - begun
        return time.monotonic() + max(SAVE_EVERY_S, 50.0 * took)

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Go on from the state in ``path``, if there is one. Raises ValueError if it is damaged or of another run."""
        if not path.exists():
            return
        wanted = {}
        for name, value in self.trained.items():
            wanted |= {f"{key}:{name}": value.shape for key in ("value", "exp_avg", "exp_avg_sq")}
            wanted[f"step:{name}"] = torch.Size()
        tensors, where = load_state(path, wanted, self.same)
        for name, value in self.trained.items():
            value.copy_(tensors[f"value:{name}"])
            moments = {key: tensors[f"{key}:{name}"].to(self.device) for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[value] = moments
        self.step, self.examples, self.cpu_s = where["step"], where["examples"], where["cpu_s"]
        self.losses = list(where["losses"])


def _check_options(rank: Any, lr: Any, minutes: Any, steps: Any) -> None:
    if minutes is not None and steps is not None:
        raise ValueError(f"give minutes or steps, not both: got minutes={minutes}, steps={steps}")
    for name, value in (("rank", rank), ("steps", steps)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a whole number from 1, or None, got {value!r}")
    for name, value in (("lr", lr), ("minutes", minutes)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number over 0, or None, got {value!r}")


@contextlib.contextmanager
def _unmoved(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients of the model's own parameters; modes, flags and counts are put back."""
    counts = [(layer, layer.ran.clone(), dict(layer.why_dense)) for layer in selective_modules(model).values()]
    try:
        with frozen(model), torch.enable_grad():
            yield
    finally:
        for layer, ran, why in counts:
            layer.ran.copy_(ran)
            layer.why_dense.clear()
            layer.why_dense.update(why)


def _identity(model: nn.Module, weights: Mapping[str, Tensor], data: Any) -> dict[str, str]:
    """Hashes of what a run began with: of the data, the weights, and what the selectors hold."""
    selectors = {
        name: [dict(layer.selector.state_dict()), layer.selector.setting, layer.off]
        for name, layer in selective_modules(model).items()
    }
    return {"data": data_hash(data), "weights": data_hash(dict(weights)), "selectors": data_hash(selectors)}


def _cosine(share: float) -> float:
    return LAST_RATE + (1.0 - LAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * share))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A function (share done, loss) that shows both on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("recover"), BarColumn(), TaskProgressColumn(), TextColumn("loss {task.description}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=1.0)

        def show(share: float, loss: float) -> None:
            progress.update(task, completed=share, description=f"{loss:.3g}")

        yield show
