"""How sparing a converted model may be: fit its selectors, order its settings, and test them against a contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparingly._calibrate_cascade import calibrate_cascade
from sparingly._calibrate_gate import calibrate_gate
from sparingly._data import batches, call, data_hash, inputs, to_device
from sparingly._progress import Say, silent
from sparingly.contract import Contract
from sparingly.convert import CONTRACT
from sparingly.energy.machine import installed
from sparingly.guard import Promise, Walk, walk
from sparingly.metrics import Metric, as_metric, observe
from sparingly.nn.cascade import Staged
from sparingly.nn.gate import Gate
from sparingly.nn.sample import Option, gather
from sparingly.nn.selective import Selective, dense_answers, needed_layers, reset

FIT_SHARE = 0.25
"""Share of the calibration examples that selectors and path are made from; the rest tests."""

SHARES = (0.2, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1)
"""Expected losses of the path's points, in shares of the one that should just pass. The first is far below it because
that one is found on few examples; it costs little, since a point that loses little is decided early."""

SEARCHES, SEARCHED = 8, 12
"""How many settings are run to find the path's middle, on how many batches; where the estimate is right, one is
enough."""

Settings = dict[str, int]


def costs(path_options: Mapping[str, Sequence[Option]], settings: Settings) -> tuple[float, float]:
    """(estimated loss in nats per token, bytes of weights read per token) of all layers together."""
    chosen = [next(o for o in options if o.setting == settings[name]) for name, options in path_options.items()]
    return sum(option.loss for option in chosen), sum(option.size_bytes for option in chosen)


def at_price(options: Mapping[str, Sequence[Option]], nats_per_byte: float) -> Settings:
    """For each layer the setting with the least loss plus price of what it reads."""
    return {
        name: min(reversed(choices), key=lambda o: o.loss + nats_per_byte * o.size_bytes).setting
        for name, choices in options.items()
    }


def path(options: Mapping[str, Sequence[Option]], losses: Sequence[float]) -> list[Settings]:
    """The settings that read least for each estimated loss in ``losses``, from dense to sparse, without repeats.

    Every layer takes the setting that a common price of a byte, in nats, makes cheapest, so that all layers give up
    quality at the same rate; a higher price gives a sparser network.
    """
    found: list[Settings] = []
    for loss in sorted(losses):
        low, high = 1e-16, 1e6
        for _ in range(80):
            price = math.sqrt(low * high)
            if costs(options, at_price(options, price))[0] > loss:
                high = price
            else:
                low = price
        settings = at_price(options, low)
        if settings not in found:
            found.append(settings)
    return found


def apply(layers: Mapping[str, Selective], settings: Mapping[str, int]) -> None:
    """Set every layer's selector."""
    for name, setting in settings.items():
        layers[name].selector.setting = setting


