"""A cascade: a cheap model answers what it is sure of, a dearer one the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparingly._data import call
from sparingly.nn._leaving import FEATURES, KINDS, MEASURES, NO_WEIGHTS, fit_learned, learned, sure_rows
from sparingly.nn._modes import evaluating

Stage = Callable[[Any], Any]

NEVER = float("inf")
"""A threshold that nothing reaches."""


class Staged(nn.Module):
    """What a cascade and a network with exits share: stages in rising order of cost, and who has left where.

    Attributes:
        names: of the stages; the answers of the last one count.
        thresholds: float64 [stages - 1]: an input leaves where the measure reaches it; infinity: none does there.
        left: int64 [stages], how many inputs have left where; ``expected``: how many did in calibration's test.
        failed: int64 [stages], how many inputs a stage was asked for when it raised; ``why_failed``: stage -> reason.
        weights: float64 [stages - 1, 5 + classes] of the measure "learned", fitted by calibration; empty before.
    """

    thresholds: Tensor
    expected: Tensor
    left: Tensor
    failed: Tensor
    weights: Tensor

    def __init__(self, names: Sequence[str], measure: str):
        super().__init__()
        if measure not in KINDS:
            raise ValueError(f"measure must be one of {', '.join(KINDS)}, got {measure!r}")
        self.measure = measure
        self._stages(names)

    def _stages(self, names: Sequence[str]) -> None:
        """Begin with stages of these names, nothing leaving before the last."""
        self.names = list(names)
        count = len(self.names)
        self.register_buffer("thresholds", torch.full((count - 1,), NEVER, dtype=torch.float64))
        self.register_buffer("expected", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(count - 1, 0, dtype=torch.float64))
        for name in ("left", "failed"):
            self.register_buffer(name, torch.zeros(count, dtype=torch.int64), persistent=False)
        self.why_failed: dict[int, str] = {}
        self._exits: Tensor | tuple[int, int] = torch.empty(0, dtype=torch.int64)

    @property
    def exits(self) -> Tensor:
        """int64 [n]: at which stage each input of the last call left."""
        if isinstance(self._exits, tuple):
            count, place = self._exits
            self._exits = torch.full((count,), place, device=self.left.device)
        return self._exits

    def stage_answers(self, inputs: Any) -> list[Tensor]:
        """Every stage's probabilities of all inputs, float32 [n, classes] each, on the CPU."""
        raise NotImplementedError

    def leaving(self, inputs: Any, by: Staged, first: int, said: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(Probabilities [n, classes], at which stage each input left, int64 [n]) as the last stage of a cascade.

        ``by``: whose thresholds count, from its stage ``first`` on. ``said``, float32 [n, classes]: log of what stages
        before answered, which every answer is multiplied by. Counts nothing.
        """
        raise NotImplementedError

    def sure(self, probabilities: Tensor, place: int) -> Tensor:
        """How sure of its answers the stage at ``place`` is: [n, classes] -> float64 [n].

        Raises RuntimeError for "learned" before calibration.
        """
        if self.measure == "learned":
            return learned(probabilities, self._learned(place, probabilities.shape[1]).to(probabilities.device))
        return MEASURES[self.measure](probabilities).double()

    def _learned(self, place: int, classes: int) -> Tensor:
        """The weights of a stage."""
        weights = self.weights[place]
        if len(weights) != FEATURES + classes:
            raise RuntimeError(
                f"the learned measure knows {max(0, len(weights) - FEATURES)} classes, not {classes}: call "
                "sparingly.calibrate(cascade, data, metric) first"
            )
        return weights

    def fit_measure(self, answers: Sequence[Tensor], as_good: Sequence[Tensor]) -> None:
        """Fit the learned measure; others have nothing to fit. Of every stage but the last: answers [n, classes], and
        how sure it is, 0..1, that they are as good as the last stage's, [n]."""
        if self.measure == "learned":
            found = [fit_learned(answer, good) for answer, good in zip(answers, as_good, strict=True)]
            self.weights = torch.stack(found).to(self.weights.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take on the size of what is learned first."""
        weights = state_dict.get(f"{prefix}weights")
        if weights is not None and weights.shape[:1] == self.weights.shape[:1]:
            self.weights = weights.new_zeros(weights.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _told(self, exits: Tensor) -> None:
        self._exits = exits
        self.left += torch.bincount(exits, minlength=len(self.names))

    def share_left(self) -> list[float]:
        """Share of the inputs that left at each stage, since it was made or calibrated; 0 before the first."""
        total = max(1, int(self.left.sum()))
        return [int(count) / total for count in self.left]

    def reset_counts(self) -> None:
        """Forget what has left where, and what failed."""
        self.left.zero_()
        self.failed.zero_()
        self.why_failed.clear()

    def extra_repr(self) -> str:
        at = ", ".join("never" if value == NEVER else f"{value:.4g}" for value in self.thresholds.tolist())
        return f"measure={self.measure!r}, thresholds: {at}"


class Cascade(Staged):
    """Stages in rising order of cost: an input leaves at the first that is sure enough, and later ones never see it.

    Batches are compacted: what has left is not computed further. A stage that raises is passed over, and counted.
    ``sparingly.calibrate(cascade, data, "accuracy", max_drop=0.005)`` finds the thresholds under an accuracy contract;
    before, every input goes to the last stage alone.

    Args:
        stages: at least two, the last one the network whose answers count. A ``torch.nn.Module`` gives logits (or has
            them in ``.logits``); what has ``predict_proba`` (scikit-learn) and any other callable gives probabilities,
            as an array or tensor [n, classes]. If the last one has exits (:func:`sparingly.add_exits_`), each of them
            is a stage of the cascade, with a threshold in the cascade's own ``thresholds``.
        measure: how sure a stage is: "maximum" (of the probabilities), "margin" (largest minus second), "entropy", or
            "learned", the chance that its answer is as good as the last stage's, from all of these and the class that
            it answers: logistic regression, fitted by calibration.
        committee: what a stage answers is multiplied by what the models before it answered (a product of experts), and
            so are the last one's answers, against which the contract is. Then no model is left out before calibration.
            The exits of one network are one model: of them only the one at which an input leaves counts.

    Viola, Jones, Rapid Object Detection using a Boosted Cascade of Simple Features, CVPR 2001; of networks: Wang and
    others, Wisdom of Committees, ICLR 2022::

        @inproceedings{wang2022wisdom, title={Wisdom of Committees: An Overlooked Approach To Faster and More Accurate
          Models}, author={Wang, Xiaofang and Kondratyuk, Dan and Christiansen, Eric and Kitani, Kris M. and
          Movshovitz-Attias, Yair and Eban, Elad}, booktitle={ICLR}, year={2022}}
    """

    def __init__(self, stages: Sequence[Stage], *, measure: str = "maximum", committee: bool = False):
        stages = list(stages)
        if len(stages) < 2:
            raise ValueError(f"a cascade needs at least 2 stages, got {len(stages)}")
        for place, stage in enumerate(stages):
            if not (callable(stage) or hasattr(stage, "predict_proba")):
                raise TypeError(f"stage {place} must be callable or have predict_proba, got {type(stage).__name__}")
            if isinstance(stage, Cascade) or (isinstance(stage, Staged) and stage is not stages[-1]):
                raise TypeError(f"stage {place} is a {type(stage).__name__}: only the last stage may have exits")
        names = [getattr(stage, "__name__", type(stage).__name__) for stage in stages]
        super().__init__([*names[:-1], *getattr(stages[-1], "names", names[-1:])], measure)
        self.stages, self.committee = stages, committee
        # Networks among them are submodules, so that .to(), .eval() and state_dict reach them.
        self.networks = nn.ModuleDict(
            {str(place): stage for place, stage in enumerate(stages) if isinstance(stage, nn.Module)}
        )

    def forward(self, inputs: Any) -> Tensor:
        """inputs: a tensor, array, sequence or mapping of them, n examples -> probabilities float32 [n, classes].

        ``exits``, int64 [n], then says at which stage each of them left. Raises ValueError if stages disagree on the
        number of classes, or give what are no probabilities, or NaN; what the last stage raises is passed on.
        """
        count, last = length(inputs), len(self.stages) - 1
        if not count:
            self._exits = torch.empty(0, dtype=torch.int64)
            return torch.empty(0)
        out = said = None
        classes = 0
        exits = waiting = torch.empty(0)
        left = 0
        for place, threshold in enumerate([*self.thresholds[:last].tolist(), -NEVER]):
            if threshold == NEVER and not self.committee:
                continue
            given, stage, within = inputs if not left else take(inputs, waiting), self.stages[place], None
            if isinstance(stage, Staged):
                answers, within = stage.leaving(given, self, place, said)
                leaves, going = torch.ones(count - left, dtype=torch.bool), count - left
            else:
                found = self._asked(place, given, place == last)
                if found is None:
                    continue
                if said is not None:
                    found = multiplied(checked(found, count - left, place), said)
                answers, leaves, going = self._leaving(place, found, count - left, threshold)
            if classes and classes != answers.shape[1]:
                raise ValueError(
                    f"stages must agree on the classes: {classes} before, {answers.shape[1]} of stage {place}"
                )
            classes = answers.shape[1]
            if not going and not self.committee:  # At batch 1 what follows would take longer than a small stage.
                continue
            if going == count and within is None:  # The usual end of a batch of one: nothing to put together.
                self._all_left(count, place)
                return answers
            if out is None:
                out = answers.new_zeros(count, answers.shape[1])
                exits, waiting = torch.full((count,), last), torch.arange(count)
            ids = waiting[leaves]
            out[ids.to(out.device)] = answers[leaves.to(answers.device)].to(out.device)
            exits[ids] = place if within is None else place + within
            waiting, left = waiting[~leaves], left + going
            if left == count:
                break
            if self.committee:
                said = logarithm(answers[~leaves.to(answers.device)])
        assert out is not None
        self._told(exits.to(self.left.device))
        return out

    def _leaving(self, place: int, found: Any, count: int, threshold: float) -> tuple[Tensor, Tensor, int]:
        """What a stage answered, checked; who leaves, bool [n] on the CPU; how many. One compiled pass where that is
        possible, for at batch 1 the calls of some small operators cost more than a small stage."""
        if isinstance(found, Tensor) and found.is_cpu and found.dtype == torch.float32:
            found = found.detach().numpy()
        plain = isinstance(found, np.ndarray) and found.dtype == np.float32 and found.flags.c_contiguous
        if plain and found.ndim == 2 and found.shape[0] == count and found.shape[1]:
            kind = 0 if abs(threshold) == NEVER else KINDS.index(self.measure)
            weights = self._learned(place, found.shape[1]).cpu().numpy() if kind == 3 else NO_WEIGHTS
            sure = np.empty(count)
            if sure_rows(found, kind, weights, sure) < 0:
                leaves = sure >= threshold
                return torch.from_numpy(found), torch.from_numpy(leaves), int(np.count_nonzero(leaves))
        answers = checked(found, count, place)
        if abs(threshold) == NEVER:
            return answers, torch.full((count,), threshold < 0), count if threshold < 0 else 0
        going = (self.sure(answers, place) >= threshold).cpu()
        return answers, going, int(going.sum())

    def _all_left(self, count: int, place: int) -> None:
        self.__dict__["_exits"] = count, place  # What nn.Module does for every attribute takes 3 us.
        left = self.left
        if left.is_cpu:
            left.numpy()[place] += count
        else:
            left[place] += count

    def stage_answers(self, inputs: Any) -> list[Tensor]:
        """See :meth:`Staged.stage_answers`; what a stage raises is passed on."""
        answers: list[Tensor] = []
        with evaluating(self), torch.no_grad():
            for place, stage in enumerate(self.stages):
                within = isinstance(stage, Staged)
                found = stage.stage_answers(inputs) if within else [asked(stage, inputs, place).cpu()]
                if self.committee and answers:
                    said = logarithm(answers[-1])
                    found = [multiplied(one, said) for one in found]
                answers += found
        return answers

    def _asked(self, place: int, given: Any, last: bool) -> Any:
        """What a stage answers; None if it raised and there is another."""
        stage = self.stages[place]
        try:
            if not isinstance(stage, nn.Module):
                return answered(stage, given)
            with evaluating(stage), torch.no_grad():
                return answered(stage, given)
        except Exception as error:
            if last:
                raise
            self.failed[place] += length(given)
            self.why_failed[place] = f"{type(error).__name__}: {error}"
            return None


def logarithm(probabilities: Tensor) -> Tensor:
    """Of probabilities, those of 0 taken as 1e-9."""
    return probabilities.clamp_min(1e-9).log()


def multiplied(found: Tensor, said: Tensor) -> Tensor:
    """The product of probabilities [n, classes] and of those whose logarithm is ``said``, with sum 1.

    Hinton, Training Products of Experts by Minimizing Contrastive Divergence, Neural Computation 2002.
    """
    return (logarithm(found) + said.to(found.device)).softmax(dim=1)


def answered(stage: Stage, inputs: Any) -> Any:
    """What a stage gives: probabilities, or of a network its softmax."""
    if isinstance(stage, nn.Module):
        found = call(stage, inputs)
        logits = getattr(found, "logits", found)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(f"a network must give logits [n, classes], got {type(logits).__name__}")
        return logits.float().softmax(dim=-1)
    given: Any = getattr(stage, "predict_proba", stage)
    return given(inputs)


def asked(stage: Stage, inputs: Any, place: int) -> Tensor:
    """:func:`answered`, :func:`checked`."""
    return checked(answered(stage, inputs), length(inputs), place)


def checked(raw: Any, count: int, place: int) -> Tensor:
    """Probabilities float32 [count, classes]. Raises TypeError or ValueError, naming the stage, for anything else."""
    if not isinstance(raw, (Tensor, np.ndarray, list)):
        raise TypeError(f"stage {place} must give an array or tensor [n, classes], got {type(raw).__name__}")
    found = torch.as_tensor(raw).float()
    if found.dim() != 2 or found.shape[0] != count or not found.shape[1]:
        raise ValueError(f"stage {place} must give [n, classes] with n = {count}, got {list(found.shape)}")
    wrong = ~(found >= -1e-6).all(dim=1) | ~((found.sum(dim=1) - 1).abs() < 1e-3)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"stage {place} must give probabilities, each at least 0 and 1 in sum, got a row of sum "
            f"{float(found[row].sum()):.4g} with least {float(found[row].min()):.4g} for example {row} of a batch; a "
            "torch.nn.Module gives logits, anything else probabilities"
        )
    return found


def length(inputs: Any) -> int:
    """How many examples there are in a tensor, array, sequence, or mapping or tuple of them."""
    if isinstance(inputs, (list, Tensor)):  # Asking for a Mapping takes longer.
        return len(inputs)
    if isinstance(inputs, Mapping):
        return length(next(iter(inputs.values()))) if inputs else 0
    return int(inputs.shape[0]) if hasattr(inputs, "shape") else len(inputs)


def take(inputs: Any, ids: Tensor) -> Any:
    """The examples ids, int64 [m], of the same kind as ``inputs``."""
    if isinstance(inputs, Mapping):
        return {name: take(value, ids) for name, value in inputs.items()}
    if isinstance(inputs, Tensor):
        return inputs[ids.to(inputs.device)]
    if hasattr(inputs, "shape"):  # NumPy, SciPy
        return inputs[ids.cpu().numpy()]
    return [inputs[place] for place in ids.tolist()]
