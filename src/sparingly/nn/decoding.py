"""One token at a time through the layers of a converted decoder in one compiled call, inside ``generate()``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sparingly.energy import ledger
from sparingly.nn._step_plan import LEDGER, StepPlan, Unplanned, Watch

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
"""Kinds of layers whose steps are known: RMS norm, rotated queries and keys, gated MLP, two residuals."""

ROOM = "_sparingly_room"
"""Attribute of a cache of keys and values: float32 [layers, 2, heads, positions, width], of which its own are views."""
LEAST_POSITIONS = 64
NONE_YET = "none came yet"

_NAMES = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "inputs_embeds"}


class CompiledSteps:
    """Stands in for ``forward`` of a stack of decoder layers (``LlamaModel``, ``MistralModel``, ``Qwen2Model``).

    One token of one sequence, whose cache is a ``DynamicCache`` as ``generate()`` makes it, goes through all layers in
    one compiled call on one thread, without the Python between some 200 operators; the cache stays one that everything
    else can go on with. Every other call is the original's. Results are those of the modules to rounding; activations
    are float32, also where the weights are bfloat16.

    Weights are read where the modules keep them. Settings that change are noticed with the next token; weights, modules
    and hooks with the next prompt.

    Attributes:
        stack: the module.
        why_modules: why the last call took the modules, None if it was a compiled one.
    """

    def __init__(self, stack: Any):
        self.stack = stack
        self.why_modules: str | None = NONE_YET
        self.__signature__ = inspect.signature(type(stack).forward.__get__(stack))
        self._plan: StepPlan | str = NONE_YET
        self._watch: Watch | None = None
        self._look = True

    def __reduce__(self) -> Any:
        """A copy belongs to the copied stack and makes its own plan."""
        return CompiledSteps, (self.stack,)

    def __call__(self, *args: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._modules(args, named)
        reason = "arguments came by position" if args else self._unfit(named)
        if reason is None:
            reason = self._made()
        self.why_modules = reason
        if reason is None:
            return self._step(named["input_ids"], named["past_key_values"])
        self._look = True
        _hand_back(named.get("past_key_values"))
        return self._modules(args, named)

    def _modules(self, args: Any, named: Any) -> Any:
        return type(self.stack).forward(self.stack, *args, **named)

    def _unfit(self, named: dict[str, Any]) -> str | None:
        """Why this call is none for a compiled step, or None."""
        stack, ids, cache = self.stack, named.get("input_ids"), named.get("past_key_values")
        if ids is None or named.get("inputs_embeds") is not None or tuple(ids.shape) != (1, 1):
            return "not one token of one sequence"
        length = _length(cache, len(stack.layers))
        if not length:
            return "no cache of an earlier token, or not a plain DynamicCache"
        more = [
            name for name, value in named.items() if name not in _NAMES and value is not None and value is not False
        ]
        if more:
            return f"arguments {', '.join(more)}"
        config, window = stack.config, getattr(stack.config, "sliding_window", None)
        if named.get("use_cache") is False or config.output_hidden_states or config.output_attentions:
            return "no cache, hidden states or attentions are asked for"
        if torch.is_grad_enabled() or stack.training:
            return "gradients are recorded, or the model is in training mode"
        if ledger.active():
            return LEDGER
        if window is not None and window <= length:
            return f"attention sees a sliding window of {window} tokens"
        mask, position = named.get("attention_mask"), named.get("position_ids")
        if mask is not None and not (tuple(mask.shape) == (1, length + 1) and bool(mask.all())):
            return "an attention mask that leaves tokens out"
        if position is not None and position.numel() == 1 and int(position) != length:
            return "a position other than the next one"
        return None if ids.is_cpu else "not on the CPU"

    def _made(self) -> str | None:
        """Why there is no plan, or None; it is made anew if the layers changed."""
        watch = self._watch
        if watch is None or (watch.changed() if self._look else watch.switched()):
            self._watch = watch = Watch(list(self.stack.layers))
            try:
                self._plan = _plan(self.stack)
            except Unplanned as reason:
                self._plan = str(reason)
            watch.remember()
        self._look = False
        return self._plan if isinstance(self._plan, str) else None

    def _step(self, ids: Tensor, cache: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        stack, plan = self.stack, self._plan
        assert isinstance(plan, StepPlan)
        length = cache.get_seq_length()
        embedded = stack.embed_tokens(ids)
        # A copy: the embedding of one token may be a view, and this is written to.
        x = embedded[0].to(torch.float32, copy=True).contiguous()
        cos, sin = stack.rotary_emb(x, position_ids=torch.tensor([[length]]))
        room = _room(cache, length)
        plan.run(x, length, cos.contiguous(), sin.contiguous(), room)
        for layer, kept in zip(cache.layers, room[:, :, None, :, : length + 1].unbind(0), strict=True):
            layer.keys, layer.values = kept.unbind(0)
        hidden = stack.norm(x.to(embedded.dtype).unsqueeze(0))
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


def _plan(stack: Any) -> StepPlan:
    for module in (one for layer in stack.layers for one in layer.modules()):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise Unplanned(f"a {type(module).__name__} has hooks, or a forward of its own")
    config, attention = stack.config, stack.layers[0].self_attn
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    return StepPlan(list(stack.layers), (heads, shared, attention.head_dim), float(attention.scaling))


def _length(cache: Any, layers: int) -> int:
    """How many tokens a plain ``DynamicCache`` of one sequence holds; 0 for anything else."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is not DynamicCache or len(cache.layers) != layers:
        return 0
    if any([type(layer) is not DynamicLayer or layer.keys is None or len(layer.keys) != 1 for layer in cache.layers]):
        return 0
    return cache.get_seq_length()


