"""Find what can be made selective in any network: hidden layers, linear layers, the output layer."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from typing import Any

from torch import nn

from sparingly.convert._experts import expert_form
from sparingly.convert._families import ROUTER_NAMES
from sparingly.convert._match import LEAST_TOKENS, Match, common, exact_container, find_matches
from sparingly.convert._names import above, attribute, is_attention, named_matches, within
from sparingly.convert._observe import (
    Watcher,
    call_with,
    guesses,
    is_selective,
    is_transformers,
    runnable,
    sizes,
    unchanged,
    unfit,
)
from sparingly.convert._place import Place, Skipped
from sparingly.nn.conv import not_pointwise

KINDS = ("mlp", "linear", "attention", "head", "conv")


def find(model: nn.Module, where: str, example: Any = None) -> tuple[list[Place], list[Skipped]]:
    """What can be made selective, in the network's order, and what cannot, with the reason. Nothing is modified.

    One small forward is watched (see `_observe`): of `example`, else of an example made from the configuration of a
    transformers model, else of random input of the size of the first layer. What that does not reach is called alone.

    Args:
        model: any network.
        where: "mlp"; "linear": every other linear layer inside repeated blocks (all but the output layer in a network
            without such blocks); "attention": those of attention modules; "head": the output layer; "conv": pointwise
            convolutions; or a glob on names of modules ("model.layers.*.mlp"), for places of all kinds.
        example: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments for one forward.

    Raises ValueError if where is none of these or matches no module, and whatever the forward of `example` raises.
    """
    names = [name for name, _ in model.named_modules() if name]
    pattern = where not in KINDS
    if pattern and not any(fnmatch.fnmatchcase(name, where) for name in names):
        shown = ", ".join(names[:1] + names[len(names) // 2 : len(names) // 2 + 1] + names[-1:])
        raise ValueError(
            f"where must be one of {', '.join(KINDS)}, or a glob that matches names of modules "
            f"(here for example {shown or 'none: the network has no submodules'}), got {where!r}"
        )
    with unchanged(model):
        search = _Search(model, example)
        if where == "mlp":
            return search.mlps()
        if where == "head":
            return search.head()
        if where == "conv":
            return search.convolutions()
        if pattern:
            return search.glob(where)
        return search.linear_layers(attention=where == "attention")


class _Search:
    """One search, inside `unchanged`."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.watcher = model, Watcher(model)
        self.modules, self.linears = self.watcher.modules, self.watcher.linears
        self.selective = [name for name, m in self.modules.items() if is_selective(m)]
        self.reasons = {name: unfit(m) for name, m in self.linears.items()}
        for name in self.linears:
            if ".base_layer" in name or ".lora_" in name:
                self.reasons[name] = "it is part of an adapter: convert first, or merge the adapter"
            if any(within(name, done) for done in self.selective):
                self.reasons[name] = "already selective; restore_ first"
        self.blocks = self._blocks()
        self.whole = self._run(model, example)
        self.kinds_ran = {type(self.modules[name]) for name in self.watcher.log.plain}
        self.matches = find_matches(self.watcher, {})
        self._run_parts()

    # What runs.

    def _run(self, module: nn.Module, example: Any = None) -> bool:
        if not runnable(module):
            return False
        if example is not None:
            if not self.watcher.run(lambda: call_with(module, example)):
                call_with(module, example)  # raises the forward's own error
            return True
        try:
            return any(self.watcher.run(lambda guess=guess: call_with(module, guess)) for guess in guesses(module))
        except Exception as error:  # a configuration that no example can be made from
            self.watcher.error = self.watcher.error or f"{type(error).__name__}: {error}"
            return False

    def _missing(self, name: str) -> list[str]:
        inside = (n for n in self.watcher.inner.get(name, ()) if not self.watcher.log.ran(n))
        return [n for n in inside if not self.reasons[n]]

    def _run_parts(self) -> None:
        """Watch what the whole network's forward has not reached: models within models, then containers alone."""
        parts = [(n, m) for n, m in self.modules.items() if n and is_transformers(m)]
        tried = {id(self.model)}
        by_size = sorted(self.modules.items(), key=lambda item: len(self.watcher.inner.get(item[0], ())))
        holders = [(n, m) for n, m in by_size if len(self.watcher.inner.get(n, ())) >= 2]
        for name, module in parts + holders:
            if (
                id(module) in tried
                or isinstance(module, (nn.ModuleList, nn.ModuleDict))
                or len(self._missing(name)) < 2
                or not self._may_run_alone(name)
            ):
                continue
            tried.add(id(module))
            start = len(self.watcher.log.calls)
            if self._run(module):
                log = self.watcher.log
                log.calls, earlier = log.calls[start:], log.calls[:start]
                self.matches = find_matches(self.watcher, self.matches)
                log.calls = earlier + log.calls

    def _may_run_alone(self, name: str) -> bool:
        """False for a container that its parent ran around: what it computes alone is not what the network does."""
        parent = name.rpartition(".")[0]
        while isinstance(self.modules[parent], (nn.ModuleList, nn.ModuleDict)) and parent:
            parent = parent.rpartition(".")[0]
        ran = self.watcher.log.ran
        same = type(self.modules[name]) in self.kinds_ran
        inside = any(ran(n) for n in self.watcher.inner[name])
        return not ran(name) and (same or not ran(parent) or not inside)

    # Kinds of places.

    def mlps(self) -> tuple[list[Place], list[Skipped]]:
        """Places of kinds "mlp" and "experts"."""
        places, skipped = [], [Skipped(name, "already selective; restore_ first") for name in self.selective]
        for match in self.matches.values():
            reason = next((r for r in map(self.reasons.get, match.layers) if r), None)
            if reason is None:
                reason = self._doubtful(match)
            if reason:
                skipped.append(Skipped(match.down, reason))
            else:
                places.append(self._place(match))
        taken = {n for m in self.matches.values() for n in m.layers}
        for match in self._named(taken):
            taken.update(match.layers)
            places.append(self._place(match, container=False))
        more, refused = self._experts()
        places, skipped = self._ordered(places + more), skipped + refused
        skipped += self._unmatched(taken)
        skipped += [
            Skipped(n, r) for n, r in self.reasons.items() if r and n not in taken and not is_attention(self.modules, n)
        ]
        skipped = list(
            dict.fromkeys(
                s for s in skipped if not any(within(s.path, d) for d in self.selective) or s.path in self.selective
            )
        )
        if not places and not skipped:
            skipped.append(Skipped("", self._nothing()))
        return places, skipped

    def _place(self, match: Match, container: bool = True) -> Place:
        path = exact_container(self.watcher, match, self.watcher.log) if container else None
        return Place(
            path or match.down, "mlp", match.up, match.gate, match.down, match.activation, path is not None, match.fused
        )

    def _doubtful(self, match: Match) -> str | None:
        """The attention output of a single token equals its value: where a gate follows, it looks like a gated MLP."""
        if match.gate is None:
            return None
        tokens = max((c.tokens for c in self.watcher.log.calls if c.name == match.down), default=0)
        if tokens < LEAST_TOKENS and exact_container(self.watcher, match, self.watcher.log) is None:
            return "the example has a single token, on which attention looks like an activation: give more tokens"
        return None

    def linear_layers(self, attention: bool, everywhere: bool = False) -> tuple[list[Place], list[Skipped]]:
        """Linear layers by themselves; `everywhere`: also those of MLPs and outside repeated blocks, but the head."""
        taken = set() if attention or everywhere else self._taken()
        head, blocks = self._head_name(), self.blocks
        places, skipped = [], []
        for name in self.linears:
            in_block = not blocks or any(within(name, block) for block in blocks)
            if name in taken or (not everywhere and (not in_block or name == head)):
                continue
            if attention and not is_attention(self.modules, name):
                continue
            reason = self.reasons[name] or self._bypassed(name)
            if reason is None and name.rpartition(".")[2] in ROUTER_NAMES and sizes(self.linears[name])[1] < 1024:
                reason = None if name in {n for m in self.matches.values() for n in m.layers} else _ROUTER
            if reason:
                skipped.append(Skipped(name, reason))
            elif name:
                places.append(Place(name, "linear", container=False))
        if not places and not skipped:
            what = "inside attention modules" if attention else "besides those of its MLPs and its output layer"
            skipped.append(Skipped("", f"the network has no linear layers {what}"))
        return places, skipped

    def head(self) -> tuple[list[Place], list[Skipped]]:
        """The output layer."""
        name = self._head_name()
        if name is None:
            return [], [Skipped("", "the network has no output layer: it ends in no linear layer outside its blocks")]
        if any(within(name, done) for done in self.selective):
            return [], [Skipped(name, "already selective; restore_ first")]
        if name not in self.linears:
            return [], [Skipped(name, f"the output layer is a {type(self.modules[name]).__name__}, not an nn.Linear")]
        reason = self.reasons[name] or (self._bypassed(name) if self.whole else None)
        reason = reason or (None if name else "the network is itself one linear layer: wrap it in nn.Sequential")
        return ([], [Skipped(name, reason)]) if reason else ([Place(name, "head", container=False)], [])

    def convolutions(self) -> tuple[list[Place], list[Skipped]]:
        """Pointwise convolutions, whatever they read: one whose input has no zeros is none the worse for it."""
        places, skipped = [], []
        for name, module in self.modules.items():
            if not isinstance(module, nn.Conv2d):
                continue
            reason = "already selective; restore_ first" if name in self.selective else not_pointwise(module)
            reason = reason or unfit(module) or self._bypassed(name)
            reason = reason or (None if name else "the network is itself one convolution: wrap it in nn.Sequential")
            if reason:
                skipped.append(Skipped(name, reason))
            else:
                places.append(Place(name, "conv", container=False))
        if not places and not skipped:
            skipped.append(Skipped("", "the network has no convolutions (nn.Conv2d)"))
        return places, skipped

    def glob(self, pattern: str) -> tuple[list[Place], list[Skipped]]:
        """Places of all kinds whose name matches; an MLP before the linear layers inside it."""

        def fits(*names: str | None) -> bool:
            return any(name is not None and fnmatch.fnmatchcase(name, pattern) for name in names)

        mlps, no_mlps = self.mlps()
        places = [p for p in mlps if fits(p.path, common((p.up or p.path, p.down or p.path)) or None)]
        taken = {n for p in places for n in (p.path, p.down)}
        heads, _ = self.head()
        others, no_linears = self.linear_layers(attention=False, everywhere=True)
        pointwise, no_convs = self.convolutions()
        heads = [p for p in heads if fits(p.path) and p.path not in taken]
        for p in heads + others + pointwise:
            if fits(p.path) and not any(t is not None and within(p.path, t) for t in taken):
                places.append(p)
                taken.add(p.path)
        refused = no_mlps + no_linears + no_convs
        skipped = list(dict.fromkeys(s for s in refused if fits(s.path) and s.path not in taken))
        if not places and not skipped:
            what = "no MLP, no linear layer and no convolution"
            skipped.append(Skipped("", f"the modules that {pattern!r} names are {what}"))
        return self._ordered(places), skipped

    # Parts of the answers.

    def _taken(self) -> set[str]:
        """Linear layers that kind "mlp" would replace."""
        taken: set[str] = set()
        for p in self.mlps()[0]:
            taken.update(n for n in (p.up, p.gate, p.down) if n and (p.container or n == p.down))
        return taken

    def _ordered(self, places: list[Place]) -> list[Place]:
        order = {name: i for i, name in enumerate(self.modules)}
        return sorted(places, key=lambda p: order[p.path])

    def _blocks(self) -> list[str]:
        """Names of repeated blocks: members of a ModuleList, or several of one class in a Sequential."""
        blocks = []
        for name, module in self.modules.items():
            children = [(f"{name}.{n}" if name else n, c) for n, c in module.named_children()]
            children = [(n, c) for n, c in children if self.watcher.inner.get(n)]
            same = isinstance(module, nn.Sequential) and len(children) > 1 and len({type(c) for _, c in children}) == 1
            if isinstance(module, nn.ModuleList) or same:
                blocks += [n for n, _ in children]
        return blocks

    def _bypassed(self, name: str) -> str | None:
        if self.watcher.log.ran(name):
            return None
        for upper in above(name):
            module = self.modules[upper]
            if isinstance(module, nn.TransformerEncoderLayer) and within(name, upper):
                return _FAST_PATH if not name.endswith("out_proj") else _MULTIHEAD
            if isinstance(module, nn.MultiheadAttention):
                return _MULTIHEAD
        if not self.whole:
            error = f" ({self.watcher.error})" if self.watcher.error else ""
            return f"its network could not be run{error}: give example="
        return "it was not called in the example forward, so a replacement might not be either: give another example="

    def _head_name(self) -> str | None:
        if is_transformers(self.model):
            head = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
            named = next((n for n, m in self.modules.items() if m is head), None) if head is not None else None
            if named is not None:
                return named
        blocks = self.blocks
        outside = [n for n in self.linears if not any(within(n, b) for b in blocks)]
        if is_transformers(self.model):
            if "For" not in type(self.model).__name__:
                return None
            outside = [n for n in outside if not n.startswith(f"{self.model.base_model_prefix}.") and "pool" not in n]
        called = [c.name for c in self.watcher.log.calls] if self.whole else []
        last = [n for n in called if n in outside] or outside
        return last[-1] if last else None

    def _named(self, taken: set[str]) -> list[Match]:
        """MLPs by the names of their attributes, among layers that nothing could run."""
        found = []
        for holder in self.modules:
            for match, activation in named_matches(holder):
                layers = [self.modules.get(n) for n in match.layers]
                if any(n not in self.linears or n in taken or self.reasons[n] for n in match.layers):
                    continue
                elsewhere = (self._inside_torch(n) or is_attention(self.modules, n) for n in match.layers)
                if self.whole or any(elsewhere) or any(map(self.watcher.log.ran, match.layers)):
                    continue
                outs, ins = sizes(layers[0])[1], sizes(layers[-1])[0]  # pyright: ignore[reportArgumentType]
                if outs != ins * (2 if match.fused else 1):
                    continue
                act = attribute(self.model, activation) if activation else None
                taken.update(match.layers)
                found.append(replace(match, activation=act))
        return found

    def _experts(self) -> tuple[list[Place], list[Skipped]]:
        places, skipped = [], []
        for name, module in self.modules.items():
            form = None if any(within(name, done) for done in self.selective) else expert_form(module)
            if isinstance(form, str):
                skipped.append(Skipped(name, form))
            elif form is not None:
                places.append(Place(name, "experts", form=form, per_token=self.watcher.log.per_token.get(name, 1)))
        return places, skipped

    def _inside_torch(self, name: str) -> bool:
        kinds = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
        return any(isinstance(self.modules[upper], kinds) for upper in above(name))

    def _unmatched(self, taken: set[str]) -> list[Skipped]:
        """Pairs that look like an MLP by their sizes, or were never called."""
        skipped, previous = [], None
        for name, module in self.linears.items():
            if not (self.reasons[name] or name in taken or is_attention(self.modules, name)):
                if not self.watcher.log.ran(name):
                    if any(within(name, b) for b in self.blocks) or not self.whole:
                        skipped.append(Skipped(name, self._bypassed(name) or ""))
                elif previous is not None and common((previous, name)) == previous.rpartition(".")[0]:
                    (inputs, wide), (reads, outputs) = sizes(self.linears[previous]), sizes(module)
                    if wide in (reads, 2 * reads) and reads > outputs and inputs <= reads:
                        skipped.append(Skipped(name, _MIXED.format(up=previous)))
            previous = name if name not in taken else None
        return skipped

    def _nothing(self) -> str:
        linears = [m for m in self.linears.values()]
        if linears:
            return (
                f"no two of its {len(linears)} linear layers stand as linear, elementwise activation, linear; "
                "where='linear' may find more"
            )
        others = sorted({type(m).__name__ for m in self.modules.values() if m._parameters and m._modules == {}})
        return f"the network has no linear layers (its weights are in {', '.join(others) or 'no module'})"


_ROUTER = "it is a router, which decides what runs: small, and everything depends on it"
_MULTIHEAD = "nn.MultiheadAttention reads its weight without calling it: a replacement would never run"
_FAST_PATH = (
    "the fast path of nn.TransformerEncoderLayer reads its weight without calling it: a replacement would never run; "
    "torch.backends.mha.set_fastpath_enabled(False) before converting and running switches it off"
)
_MIXED = (
    "what it reads is no elementwise function of {up}'s output "
    "(a convolution, a norm or a mixing of tokens stands between)"
)
