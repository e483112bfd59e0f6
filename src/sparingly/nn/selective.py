"""What every layer shares that was made selective in place: its selector, its way back, and what really ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.nn._int8 import check_kind
from sparingly.nn.sample import Option, Sample
from sparingly.ops._arrays import as_numpy
from sparingly.selectors import Selector
from sparingly.selectors._weights import WeightFit
from sparingly.selectors.threshold import Threshold

OFF = "selection is switched off"
UNFITTED = "not calibrated: every unit runs"
STALE = "weights changed since the selector was fitted to them, calibrate again: every unit runs"
GRADIENTS = "gradients are recorded: one dense product of the selected values"
LEARNS = "gradients are recorded: one dense product of the selected values with the weights, not with their int8 rows"
MANY = "many tokens at once use nearly every unit: one dense product of the selected values"

NO_INT8 = "int8 rows are for linear layers, output layers, and MLPs or their second layers with a threshold"

MOST_TOKENS = 4
"""Up to so many tokens are served one by one; beyond, their units together are nearly all of them."""


class Selective(nn.Module):
    """Base of layers that stand in for a trained one and run the units that their selector names.

    Attributes:
        selector: the selector.
        ran: int64 [4]: tokens that ran selectively, units that they ran, tokens that ran dense, and of the units those
            that passed the second cut of a gated layer too.
        why_dense: reason -> how many tokens ran as one dense product because of it.
        off: every unit runs, whatever the selector says: the dense answer.
    """

    selector: Selector
    ran: Tensor
    sample_tokens = 1024
    """About how many tokens :meth:`fit` wants."""
    sample_gradients = True
    """Whether it wants gradients too."""
    reads_together = False
    """Whether the tokens of one call are so many that together they read every unit's weights, once."""
    of_mlp = False
    """True for the second layer of an MLP whose layers have no module of their own."""
    takes_int8 = True
    """Whether ``rows`` may be "int8"."""

    def _begin(self, original: nn.Module, selector: Selector) -> None:
        # In a tuple, so that the original is no submodule: its parameters are here already.
        self._original = (original,)
        self.selector = selector
        self.register_buffer("ran", torch.zeros(4, dtype=torch.int64), persistent=False)
        self.why_dense: dict[str, int] = {}
        self.off = False
        self._kind: str | None = None
        self._made: dict[str, _Kept] = {}
        self._holds = True

    @property
    def num_units(self) -> int:
        """How many units a token has to choose from."""
        raise NotImplementedError

    @property
    def rows(self) -> str | None:
        """What selected units run from: None, the weights as they are, or "int8", the same rounded, with a float32
        scale for each unit's row.

        The weights stay: dense answers and training are theirs, and int8 rows are made anew once they have changed.
        Setting it raises ValueError for another value, or for a layer that has no such rows.
        """
        return self._kind

    @rows.setter
    def rows(self, kind: str | None) -> None:
        check_kind(kind)
        if kind is not None and not self.takes_int8:
            got = f"{type(self).__name__} with {type(self.selector).__name__}"
            raise ValueError(f"rows must be None here, got {kind!r}: {NO_INT8}; this is {got}")
        self._kind = kind
        self._made.clear()

    def dense(self) -> nn.Module:
        """The layer that this one stands in for, with today's weights and their memory as it was."""
        raise NotImplementedError

    def operators(self) -> tuple[str, ...]:
        """Names of the operators that run what is selected; none where the selector's own kernel does."""
        return ()

    def unit_bytes(self) -> int:
        """Bytes of weights that one unit reads when it runs, in int8 rows where it runs from them."""
        return sum(self._unit_bytes(self.rows))

    def dense_bytes(self) -> int:
        """Bytes of weights for a token of which every unit runs from the weights as they are."""
        return self.fixed_bytes() + self.num_units * sum(self._unit_bytes(None))

    def _unit_bytes(self, kind: str | None) -> tuple[int, int]:
        """Bytes of one unit's rows of this kind: those read before a second cut, and after."""
        raise NotImplementedError

    def fixed_bytes(self) -> int:
        """Bytes of weights that every token reads, whatever is selected."""
        raise NotImplementedError

    def fit(self, sample: Sample) -> list[Option]:
        """Fit the selector -> what each of its settings costs, cheapest first; one where there is nothing to choose.

        The loss of a setting is the second-order estimate from the gradients: half the mean square, over tokens, of
        what the left-out units' contributions change.
        """
        raise NotImplementedError

    def _idle(self) -> str | None:
        """Why nothing is selected at all, or None."""
        if self.off:
            return OFF
        selector = self.selector
        if not selector.fitted:
            return UNFITTED
        holds = not isinstance(selector, WeightFit) or self._fit_holds(selector, *self._fitted_to())
        return None if holds else STALE

    def _fitted_to(self) -> tuple[Tensor, Tensor | None]:
        """Of a layer with a :class:`WeightFit`: the parameters that hold the rows and biases of :meth:`_bank`."""
        raise NotImplementedError

    def _bank(self) -> tuple[Tensor, Tensor | None]:
        """The units' rows and biases as such a selector is fitted to them."""
        return self._fitted_to()

    def _fit_holds(self, selector: WeightFit, weight: Tensor, bias: Tensor | None) -> bool:
        """False if the selector was fitted to other weights than today's; they are read after a change only.

        A step of training goes by the last fit: what is selected stays while the weights learn to do with it.
        """
        if torch.compiler.is_compiling():
            return self._holds  # As known when it was compiled: a graph holds no question about weights.
        if weight.is_meta or (torch.is_grad_enabled() and weight.requires_grad and self._trains(weight)):
            return True
        # Past the look-up of attributes by name, and of those that are set: together half of the time.
        fit = selector._buffers["fitted_to"]
        found = self._kept("holds", lambda: selector.holds_for(*self._bank()), weight, bias, fit)
        if found is not self._holds:
            self._holds = found
        return found

    def _trains(self, weight: Tensor) -> bool:
        # torch.func.functional_call puts tensors that are no parameters in their place.
        return self.training or not isinstance(weight, nn.Parameter)

    def bytes_read(self, first: float, second: float) -> float:
        """Bytes of weights for a token of which ``first`` units run, ``second`` of them to the end (a second cut)."""
        return self.fixed_bytes() + self.unit_bytes() * first

    def _kept(self, name: str, make: Callable[[], Any], *sources: Tensor | None) -> Any:
        """What ``make`` gives, kept until one of the tensors that it is made from changes.

        PyTorch does not count changes through ``.data``, by which PEFT merges adapters: each call therefore looks at
        one more value of each tensor too. Such a change of few values may pass unseen; :meth:`reset` forgets all.
        """
        found = self._made.get(name)
        if torch.compiler.is_compiling():
            return make() if found is None else found.value  # What was made before is a constant of the graph.
        mark = tuple([None if source is None else _mark(source) for source in sources])
        if found is None or found.mark != mark or not found.same():
            with torch.no_grad():
                found = self._made[name] = _Kept(mark, make(), _looks(sources))
        return found.value

    def _options(self, cost: Callable[[int], tuple[float, float, float]]) -> list[Option]:
        """What each of the selector's settings costs, cheapest first; its own stays, and is alone if there are none.

        ``cost``: called while a setting is set -> its loss, and per token how many units run and pass a second cut.
        """
        selector, before, options = self.selector, self.selector.setting, []
        for setting in selector.settings() or [before]:
            selector.setting = setting
            loss, first, second = cost(setting)
            options.append(Option(setting, loss, self.bytes_read(first, second)))
        selector.setting = before
        return options

    def share_run(self) -> float | None:
        """Share of the units that ran, 0..1, a dense token counting as all of them; None before the first token."""
        return share_of(self.ran, self.num_units)

    def reset(self) -> None:
        """Forget what ran."""
        self.ran.zero_()
        self.why_dense.clear()
        self._made.clear()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state of the dense network holds nothing of the selector: it then stays, also where all keys must fit."""
        ours = f"{prefix}selector."
        if not any(name.startswith(ours) for name in state_dict):
            state_dict.update(self.selector.state_dict(prefix=ours))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Selective:
        # What was made looks into memory that is left now.
        self._made.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_made": {}}

    def _note(self, reason: str, tokens: int) -> None:
        if torch.compiler.is_compiling():
            return
        self.why_dense[reason] = self.why_dense.get(reason, 0) + tokens
        self.ran[2] += tokens


_Look = tuple[Callable[[], Any], Any]
"""How to read one value of a tensor, and what it was."""

LOOKS = 16
"""So many values of each tensor are looked at in turn."""


class _Kept(NamedTuple):
    mark: tuple[tuple[int, int] | None, ...]
    value: Any
    looks: Iterator[tuple[_Look, ...]]

    def same(self) -> bool:
        """Whether the next value of each tensor is what it was."""
        return all([read() == bits for read, bits in next(self.looks)])


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's values lie and how often they were changed; tensors of inference mode do not count that."""
    try:
        return tensor.data_ptr(), tensor._version
    except RuntimeError:
        return tensor.data_ptr(), -1