def _room(cache: Any, length: int) -> Tensor:
    """Where a cache's keys and values lie with space for one more; they are moved there if they lie elsewhere."""
    room: Tensor | None = getattr(cache, ROOM, None)
    layers = cache.layers
    if room is not None and length < room.shape[3]:
        step = room.stride(0) * 4
        places = range(room.data_ptr(), room.data_ptr() + step * len(layers), step)
        if all([layer.keys.data_ptr() == place for layer, place in zip(layers, places, strict=True)]):
            return room
    _, heads, _, width = layers[0].keys.shape
    positions = length + max(LEAST_POSITIONS, length // 2)
    room = torch.empty(len(layers), 2, heads, positions, width, dtype=torch.float32)
    for layer, place in zip(layers, room, strict=True):
        place[0, :, :length], place[1, :, :length] = layer.keys[0], layer.values[0]
    setattr(cache, ROOM, room)
    return room


def _hand_back(cache: Any) -> None:
    """Keys and values in the dtype that the modules gave them."""
    if getattr(cache, ROOM, None) is not None:
        for layer in cache.layers:
            if layer.keys is not None and layer.keys.dtype != layer.dtype:
                layer.keys, layer.values = layer.keys.to(layer.dtype), layer.values.to(layer.dtype)


def compile_steps_(model: nn.Module) -> None:
    """Let every stack of decoder layers in ``model`` take single tokens as :class:`CompiledSteps`."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers) or "forward" in module.__dict__:
            continue
        kinds = {type(layer) for layer in layers}
        if all(kind.__name__ in LAYERS and kind.__module__.startswith("transformers.") for kind in kinds):
            module.forward = CompiledSteps(module)


def compiled_steps(model: nn.Module) -> list[CompiledSteps]:
    """What :func:`compile_steps_` put into the model."""
    found = [module.__dict__.get("forward") for module in model.modules()]
    return [one for one in found if isinstance(one, CompiledSteps)]


def drop_steps_(model: nn.Module) -> None:
    """Undo :func:`compile_steps_`."""
    for steps in compiled_steps(model):
        del steps.stack.forward
