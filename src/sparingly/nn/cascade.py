"""A cascade: a cheap model answers what it is sure of, a dearer one the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparingly._data import call
from sparingly.nn._modes import evaluating

Stage = Callable[[Any], Any]

NEVER = float("inf")
"""A threshold that nothing reaches."""

LEAST = 1e-9
"""Probabilities of 0 count as this much in a product."""


def maximum(probabilities: Tensor) -> Tensor:
    """The largest probability, [n, classes] -> [n]."""
    return probabilities.amax(dim=1)


def margin(probabilities: Tensor) -> Tensor:
    """The largest probability minus the second, [n, classes] -> [n]."""
    best = probabilities.topk(min(2, probabilities.shape[1]), dim=1).values
    return best[:, 0] - best[:, -1] if best.shape[1] > 1 else best[:, 0]


def entropy(probabilities: Tensor) -> Tensor:
    """1 minus entropy ÷ its maximum, so that higher is surer, [n, classes] -> [n]."""
    most = float(np.log(max(2, probabilities.shape[1])))
    return 1 + torch.special.xlogy(probabilities, probabilities).sum(dim=1) / most


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"maximum": maximum, "margin": margin, "entropy": entropy}


class Staged(nn.Module):
    """What a cascade and a network with exits share: stages in rising order of cost, and who has left where.

    Attributes:
        names: of the stages; the answers of the last one count.
        thresholds: float64 [stages - 1]: an input leaves where the measure reaches it; infinity: none does there.
        left: int64 [stages], how many inputs have left where; ``expected``: how many did in calibration's test.
        failed: int64 [stages], how many inputs a stage was asked for when it raised; ``why_failed``: stage -> reason.
        exits: int64 [n], at which stage each input of the last call left.
    """

    thresholds: Tensor
    expected: Tensor
    left: Tensor
    failed: Tensor

    def __init__(self, names: Sequence[str], measure: str):
        super().__init__()
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        self.names, self.measure = list(names), measure
        count = len(self.names)
        self.register_buffer("thresholds", torch.full((count - 1,), NEVER, dtype=torch.float64))
        self.register_buffer("expected", torch.zeros(count, dtype=torch.int64))
        for name in ("left", "failed"):
            self.register_buffer(name, torch.zeros(count, dtype=torch.int64), persistent=False)
        self.why_failed: dict[int, str] = {}
        self.exits = torch.empty(0, dtype=torch.int64)

    def stage_answers(self, inputs: Any) -> list[Tensor]:
        """Every stage's probabilities of all inputs, float32 [n, classes] each, on the CPU."""
        raise NotImplementedError

    def leaving(self, inputs: Any, thresholds: Tensor, said: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(Probabilities [n, classes], at which stage each input left, int64 [n]) with these thresholds, uncounted.

        ``said``, float32 [n, classes]: log of what stages before these answered, which every answer is multiplied by.
        """
        raise NotImplementedError

    def sure(self, probabilities: Tensor) -> Tensor:
        """How sure of its answers a stage is: [n, classes] -> float64 [n]."""
        return MEASURES[self.measure](probabilities).double()

    def _told(self, exits: Tensor) -> None:
        self.exits = exits
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
        measure: how sure a stage is: "maximum" (of the probabilities), "margin" (largest minus second) or "entropy".
        committee: what a stage answers is multiplied by what the models before it answered (a product of experts), and
            so are the last one's answers, against which the contract is. Then no stage is left out before calibration.
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
        names = [getattr(stage, "__name__", type(stage).__name__) for stage in stages]
        within = stages[-1].names if isinstance(stages[-1], Staged) else names[-1:]
        super().__init__([*names[:-1], *within], measure)
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
        out, exits = self.leaving(inputs, self.thresholds)
        self._told(exits)
        return out

    def leaving(self, inputs: Any, thresholds: Tensor, said: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Staged.leaving`."""
        count, last = length(inputs), len(self.stages) - 1
        out, device = torch.empty(0), thresholds.device
        exits = torch.full((count,), len(self.names) - 1, device=device)
        waiting = torch.arange(count, device=device)
        with evaluating(self), torch.no_grad():
            for place, stage in enumerate(self.stages):
                if place < last and float(thresholds[place]) == NEVER and not self.committee:
                    continue
                if not len(waiting):
                    break
                given = inputs if len(waiting) == count else take(inputs, waiting)
                leaves = torch.ones(len(waiting), dtype=torch.bool, device=device)
                if place == last and isinstance(stage, Staged):
                    found, within = stage.leaving(given, thresholds[place:], said)
                    exits[waiting] = place + within.to(device)
                else:
                    found = self._asked(place, given, place == last)
                    if found is None:
                        continue
                    found = found if said is None else multiplied(found, said)
                    if place < last:
                        leaves = self.sure(found).to(device) >= thresholds[place]
                    exits[waiting[leaves]] = place
                out = self._room(out, found, count, place)
                out[waiting[leaves]] = found[leaves.to(found.device)].to(out.device)
                waiting = waiting[~leaves]
                stays = ~leaves.to(found.device)
                said = found[stays].clamp_min(LEAST).log() if self.committee else said if said is None else said[stays]
        return out, exits

    def stage_answers(self, inputs: Any) -> list[Tensor]:
        """See :meth:`Staged.stage_answers`; what a stage raises is passed on."""
        answers: list[Tensor] = []
        with evaluating(self), torch.no_grad():
            for place, stage in enumerate(self.stages):
                within = isinstance(stage, Staged) and place == len(self.stages) - 1
                found = stage.stage_answers(inputs) if within else [asked(stage, inputs, place).cpu()]
                if self.committee and answers:
                    said = answers[-1].clamp_min(LEAST).log()
                    found = [multiplied(one, said) for one in found]
                answers += found
        return answers

    def _asked(self, place: int, given: Any, last: bool) -> Tensor | None:
        """What a stage answers; None if it raised and there is another."""
        try:
            raw = answered(self.stages[place], given)
        except Exception as error:
            if last:
                raise
            self.failed[place] += length(given)
            self.why_failed[place] = f"{type(error).__name__}: {error}"
            return None
        return checked(raw, length(given), place)

    def _room(self, out: Tensor, found: Tensor, count: int, place: int) -> Tensor:
        if not out.numel():
            return found.new_zeros(count, found.shape[1])
        if out.shape[1] != found.shape[1]:
            raise ValueError(
                f"stages must agree on the classes: {out.shape[1]} before, {found.shape[1]} of stage {place}"
            )
        return out


def multiplied(found: Tensor, said: Tensor) -> Tensor:
    """The product of probabilities [n, classes] and of those whose log is ``said``, with sum 1.

    Hinton, Training Products of Experts by Minimizing Contrastive Divergence, Neural Computation 2002.
    """
    return (found.clamp_min(LEAST).log() + said.to(found.device)).softmax(dim=1)


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