def _looks(sources: tuple[Tensor | None, ...]) -> Iterator[tuple[_Look, ...]]:
    """Rounds without end that hold one value of each tensor that lies in the processor's memory; 0.1 us for each."""
    given = [one for one in sources if one is not None and one.is_cpu and one.numel()]
    return cycle([tuple([_look(one, number) for one in given]) for number in range(LOOKS)])


def _look(tensor: Tensor, number: int) -> _Look:
    bits = as_numpy(tensor).view(f"u{tensor.element_size()}")  # NaN differs from itself, its bits do not.
    # Parts of the golden section fall into every row and column, however many of them are taken.
    place = np.unravel_index(int(number * 0.618033988749895 % 1 * bits.size), bits.shape)
    read = bits[(*place, ...)].item
    return read, read()


def lost(contributions: Tensor, kept: Tensor) -> float:
    """contributions [tokens, units] of units to the loss, first order; kept bool -> nats per token, second order."""
    return float(contributions.masked_fill(kept, 0.0).sum(dim=1).square().mean()) / 2


def _by_level(
    sizes: tuple[Tensor, Tensor], levels: Tensor, contributions: Tensor
) -> tuple[list[float], list[list[float]]]:
    """For each of rising ``levels``: nats per token lost, and how many units reach it, before and after a second cut.

    sizes: [tokens, units] each, what the first cut and both cuts go by. All levels come from one pass: a unit counts
    at the levels up to its own.
    """
    units, steps = contributions.shape[1], levels.shape[0] + 1
    runs = []
    for size in sizes:
        reached = torch.bucketize(size, levels, right=True)
        counts = torch.bincount(reached.flatten(), minlength=steps).float() / contributions.shape[0]
        runs.append((units - counts.cumsum(0)[:-1]).tolist())
    left_out = torch.zeros(contributions.shape[0], steps, device=contributions.device)
    left_out.scatter_add_(1, torch.bucketize(sizes[1], levels, right=True), contributions)
    sums = left_out.cumsum(dim=1)[:, :-1].square().mean(dim=0) / 2
    return sums.tolist(), runs


