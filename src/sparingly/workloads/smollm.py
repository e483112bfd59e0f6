"""SmolLM2-135M made selective without training: as sparing as one per cent of perplexity allows, and what that saves.

The network comes from a package, the text from two Debian packages (``smollm_data.py``). Selectors and the order of
settings are made from a quarter of the calibration windows, the contract is tested on the rest, and every figure below
is of documents that neither has seen.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.calibrate import apply, calibrate, fit_selectors, path
from sparingly.contract import Contract
from sparingly.convert import convert_, restore_
from sparingly.energy import count
from sparingly.explain import explain
from sparingly.metrics import perplexity
from sparingly.nn.selective import needed_layers, reset, selective_modules
from sparingly.recover import recover
from sparingly.selectors import LowRank, Random, Screen, Selector, Threshold
from sparingly.store import load, save
from sparingly.workloads import smollm_data as data
from sparingly.workloads._decoders import Decoder
from sparingly.workloads._engines import best_engine, dense_engines
from sparingly.workloads._parts import Say, cache_folder, document, parts_of
from sparingly.workloads._planned_decoder import PlannedDecoder
from sparingly.workloads._shares import share
from sparingly.workloads._threads import one_thread

TITLE = "SmolLM2-135M, converted without training"
CONFIDENCE = 0.95
RECOVERY_WINDOWS, RECOVERY_LOSS, RECOVERY_RATE = 400, 0.02, 1e-4
"""Of each kind of text; the estimated loss at which is trained, in nats per token; and the learning rate."""


@dataclass(frozen=True)
class Mode:
    """How much is done: calibration and held-out windows of each kind of text, their length, prompts, timing rounds,
    processor-minutes of recovery; and the contract."""

    name: str
    max_drop: float
    calibration: int
    held_out: int
    length: int
    prompts: int
    rounds: int
    minutes: int


MODES = {
    # So few words cannot show that one per cent is kept.
    "quick": Mode("quick", 0.05, 26, 6, 64, 2, 3, 0),
    "default": Mode("default", 0.01, 64, 40, 256, 12, 8, 0),
    "full": Mode("full", 0.01, 100, 120, 256, 24, 12, 29),
}


class SmolLM:
    """One run of the workload in one mode; every step is a part that is kept once it is done."""

    def __init__(self, mode: Mode, say: Say, *, fresh: bool = False):
        self.mode, self.say = mode, say
        self.parts = parts_of("smollm", mode, fresh=fresh)
        self.folder = cache_folder() / f"smollm-{mode.name}-model"

    @cached_property
    def texts(self) -> data.Texts:
        return data.texts()

    @cached_property
    def dense(self) -> Any:
        """The dense twin."""
        return data.load_model().eval()

    @cached_property
    def selective(self) -> Any:
        """The converted and calibrated network."""
        return load(self.folder).eval()

    def windows(self, part: str, kind: str, n: int) -> Tensor:
        return self.texts.windows(part, kind, n, self.mode.length)

    def convert(self) -> dict[str, Any]:
        """Convert, calibrate on both kinds of text, save."""
        model = copy.deepcopy(self.dense)
        start = time.process_time()
        convert_(model)
        contract = self._calibrate(model, "making it selective")
        spent = time.process_time() - start
        save(model, self.folder)
        return {"contract": contract.as_dict(), "cpu_s": spent}

    def _calibrate(self, model: nn.Module, what: str) -> Contract:
        """On both kinds of text, against the network from the package."""
        self.say("reading text", None)
        both = [self.windows("calibration", kind, self.mode.calibration) for kind in data.KINDS]
        # In turns, so that every fourth batch, which fits selectors, holds as much of each.
        return calibrate(
            model, torch.stack(both, dim=1).flatten(0, 1), perplexity, self.mode.max_drop, CONFIDENCE,
            against=self.dense, progress=lambda step, part: self.say(f"{what}: {step}", part),
        )  # fmt: skip

    def quality(self) -> dict[str, Any]:
        """Perplexity of both networks on held-out windows, and how often their best next token is the same."""
        entry: dict[str, Any] = {"metric": "perplexity", "n": len(data.KINDS) * self.mode.held_out}
        drops, agree, dense_losses = [], [], []
        for kind in data.KINDS:
            ids = self.windows("held_out", kind, self.mode.held_out)
            what = f"held-out perplexity, {kind}"
            dense, best = self._losses(self.dense, ids, lambda part, what=what: self.say(what, part / 2))
            own, own_best = self._losses(self.selective, ids, lambda part, what=what: self.say(what, 0.5 + part / 2))
            entry[kind] = _perplexities(dense, own)
            drops.append(own - dense)
            dense_losses.append(dense)
            agree.append((best == own_best).flatten())
        entry |= _perplexities(torch.cat(dense_losses), torch.cat(dense_losses) + torch.cat(drops))
        entry["agreement"] = share(torch.cat(agree).numpy())
        entry["text_sha256"] = {kind: self.texts.sha256(kind) for kind in data.KINDS}
        return entry

    @torch.no_grad()
    def _losses(self, model: nn.Module, ids: Tensor, tick: Callable[[float], None]) -> tuple[Tensor, Tensor]:
        """Mean log-loss of each window [n] and the best next token at each place [n, length - 1]."""
        losses, best = [], []
        for place, batch in enumerate(ids.split(4)):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
            flat = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            losses.append(flat.view(len(batch), -1).double().mean(1))
            best.append(logits.argmax(-1))
            tick((place + 1) * 4 / len(ids))
        return torch.cat(losses), torch.cat(best)

    def continuations(self) -> dict[str, Any]:
        """Greedy continuations of 32 tokens: how many are the dense network's, and how long they stay so."""
        from sparingly.workloads._decoding import greedy

        prompts = self.texts.prompts(self.mode.prompts)
        dense, own = Decoder(self.dense), self.decoder()
        same, prefix = [], []
        for place, prompt in enumerate(prompts):
            self.say("greedy continuations", place / len(prompts))
            pair = [greedy(engine, prompt, 32) for engine in (dense, own)]
            equal = [a == b for a, b in zip(*pair, strict=True)]
            same.append(all(equal))
            prefix.append(equal.index(False) if not all(equal) else len(equal))
        return {"n": len(prompts), "identical": share(np.array(same)), "mean_common_tokens": float(np.mean(prefix))}

    def decoder(self, precision: str = "fp32") -> Decoder:
        """The selective network's decoder: one compiled call a layer."""
        return PlannedDecoder(self._in(precision), precision)

    def _in(self, precision: str) -> Any:
        """The selective network itself in fp32, a copy with the same settings in bf16 or with int8 rows."""
        if precision == "fp32":
            return self.selective
        model = copy.deepcopy(self.selective)
        if precision == "bf16":
            return model.to(torch.bfloat16)
        for layer in selective_modules(model).values():
            layer.rows = "int8"
        return model

    def decode(self) -> dict[str, Any]:
        """Dense ÷ selective for one decoded token, at batch 1, on the three rulers, one thread.

        The contract was tested in fp32, of which bf16 and int8 are roundings: what int8 rows lose stands beside it.
        """
        result: dict[str, Any] = {}
        ids = self.windows("held_out", "prose", 1)[0].tolist()
        for precision, key in (("fp32", "saving"), ("bf16", "saving_bf16"), ("int8", "saving_int8")):
            self.say(f"decoding, {precision}", None)
            dense, own = Decoder(self.dense, precision), self.decoder(precision)
            times = _paired(dense, own, ids, self.mode.rounds)
            ledgers = [_ledger(engine, ids) for engine in (dense, own)]
            result[key] = {
                "cpu_s": times["ratio"],
                "macs": ledgers[0].macs / ledgers[1].macs,
                "bytes": ledgers[0].bytes / ledgers[1].bytes,
            }
            suffix = "" if precision == "fp32" else f"_{precision}"
            result |= {f"{name}{suffix}": times[name] for name in ("dense_cpu_s", "selective_cpu_s")}
            result |= {f"dense_bytes{suffix}": ledgers[0].bytes, f"selective_bytes{suffix}": ledgers[1].bytes}
            result[f"engine{suffix}"] = f"{dense!r}, 1 thread"
        return result | {"quality_int8": self._quality_int8()}

    def generate(self) -> dict[str, Any]:
        """Dense ÷ selective processor time of 32 tokens by transformers' own ``generate()``, after 16, one thread."""
        self.say("decoding by generate()", None)
        ids, new = self.windows("held_out", "prose", 1)[:, :16], 32

        def write(model: Any) -> None:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
            )

        spent = _in_turns((self.dense, self.selective), lambda _: None, write, self.mode.rounds) / new
        return {
            "saving": {"cpu_s": _ratio(spent)},
            "dense_cpu_s": float(np.median(spent[0])),
            "selective_cpu_s": float(np.median(spent[1])),
            "engine": "transformers' generate() on both sides, 1 thread",
            "runs": explain(self.selective).decoding,
        }

    def _quality_int8(self) -> dict[str, Any]:
        """Perplexity of the dense network in fp32, and of the selective one with int8 rows, on some held-out windows of
        both kinds."""
        self.say("held-out perplexity of int8 rows", None)
        ids = torch.cat([self.windows("held_out", kind, min(8, self.mode.held_out)) for kind in data.KINDS])
        dense, own = (self._losses(net, ids, lambda _: None)[0] for net in (self.dense, self._in("int8")))
        return {"n": len(ids), **_perplexities(dense, own)}

    def recovered(self) -> dict[str, Any]:
        """Distilled towards the dense answers while more is left out than the contract allows, then calibrated anew:
        perplexity on held-out windows, bytes for one decoded token."""
        folder = self.folder.with_name(f"{self.folder.name}-recovered")
        fit = torch.stack([self.windows("fit", kind, RECOVERY_WINDOWS) for kind in data.KINDS], dim=1).flatten(0, 1)
        model = copy.deepcopy(self.dense)
        convert_(model)
        self.say("recovery: fitting selectors", None)
        options = fit_selectors(model, list(fit[:32].split(4)))
        apply(needed_layers(model), path(options, [RECOVERY_LOSS])[0])
        self.say("recovery: training", None)
        done = recover(model, fit[32:], lr=RECOVERY_RATE, minutes=self.mode.minutes, folder=self.parts.folder)
        contract = self._calibrate(model, "recovery")
        save(model, folder)
        drops = []
        for kind in data.KINDS:
            ids = self.windows("held_out", kind, self.mode.held_out)
            drops.append([self._losses(net, ids, lambda _: None)[0] for net in (self.dense, model)])
        ids = self.windows("held_out", "prose", 1)[0].tolist()
        ledgers = [_ledger(engine, ids) for engine in (Decoder(self.dense), PlannedDecoder(model, "fp32"))]
        return {
            "contract": contract.as_dict(),
            "training_cpu_s": done.cpu_s,
            "tokens": done.examples * self.mode.length,
            "quality": _perplexities(*(torch.cat(side) for side in zip(*drops, strict=True))),
            "saving": {name: getattr(ledgers[0], name) / getattr(ledgers[1], name) for name in ("macs", "bytes")},
        }

    def layers(self) -> list[dict[str, Any]]:
        """What each selective layer did while one held-out window was decoded."""
        reset(self.selective)
        ids = self.windows("held_out", "kernel", 1)[0].tolist()
        engine = self.decoder()
        engine.prepare(torch.tensor(ids[:1]))
        for token in ids[1:65]:
            engine.step(token)
        return explain(self.selective).as_dict()["layers"]

    @torch.no_grad()
    def head(self) -> dict[str, Any]:
        """The output layer alone: how often its best class is the exact one, and dense ÷ selective processor time."""
        self.say("the output layer alone", None)
        n = min(24, self.mode.held_out)
        states = self._states("calibration", n), self._states("held_out", n)
        layer = self.dense.get_output_embeddings()
        best = layer(states[1]).argmax(1)
        engines = dense_engines(layer, "fp32")
        dense = best_engine(engines, states[1][:64], (1,), batch=1, rounds=3)
        rows = []
        for rank, keep in ((96, 512), (128, 256), (128, 512), (128, 4096)):
            screen = Screen(rank, keep)
            screen.fit(layer.weight, None, states[0])
            found = screen.topk(states[1], layer.weight, None, 1)[1][:, 0]
            ratio = _paired_calls(
                lambda part: dense.engine.answer(part),
                lambda part, screen=screen: screen.topk(part, layer.weight, None, 1),
                states[1][:40],
                self.mode.rounds,
            )
            rows.append({"rank": rank, "keep": keep, "agreement": share((found == best).numpy()), **ratio})
        return {"engine": repr(dense.engine), "rows": rows}

    @torch.no_grad()
    def _states(self, part: str, n: int) -> Tensor:
        """What the output layer reads, [tokens, width]."""
        seen = []
        for kind in data.KINDS:
            for batch in self.windows(part, kind, n).split(4):
                seen.append(self.dense.model(input_ids=batch, use_cache=False).last_hidden_state.flatten(0, 1))
        return torch.cat(seen)

    def controls(self) -> dict[str, Any]:
        """Hidden layers alone, 60 % of the units with each selector: perplexity, against chance and the full answer."""
        n = min(8, self.mode.held_out)
        fit = torch.cat([self.windows("fit", kind, n) for kind in data.KINDS])
        ids = torch.cat([self.windows("held_out", kind, n) for kind in data.KINDS])
        dense, _ = self._losses(self.dense, ids, lambda _: None)
        units = self.dense.config.intermediate_size
        rows: dict[str, Any] = {}
        choices: dict[str, Selector] = {
            "Threshold": Threshold(), "LowRank": LowRank(64), "Random": Random(round(0.6 * units)),
        }  # fmt: skip
        for name, selector in choices.items():
            self.say(f"selectors beside chance: {name}", None)
            model = copy.deepcopy(self.dense)
            convert_(model, selector, where="mlp")
            _fit(model, fit, 60)
            own, _ = self._losses(model, ids, lambda _: None)
            rows[name] = _perplexities(dense, own)["drop"]
            restore_(model)
        return {"share": 0.6, "drop": rows}

    def run(self) -> dict[str, Any]:
        """Every part, and the whole as the JSON's entry of this workload."""
        part = self.parts.run
        made = part("convert", self.convert)
        quality = part("quality", self.quality)
        agreement = quality.pop("agreement")
        return {
            "title": TITLE,
            "quality": quality,
            "agreement": agreement,
            "continuations": part("continuations", self.continuations),
            "contract": made["contract"],
            "calibration_cpu_s": made["cpu_s"],
            "inference": {"decode": part("decode", self.decode), "generate": part("generate", self.generate)},
            "head": part("head", self.head),
            "layers": part("layers", self.layers),
            **({"controls": part("controls", self.controls)} if self.mode.name != "quick" else {}),
            **({"recovered": part("recovered", self.recovered)} if self.mode.minutes else {}),
        }