def calibrate(
    model: nn.Module,
    calibration: Any,
    metric: Metric | str | Callable[..., Tensor] = "perplexity",
    max_drop: float = 0.01,
    confidence: float = 0.95,
    *,
    against: nn.Module | None = None,
    progress: Say | None = None,
) -> Contract:
    """Make a converted model as sparing as its contract allows: a drop of at most ``max_drop``, with ``confidence``.

    A quarter of the examples fits the selectors and puts their settings in order, by estimated loss per byte that is
    not read. The rest tests them, from dense to sparse, until one fails (:mod:`sparingly.guard`). The last that passed
    stays; if none did, every unit runs, and the contract says so.

    A :class:`sparingly.Cascade` gets thresholds in the same way, held against its last stage; a :class:`sparingly.Gate`
    its threshold, from a list of streams, for the miss rate that it was made with.

    Args:
        model: after :func:`sparingly.convert_`, or a cascade, or a gate (which takes no metric, drop and ``against``).
        calibration: examples like those to come, not used in training: a tensor (token ids int64 [n, T] for
            perplexity), a tuple or mapping of tensors with one length, or batches.
        metric: ``sparingly.perplexity``, ``accuracy`` or ``agreement``, or your own (model, batch) -> losses [n] in
            0..1.
        max_drop: 0.01 is one per cent of perplexity, one point of accuracy, one in a hundred answers.
        confidence: between 0 and 1.
        against: the network that the drop is a drop from, for instance the one from before :func:`sparingly.recover`.
            None: the model itself with every unit running.
        progress: called with what is being done and the share done.

    Returns the contract, which is kept with the model and saved with it.

    Raises:
        ValueError: nothing is selective; no examples, or too few for anything to pass; NaN in data or answers.
        TypeError: data or metric of another type.
    Selectors are as they were, whatever is raised.
    """
    if isinstance(model, Gate):
        if (metric, max_drop, against) != ("perplexity", 0.01, None):
            raise ValueError("a gate promises its own miss_rate: leave out metric, max_drop and against")
        return calibrate_gate(model, calibration, confidence, progress or silent)
    measured = as_metric(metric)
    if isinstance(model, Staged):
        if against is not None:
            raise ValueError("a cascade is held against its last stage: leave out against")
        return calibrate_cascade(model, calibration, measured, max_drop, confidence, progress or silent)
    layers = needed_layers(model)
    promise = measured.promise(max_drop, confidence)
    examples = batches(calibration, size=4)
    fit_on, test_on = _split(examples)
    tested = _Tested(measured, model, model if against is None else against, test_on, progress or silent)
    promise.check(tested.n)
    before = {name: _state(layer) for name, layer in layers.items()}
    found: Walk | None = None
    try:
        _switch(layers, off=False)
        tested.run_dense()
        tested.say("fitting selectors", 0.15)
        options = fit_selectors(model, fit_on)
        tested.say("looking for the settings to test", 0.35)
        tested.trail = _trail(tested, layers, options, fit_on, promise)
        found = walk(tested.trail, tested.drops, promise, tested.n)
    finally:
        reset(model)
        if found is None:
            for name, layer in layers.items():
                _put_state(layer, before[name])
    assert found is not None
    if found.chosen is None:
        _switch(layers, off=True)
    else:
        apply(layers, tested.trail[found.chosen])
    contract = _contract(tested, promise, found, examples)
    setattr(model, CONTRACT, contract)
    return contract


class _Tested:
    """The batches that settings are tested on, and what was observed there."""

    def __init__(self, metric: Metric, model: nn.Module, dense: nn.Module, data: list[Any], say: Say):
        self.metric, self.model, self.dense_model, self.data, self.say = metric, model, dense, data, say
        self.n = _count(data)
        self.dense: list[Tensor] = []
        self.trail: list[Settings] = []
        self.seen: dict[int, list[Tensor]] = {}

    def run_dense(self) -> None:
        """Observe the dense answers."""
        for place, batch in enumerate(self.data):
            self.say("running the dense model", 0.15 * place / len(self.data))
            self.dense.append(self.dense_on([batch]))

    def dense_on(self, data: list[Any]) -> Tensor:
        """What the dense network gives."""
        with dense_answers(self.dense_model):
            return observe(self.metric, self.dense_model, data)

    def drops(self, settings: Settings) -> Iterator[Tensor]:
        """What one point of the trail loses, batch by batch."""
        layers, point = needed_layers(self.model), self.trail.index(settings)
        self.seen[point] = []
        for dense, batch in zip(self.dense, self.data, strict=True):
            share = sum(map(len, self.seen.values())) / (len(self.trail) * len(self.data))
            self.say(f"testing setting {point + 1} of {len(self.trail)}", 0.5 + 0.5 * share)
            # Each time, because another point may have been tested meanwhile.
            apply(layers, settings)
            self.seen[point].append(observe(self.metric, self.model, [batch]))
            yield self.metric.drops(dense, self.seen[point][-1])


def _contract(tested: _Tested, promise: Promise, found: Walk, examples: Any) -> Contract:
    metric, dense = tested.metric, torch.cat(tested.dense)
    if found.chosen is not None:
        last = torch.cat(tested.seen[found.chosen])
    else:
        last = dense if tested.model is tested.dense_model else observe(metric, tested.model, tested.data)
    return Contract.of(
        found,
        promise,
        tested.trail,
        metric=metric.name,
        data_hash=data_hash(examples),
        dense_quality=metric.quality(dense, dense),
        selective_quality=metric.quality(dense, last),
        versions=installed(),
    )