def threshold_options(layer: Selective, values: Tensor, factor: Tensor | None, moved: Tensor) -> list[Option]:
    """What each setting of a layer's fitted :class:`Threshold` costs; its own setting stays.

    values [tokens, units] activations, factor what they are multiplied with or None, moved the loss's gradients with
    respect to the values.
    """
    selector = layer.selector
    assert isinstance(selector, Threshold)
    if not selector.quantiles.numel():
        return level_options(layer, (values, values), values * moved, lambda: selector.keeps(values))
    contributions = (values - selector.middles) * moved
    return level_options(layer, selector.sizes(values, factor), contributions, lambda: selector.keeps(values))


def level_options(
    layer: Selective, sizes: tuple[Tensor, Tensor], contributions: Tensor, kept: Callable[[], Tensor]
) -> list[Option]:
    """As :func:`threshold_options`, of sizes [tokens, units] that both cuts go by, what units contribute to the loss
    [tokens, units], and which units are kept at the setting that stands, for a threshold that was given."""
    selector = layer.selector
    assert isinstance(selector, Threshold)
    known: dict[int, tuple[float, float, float]] = {}
    if selector.quantiles.numel():
        sums, runs = _by_level(sizes, selector.levels(), contributions)
        known = dict(zip(reversed(selector.settings()), zip(sums, *runs, strict=True), strict=True))
        # At 100 % nothing is cut, not even what is as small as the smallest.
        del known[100]

    def cost(setting: int) -> tuple[float, float, float]:
        if setting in known:
            return known[setting]
        keeps = kept()
        count = float(keeps.sum(dim=1).float().mean())
        return lost(contributions, keeps), count, count

    return layer._options(cost)


def needs_gradient(x: Tensor, *parameters: Tensor | None) -> bool:
    """True if a gradient of x or of one of the parameters would be recorded."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p is not None and p.requires_grad for p in parameters))


Activation = Callable[[Tensor], Tensor]


def share_of(ran: Tensor, num_units: int) -> float | None:
    """Share of the units that ran per token, 0..1, by the counts ``ran`` of a layer; None before the first token."""
    tokens, units, dense, _ = ran.tolist()
    return (units / num_units + dense) / (tokens + dense) if tokens + dense else None


def selective_modules(model: nn.Module) -> dict[str, Selective]:
    """Every selective layer of a model by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Selective)}


L = TypeVar("L", bound=nn.Module)


def needed_layers(model: nn.Module) -> dict[str, Selective]:
    """:func:`selective_modules`; raises ValueError if there are none, or if they have no values."""
    return needed(selective_modules(model))


def needed(layers: dict[str, L]) -> dict[str, L]:
    """The layers by their names, each with ``ran``; raises ValueError if there are none, or if they have no values."""
    if not layers:
        raise ValueError("the model has no selective layers: call sparingly.convert_(model) first")
    empty = next((name for name, layer in layers.items() if layer.get_buffer("ran").is_meta), None)
    if empty is not None:
        raise ValueError(f"{empty!r} is on the meta device: move the model to another one and load its weights first")
    return layers


@contextmanager
def dense_answers(model: nn.Module) -> Iterator[None]:
    """Every selective layer answers as the dense one inside the block."""
    before = {layer: layer.off for layer in selective_modules(model).values()}
    try:
        for layer in before:
            layer.off = True
        yield
    finally:
        for layer, off in before.items():
            layer.off = off


def reset(model: nn.Module) -> None:
    """Forget what ran in every selective layer."""
    for module in selective_modules(model).values():
        module.reset()