def _perplexities(dense: Tensor, own: Tensor) -> dict[str, Any]:
    """Perplexities of both from log-losses [n], and the relative drop with its 95 % normal interval."""
    gap = own - dense
    half = 1.959964 * float(gap.std()) / math.sqrt(len(gap))
    low, middle, high = (math.expm1(float(gap.mean()) + shift) for shift in (-half, 0.0, half))
    return {
        "dense": {"value": math.exp(float(dense.mean()))},
        "selective": {"value": math.exp(float(own.mean()))},
        "drop": {"value": middle, "lo": low, "hi": high},
    }


def _fit(model: nn.Module, ids: Tensor, setting: int) -> None:
    """Fit the selectors of a converted model to windows, and give them one setting."""
    fit_selectors(model, list(ids.split(4)))
    for layer in needed_layers(model).values():
        if layer.selector.settings():
            layer.selector.setting = setting


def _paired(dense: Decoder, own: Decoder, ids: list[int], rounds: int) -> dict[str, Any]:
    """Processor-seconds per token of both, in turns, and the median ratio with its 20/80 percentiles."""

    def begin(engine: Decoder) -> None:
        engine.prepare(torch.tensor(ids[:1]))
        for token in ids[1:16]:
            engine.step(token)

    def go_on(engine: Decoder) -> None:
        for token in ids[16:64]:
            engine.step(token)

    spent = _in_turns((dense, own), begin, go_on, rounds) / 48
    return {
        "ratio": _ratio(spent),
        "dense_cpu_s": float(np.median(spent[0])),
        "selective_cpu_s": float(np.median(spent[1])),
    }


