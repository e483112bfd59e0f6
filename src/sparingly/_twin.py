"""A converted model and the dense one that it came from, as two callables that do the same work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparingly._data import batches, call, inputs, to_device
from sparingly.contract import Contract
from sparingly.convert import CONTRACT, restore_
from sparingly.metrics import Metric, as_metric, observe

Work = Callable[[], Any]


def dense_twin(model: nn.Module) -> nn.Module:
    """A restored copy: twice the memory, and the model itself stays as it is."""
    twin = copy.deepcopy(model)
    restore_(twin)
    return twin


def qualities(model: nn.Module, twin: nn.Module, data: Any, metric: Metric | str | None) -> dict[str, Any]:
    """What both answer worth: ``metric``, its value ``dense`` and ``selective``, and the mean ``drop``.

    metric None: that of the model's contract. Raises ValueError if there is none.
    """
    contract: Contract | None = getattr(model, CONTRACT, None)
    if metric is None and contract is None:
        raise ValueError("the model has no contract to take a metric from: calibrate it, or give metric=")
    measured = as_metric(contract.metric if metric is None and contract is not None else metric or "")
    dense, selective = (observe(measured, one, data) for one in (twin, model))
    drops = measured.drops(dense, selective).double()
    promise = measured.promise(0.5)
    return {
        "metric": measured.name,
        "n": len(drops),
        "dense": measured.quality(dense, dense),
        "selective": measured.quality(dense, selective),
        "drop": promise.as_drop(float(drops.mean())),
    }


def work(model: nn.Module, data: Any) -> Work:
    """One answer at batch 1 to the first example of ``data``.

    For a decoder language model that is one more token after the example, with the cache that the others left; for any
    other model a forward of the example.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    given = to_device(_first(inputs(batches(data)[0])), device)
    ids = given.get("input_ids") if isinstance(given, Mapping) else given
    if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > 1 and _decodes(model):
        return _decoding(model, ids)

    def answer() -> Any:
        with torch.no_grad():
            return call(model, given)

    return answer


def _first(given: Any) -> Any:
    """The first example of a batch's inputs."""
    return {name: value[:1] for name, value in given.items()} if isinstance(given, Mapping) else given[:1]


def _decodes(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    return hasattr(model, "generate") and bool(getattr(config, "use_cache", False)) and not config.is_encoder_decoder


def _decoding(model: Any, ids: Tensor) -> Work:
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values

    def step() -> Any:
        with torch.no_grad():
            output = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return output.logits

    return step