def fit_selectors(model: nn.Module, fit_on: Sequence[Any]) -> dict[str, list[Option]]:
    """Fit every selector of a converted model to batches -> the options of those that have several settings.

    Settings stay. Raises ValueError if nothing is selective.
    """
    layers = needed_layers(model)
    device = next(iter(layers.values())).ran.device
    calls = [partial(call, model, to_device(inputs(batch), device)) for batch in fit_on]
    wanted = {name: layer.sample_tokens * (1 if layer.sample_gradients else -1) for name, layer in layers.items()}
    with dense_answers(model):
        samples = gather(model, calls, layers, wanted)
    if not samples:
        raise ValueError("the calibration examples reach none of the selective layers")
    # A layer that nothing reached (an expert that no token went to) goes on running every unit.
    options = {name: layer.fit(samples.pop(name)) for name, layer in layers.items() if name in samples}
    return {name: choices for name, choices in options.items() if len(choices) > 1}


def _trail(
    tested: _Tested,
    layers: Mapping[str, Selective],
    options: dict[str, list[Option]],
    fit_on: list[Any],
    promise: Promise,
) -> list[Settings]:
    """Settings from dense to sparse, close together where the last one should pass, from the fitting examples
    alone.

    The gradients give the loss up to a factor: they leave out how errors of layers add up, and the metric may have
    another unit. Some settings are run to find the estimate at which the mean drop and what a test adds to it for
    chance reach the limit.
    """
    if not options:
        return [{name: layer.selector.setting for name, layer in layers.items()}]
    few = fit_on[:: max(1, len(fit_on) // SEARCHED)]
    metric, dense = tested.metric, tested.dense_on(few)
    most = sum(max(option.loss for option in choices) for choices in options.values())
    estimate, low, high = min(promise.limit, most), 0.0, math.inf
    chance = NormalDist().inv_cdf(promise.confidence) / math.sqrt(tested.n)
    for _ in range(SEARCHES):
        apply(layers, path(options, [estimate])[0])
        drops = metric.drops(dense, observe(metric, tested.model, few)).double()
        wanted = promise.limit - chance * float(drops.std()) if len(drops) > 1 else promise.limit
        wanted, real = max(wanted, 0.1 * promise.limit), float(drops.mean())
        low, high = (max(low, estimate), high) if real <= wanted else (low, min(high, estimate))
        if abs(real - wanted) <= 0.1 * wanted or low >= most:
            break
        step = min(8.0, max(0.125, wanted / real)) if real > 0 else 8.0
        estimate = math.sqrt(low * high) if 0 < low < high < math.inf else min(estimate * step, most)
    return path(options, [share * estimate for share in SHARES])


def _split(examples: list[Any]) -> tuple[list[Any], list[Any]]:
    """(batches to fit on, batches to test on): every fourth, whatever order the data have; the rest is shuffled."""
    if len(examples) < 2:
        raise ValueError("calibration needs at least 2 batches, one to fit on and one to test on; give more examples")
    step = round(1 / FIT_SHARE)
    fit_on = examples[::step]
    test_on = [batch for place, batch in enumerate(examples) if place % step]
    return fit_on, [test_on[place] for place in np.random.default_rng(0).permutation(len(test_on))]


def _count(examples: list[Any]) -> int:
    def length(batch: Any) -> int:
        if isinstance(batch, Tensor):
            return len(batch)
        values = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
        return length(values[0]) if values else 0

    return sum(length(batch) for batch in examples)


def _switch(layers: Mapping[str, Selective], *, off: bool) -> None:
    for layer in layers.values():
        layer.off = off


def _state(layer: Selective) -> tuple[Any, ...]:
    selector = layer.selector
    buffers = {name: value.clone() for name, value in selector.named_buffers()}
    return (buffers, selector.setting, layer.off, layer.ran.clone(), dict(layer.why_dense))


def _put_state(layer: Selective, state: tuple[Any, ...]) -> None:
    buffers, setting, layer.off, ran, layer.why_dense = state
    layer.selector.setting = setting
    # After the setting, from which a selector may make buffers anew.
    for name, value in buffers.items():
        owner, _, leaf = name.rpartition(".")
        layer.selector.get_submodule(owner)._buffers[leaf] = value
    layer.ran.copy_(ran)