def _paired_calls(dense: Any, own: Any, states: Tensor, rounds: int) -> dict[str, Any]:
    """As :func:`_paired`, for two answers to one state at a time."""

    def ask(answer: Any) -> None:
        for part in states.split(1):
            answer(part)

    spent = _in_turns((dense, own), lambda _: None, ask, rounds) / len(states)
    return {"cpu_s": _ratio(spent), "selective_cpu_s": float(np.median(spent[1]))}


def _in_turns(
    sides: tuple[Any, Any], begin: Callable[[Any], None], work: Callable[[Any], None], rounds: int
) -> np.ndarray:
    """Processor-seconds of ``work`` of each side, after ``begin``, on one thread: [2, rounds]. One round warms up."""
    spent: list[list[float]] = [[], []]
    with one_thread():
        for turn in range(rounds + 1):
            for side, times in zip(sides, spent, strict=True):
                begin(side)
                start = time.process_time()
                work(side)
                if turn:
                    times.append(time.process_time() - start)
    return np.array(spent)


def _ratio(spent: np.ndarray) -> dict[str, float]:
    """[2, rounds] -> the median of the first side ÷ the second, with its 20/80 percentiles."""
    lo, middle, hi = np.percentile(spent[0] / spent[1], (20, 50, 80)).tolist()
    return {"value": middle, "lo": lo, "hi": hi}


def _ledger(engine: Decoder, ids: list[int]) -> Any:
    """What some steps put on the ledger."""
    engine.prepare(torch.tensor(ids[:1]))
    for token in ids[1:16]:
        engine.step(token)
    with count() as ledger:
        for token in ids[16:32]:
            engine.step(token)
    return ledger


def bench(mode: Mode, say: Say, *, fresh: bool = False) -> dict[str, Any]:
    """The whole JSON document of a run."""
    return document("smollm", SmolLM(mode, say, fresh=fresh).run(), mode.name)
