"""Exits in a network: an input whose answer is clear halfway leaves there, and the rest never sees it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparingly._data import call
from sparingly._data import inputs as inputs_of
from sparingly._progress import Say, silent
from sparingly.nn._exit_batch import Batch
from sparingly.nn._exit_places import find_places
from sparingly.nn._modes import evaluating
from sparingly.nn._passes import run_passes
from sparingly.nn.cascade import NEVER, Staged, checked, length, multiplied


class _AllLeft(Exception):
    """Nothing is left to compute."""


class ExitHead(nn.Module):
    """Class scores from what a layer gives, pooled: normed, then linear. Sizes are those of the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm: nn.LayerNorm | None = None
        self.linear: nn.Linear | None = None

    def make(self, pooled: Tensor, classes: int) -> None:
        """Give it the sizes of ``pooled`` [n, channels]."""
        self._sized(pooled.shape[1], classes, pooled.device)

    def _sized(self, width: int, classes: int, device: torch.device) -> None:
        self.norm, self.linear = nn.LayerNorm(width).to(device), nn.Linear(width, classes).to(device)

    def forget(self) -> None:
        """As before :meth:`make`."""
        self.norm = self.linear = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take on the sizes of the state first."""
        weight = state_dict.get(f"{prefix}linear.weight")
        if self.linear is None and weight is not None:
            self._sized(weight.shape[1], weight.shape[0], weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, pooled: Tensor) -> Tensor:
        """[n, channels] -> logits [n, classes]. Raises RuntimeError before it was trained."""
        if self.norm is None or self.linear is None:
            raise RuntimeError("exits are not trained: call sparingly.train_exits(model, batches) first")
        return self.linear(self.norm(pooled))


class ExitNetwork(Staged):
    """A classifier whose inputs may leave at some of its layers; made by :func:`add_exits_`.

    At a layer with an exit, those that are sure enough leave, and what goes on is only the others' part of the batch;
    where all have left, the rest of the network does not run. A tensor that layers before an exit were given as well as
    later ones, such as an attention mask, is cut to the others' part too. Anything else that flows on must come out of
    the layer with the exit: a connection that passes it by keeps its old length, and :func:`sparingly.train_exits`
    refuses it. Where a layer is given an ``attention_mask`` [n, tokens] by name, exits pool over tokens that it keeps.

    Attributes:
        net: the network itself; ``heads``: a head for each exit.
    """

    def __init__(self, net: nn.Module, at: Sequence[str] | Literal["auto"], *, measure: str = "maximum"):
        super().__init__([type(net).__name__], measure)
        self.net, self.auto = net, at == "auto"
        self.heads: Any = nn.ModuleList()
        self._run: Callable[[int, Tensor], Tensor] | None = None
        self._batch: Batch | None = None
        self._hooks: list[Any] = []
        if isinstance(at, str) and at != "auto":
            raise ValueError(f'at must be a list of layers\' names or "auto", got {at!r}')
        if not isinstance(at, str):
            self.place(at)

    def place(self, at: Sequence[str]) -> None:
        """Put an exit at each of these layers, in the order in which they run; there are none so far. Raises ValueError
        for a name that is not there."""
        at, net = list(at), self.net
        modules = dict(net.named_modules())
        missing = [name for name in at if name not in modules or not name]
        if not at or missing or len(set(at)) < len(at):
            some = ", ".join(repr(name) for name in list(modules)[1:12])
            raise ValueError(f"at must name layers of the network, each once, such as {some}; got {at}")
        self._stages([*at, type(net).__name__])
        # Names with dots are no keys of a ModuleDict.
        self.heads.extend(ExitHead() for _ in at)
        for place, name in enumerate(at):
            self._hooks.append(modules[name].register_forward_hook(self._hook(place)))
        for module in modules.values():
            self._hooks.append(module.register_forward_pre_hook(self._given, with_kwargs=True))

    def remove(self) -> nn.Module:
        """Take every exit off, and give the network as it was before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        return self.net

    def _given(self, module: nn.Module, args: Any, named: Any) -> Any:
        return None if self._batch is None else self._batch.arguments(args, named)

    def _hook(self, place: int) -> Callable[..., Any]:
        def hook(module: nn.Module, given: Any, output: Any) -> Any:
            if self._run is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            if not isinstance(hidden, Tensor) or hidden.dim() < 2:
                raise ValueError(f"the exit at {self.names[place]!r} needs a tensor [n, ...] from that layer")
            going = self._run(place, hidden)
            if going is hidden:
                return None
            return (going, *output[1:]) if isinstance(output, tuple) else going

        return hook

    def __deepcopy__(self, memo: Any) -> ExitNetwork:
        raise TypeError("a network with exits holds hooks on its layers: copy the network, then add_exits_ to the copy")

    def collect(self, inputs: Any) -> tuple[Tensor, list[Tensor]]:
        """The network's own logits [n, classes] and what each layer with an exit gave, pooled: [n, channels] each."""
        seen: dict[int, Tensor] = {}
        batch = Batch(length(inputs))

        def run(place: int, hidden: Tensor) -> Tensor:
            if place in seen:
                raise ValueError(
                    f"the layer {self.names[place]!r} runs more than once: an exit needs one that runs once"
                )
            seen[place] = batch.pooled(hidden)
            return hidden

        logits = self._through(run, inputs, batch)
        absent = [name for place, name in enumerate(self.names[:-1]) if place not in seen]
        if absent:
            raise ValueError(f"these layers did not run, so nothing can leave there: {absent}")
        return logits, [seen[place] for place in range(len(self.heads))]

    def _through(self, run: Callable[[int, Tensor], Tensor], inputs: Any, batch: Batch) -> Tensor:
        self._run, self._batch = run, batch
        try:
            output = call(self.net, inputs)
        finally:
            self._run = self._batch = None
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the network must give logits [n, classes], got {got}")
        return logits

    def stage_answers(self, inputs: Any) -> list[Tensor]:
        """See :meth:`Staged.stage_answers`; one pass through the whole network."""
        with evaluating(self), torch.no_grad():
            logits, hidden = self.collect(inputs)
            found = [head(part) for head, part in zip(self.heads, hidden, strict=True)]
            return [_probabilities(part, place).cpu() for place, part in enumerate([*found, logits])]

    def forward(self, inputs: Any) -> Tensor:
        """inputs of the network, n examples -> probabilities float32 [n, classes]; ``exits`` says who left where."""

        out, exits = self.leaving(inputs, self, 0)
        self._told(exits.to(self.left.device))
        return out

    def leaving(self, inputs: Any, by: Staged, first: int, said: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Staged.leaving`."""
        thresholds = by.thresholds[first:].tolist()

        def leaves(place: int, found: Tensor) -> Tensor:
            return by.sure(found, first + place) >= thresholds[place]

        return self._leaving(inputs, [place for place, at in enumerate(thresholds) if at != NEVER], leaves, said)

    def _leaving(
        self,
        inputs: Any,
        open_exits: Sequence[int],
        leaves: Callable[[int, Tensor], Tensor],
        said: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Answers, and who left where, with those gone that ``leaves`` (exit, its probabilities) names, at the exits
        that are open."""
        count, last = length(inputs), len(self.heads)
        answers: list[tuple[Tensor, Tensor]] = []
        exits = torch.full((count,), last)
        batch = Batch(count)

        def answer(logits: Tensor, place: int) -> Tensor:
            found = _probabilities(logits, place)
            return found if said is None else multiplied(found, said[batch.waiting.to(said.device)])

        def run(place: int, hidden: Tensor) -> Tensor:
            if place not in open_exits:
                return hidden
            rows = len(batch.waiting)
            if hidden.shape[0] != rows:
                raise ValueError(f"the layer {self.names[place]!r} gives {hidden.shape[0]} rows for {rows} examples")
            found = answer(self.heads[place](batch.pooled(hidden)), place)
            going = leaves(place, found).cpu()
            gone = batch.leave(going)
            answers.append((gone, found[going.to(found.device)]))
            exits[gone] = place
            if not len(batch.waiting):
                raise _AllLeft
            return hidden[~going.to(hidden.device)] if len(gone) else hidden

        with evaluating(self), torch.no_grad():
            try:
                logits = self._through(run, inputs, batch)
                if logits.shape[0] != len(batch.waiting):
                    raise ValueError(
                        f"the network gives {logits.shape[0]} rows for {len(batch.waiting)} examples that are left"
                    )
                answers.append((batch.waiting, answer(logits, last)))
            except _AllLeft:
                pass
        out = answers[0][1].new_zeros(count, answers[0][1].shape[1])
        for ids, found in answers:
            out[ids.to(out.device)] = found
        return out, exits

    def check_exits(self, inputs: Any, whole: Tensor) -> None:
        """Raise ValueError unless every exit may let half of the batch go and the others' answers stay as they are:
        ``whole``, the network's own probabilities [n, classes]."""

        def every_other(place: int, found: Tensor) -> Tensor:
            return torch.arange(len(found), device=found.device) % 2 == 0

        for place, name in enumerate(self.names[:-1]):
            try:
                found, exits = self._leaving(inputs, [place], every_other)
            except (RuntimeError, ValueError, IndexError) as error:
                raise ValueError(f"nothing can leave at {name!r}: {error}") from error
            stayed = exits == len(self.heads)
            if not torch.allclose(found[stayed], whole[stayed], atol=1e-3):
                raise ValueError(
                    f"answers change when others leave at {name!r}: examples of a batch depend on one another there"
                )


def _probabilities(logits: Tensor, place: int) -> Tensor:
    """Raises ValueError for NaN."""
    return checked(logits.float().softmax(dim=1), logits.shape[0], place)


def add_exits_(net: nn.Module, at: Sequence[str] | Literal["auto"], *, measure: str = "maximum") -> ExitNetwork:
    """Let inputs leave a classifier early: ``at`` names layers of ``net``, in the order in which they run.

    The network gets a hook at each of them and is otherwise as it was; the model that is returned runs it. Train the
    exits with :func:`sparingly.train_exits`, then find their thresholds with :func:`sparingly.calibrate`. Before that
    nothing leaves.

    Args:
        net: any classifier of tensors, array-like batches or mappings: logits [n, classes], or an output with
            ``.logits``.
        at: names as in ``net.named_modules()``. "auto": :func:`sparingly.train_exits` chooses them on its first batch,
            where about a quarter and a half of the network's multiplications are done and inputs may leave.
        measure: see :class:`sparingly.Cascade`.

    Raises ValueError for a name that is not there. Teerapittayanon, McDanel, Kung, BranchyNet: Fast Inference via Early
    Exiting from Deep Neural Networks, ICPR 2016::

        @inproceedings{teerapittayanon2016branchynet, title={BranchyNet: Fast Inference via Early Exiting from Deep
          Neural Networks}, author={Teerapittayanon, Surat and McDanel, Bradley and Kung, H. T.}, booktitle={ICPR},
          year={2016}}
    """
    return ExitNetwork(net, at, measure=measure)


AUTO = (0.25, 0.5)
"""After which shares of a network's multiplications it gets exits by itself."""


def _chosen(net: nn.Module, inputs: Any) -> list[str]:
    """For each share in AUTO the nearest layer at which inputs may leave, in running order.

    Raises ValueError if there is none.
    """
    places = find_places(net, inputs, length(inputs))
    found: set[str] = set()
    for share in AUTO:
        nearest = sorted(places, key=lambda name: abs(places[name] - share))
        found.update(next(([name] for name in nearest if name in found or _may_leave(net, name, inputs)), []))
    if not found:
        raise ValueError(f"nothing can leave at any of {list(places)}: name layers yourself, at=[...]")
    return [name for name in places if name in found]


def _may_leave(net: nn.Module, name: str, inputs: Any) -> bool:
    trial = ExitNetwork(net, [name])
    try:
        with evaluating(trial), torch.no_grad():
            logits, (hidden,) = trial.collect(inputs)
            trial.heads[0].make(hidden, logits.shape[1])
            trial.check_exits(inputs, _probabilities(logits, 1))
    except ValueError:
        return False
    finally:
        trial.remove()
    return True


def train_exits(
    model: ExitNetwork,
    batches: Iterable[Any],
    *,
    epochs: int = 1,
    lr: float = 1e-3,
    freeze: bool = True,
    progress: Say | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[float]:
    """Teach every exit what the network itself answers; no labels are needed. Returns the mean loss of each epoch.

    An exit's loss is the cross-entropy with the network's own probabilities (self-distillation: Zhang and others, Be
    Your Own Teacher, ICCV 2019).

    Args:
        model: of :func:`add_exits_`.
        batches: inputs, or (inputs, targets int64 [n]); a list or a loader, gone through once an epoch.
        epochs, lr: passes, and the rate of AdamW, which falls to 0 along a cosine.
        freeze: only exits learn, from the network in evaluation mode. False: the network learns too, from targets,
            which then must be there, with every exit's loss added.
        progress: called with what is being done and the share done.
        checkpoint: a file that training goes on from after an interruption; written every 30 seconds and at the end.

    Raises ValueError if there are no batches, targets are missing, the checkpoint is of another training, examples of a
    batch depend on one another at an exit (see :class:`ExitNetwork`), or answers hold NaN; exits and network are then
    as they were.
    """
    data = list(batches)
    if not data or epochs < 1:
        raise ValueError(f"train_exits needs at least 1 batch and 1 epoch, got {len(data)} and {epochs}")
    if not freeze and not all(isinstance(batch, (tuple, list)) and len(batch) == 2 for batch in data):
        raise ValueError("without freeze the network learns from targets: give batches (inputs, targets)")
    if model.auto and not model.heads:
        model.place(_chosen(model.net, inputs_of(data[0])))
    with evaluating(model), torch.no_grad():
        logits, hidden = model.collect(inputs_of(data[0]))
        whole = _probabilities(logits, len(model.heads))
    before = copy.deepcopy((model.heads.state_dict(), {} if freeze else model.net.state_dict()))
    fresh = [head.linear is None for head in model.heads]
    try:
        for head, part in zip(model.heads, hidden, strict=True):
            if head.linear is None:
                head.make(part, logits.shape[1])
        model.check_exits(inputs_of(data[0]), whole)
        return _train(model, data, epochs, lr, freeze, progress or silent, checkpoint)
    except BaseException:
        for head, new in zip(model.heads, fresh, strict=True):
            if new:
                head.forget()
        if not any(fresh):
            model.heads.load_state_dict(before[0])
        if not freeze:
            model.net.load_state_dict(before[1])
        raise


def _train(
    model: ExitNetwork, data: list[Any], epochs: int, lr: float, freeze: bool, say: Say, checkpoint: Any
) -> list[float]:
    learning = list(model.heads.parameters()) + ([] if freeze else list(model.net.parameters()))

    def loss(batch: Any) -> Tensor:
        with torch.set_grad_enabled(not freeze):
            logits, hidden = model.collect(inputs_of(batch))
        wanted = logits.detach().float().softmax(dim=1)
        parts = [F.cross_entropy(head(one), wanted) for head, one in zip(model.heads, hidden, strict=True)]
        of_exits = torch.stack(parts).mean()
        return of_exits if freeze else of_exits + F.cross_entropy(logits.float(), batch[1])

    mode = model.net.training
    model.net.train(not freeze)
    try:
        optimizer, learner = torch.optim.AdamW(learning, lr=lr), model.heads if freeze else model
        return run_passes(data, epochs, optimizer, loss, say, "training exits", learner, checkpoint)
    finally:
        model.net.train(mode)
