"""Dense decoding as others do it, beside :class:`sparingly.workloads._decoders.Decoder`, and what a token costs.

Milliseconds of processor time per token, SmolLM2-135M after a prompt of 64 tokens, medians on one thread of a virtual
EPYC 9004 with AVX-512 that much other work ran beside, so read the columns against each other:

==============================================  ====  ====  ====
engine                                          fp32  bf16  int8
==============================================  ====  ====  ====
transformers                                    77    70
transformers tuned (layout; without oneDNN)     67    39
transformers, ``quantize_dynamic`` (FBGEMM)                 29
``Decoder``                                     41    23    13
the matrices of ``Decoder`` alone               37    16    9
==============================================  ====  ====  ====

llama-cpp-python took 13 at Q4_1. Between its matrices ``Decoder`` spends 1.7, and 4.0 with PyTorch's own operations
there. int8 quantises activations as well: on 190 tokens of prose its best next token was that of float32 in 88 % of
cases, bf16's in 94 %, so a saving over it has to stand beside its quality.

``torch.compile`` of the whole step made the loop dearer (four layers and the output layer, milliseconds: 39 instead of
11 in fp32, 8.6 instead of 7.1 in bf16): it replaces the library's matrix-vector products by its own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.ops._pages import request_huge_pages
from sparingly.workloads._decoders import Engine, without_onednn


class Transformers(Engine):
    """``model(ids, past_key_values=…)`` as users of transformers run it.

    ``tuned``: float32 weights input-major in huge pages, bfloat16 without oneDNN. The model is copied in that case.
    """

    def __init__(self, model: Any, precision: str = "fp32", tuned: bool = False):
        if precision not in ("fp32", "bf16"):
            raise ValueError(f'precision must be "fp32" or "bf16", got {precision!r}')
        self.name, self.precision, self.tuned = "transformers tuned" if tuned else "transformers", precision, tuned
        self.model = model
        if tuned or precision == "bf16":
            self.model = copy.deepcopy(model).to(torch.float32 if precision == "fp32" else torch.bfloat16)
        if tuned and precision == "fp32":
            for layer in self.model.modules():
                if isinstance(layer, nn.Linear):
                    weight = layer.weight.detach().t().contiguous()
                    request_huge_pages(weight)
                    layer.weight = nn.Parameter(weight.t(), requires_grad=False)
        self.cache: Any = None

    def prepare(self, ids: Tensor) -> Tensor:
        self.cache = None
        return self._run(ids)

    def step(self, token: int) -> Tensor:
        return self._run(torch.tensor([token]))

    @torch.inference_mode()
    def _run(self, ids: Tensor) -> Tensor:
        with without_onednn(self.tuned and len(ids) == 1):
            answer = self.model(
                ids.unsqueeze(0), past_key_values=self.cache, use_cache=True, logits_to_keep=1, return_dict=True
            )
        self.cache = answer.past_key_values
        return answer.logits[0, -1].float()


class LlamaCpp(Engine):
    """``llama-cpp-python`` on a GGUF file, at the file's own precision. Raises ImportError without it."""

    name = "llama-cpp-python"

    def __init__(self, file: Any, precision: str = "q4_1", max_tokens: int = 512):
        try:
            import llama_cpp  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("the incumbent needs: pip install llama-cpp-python (built from source)") from error
        self.precision, self._library = precision, llama_cpp
        threads = torch.get_num_threads()
        self._llama = llama_cpp.Llama(
            str(file), n_ctx=max_tokens, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def prepare(self, ids: Tensor) -> Tensor:
        self._llama.reset()
        return self._run(ids.tolist())

    def step(self, token: int) -> Tensor:
        return self._run([token])

    def _run(self, tokens: list[int]) -> Tensor:
        self._llama.eval(tokens)
        found = self._library.llama_get_logits_ith(self._llama.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(found, (self._llama.n_vocab(),)).copy())


def greedy(engine: Engine, prompt: Tensor, tokens: int) -> list[int]:
    """The ``tokens`` most likely next ones after a prompt int64 [tokens >= 1], one after the other."""
    found, logits = [], engine.prepare(prompt)
    while len(found) < tokens:
        found.append(int(logits.argmax()))
        if len(found) < tokens:
            logits = engine.step(found[-1])
    return found


@dataclass(frozen=True)
class Cost:
    """Processor-seconds per decoded token (median, 20th and 80th percentile) and per prompt token, threads."""

    engine: Engine
    threads: int
    cpu_s: float
    lo: float
    hi: float
    wall_s: float
    prefill_cpu_s: float


def costs(engines: Sequence[Engine], prompts: Sequence[Tensor], tokens: int = 64, rounds: int = 3) -> list[Cost]:
    """What a decoded token costs, engines in turns: each round reads a prompt and decodes ``tokens`` greedily.

    Prompts are int64 [tokens >= 1]. Choosing the token is counted, reading the prompt apart. Raises ValueError for no
    prompts or fewer than 2 tokens.
    """
    if not prompts or tokens < 2 or rounds < 1:
        raise ValueError(f"needs prompts, tokens >= 2 and rounds >= 1, got {len(prompts)}, {tokens} and {rounds}")
    cpu: list[list[float]] = [[] for _ in engines]
    wall: list[list[float]] = [[] for _ in engines]
    prefill: list[list[float]] = [[] for _ in engines]
    for turn in range(rounds + 1):
        prompt = prompts[turn % len(prompts)]
        for engine, steps, seconds, reading in zip(engines, cpu, wall, prefill, strict=True):
            start = time.process_time()
            logits = engine.prepare(prompt)
            spent = (time.process_time() - start) / len(prompt)
            # The first turn warms up.
            for _ in range(tokens if turn else 2):
                start, begun = time.process_time(), time.perf_counter()
                logits = engine.step(int(logits.argmax()))
                if turn:
                    steps.append(time.process_time() - start)
                    seconds.append(time.perf_counter() - begun)
            if turn:
                reading.append(spent)
    found = []
    for engine, steps, seconds, reading in zip(engines, cpu, wall, prefill, strict=True):
        middle, lo, hi = np.percentile(steps, (50, 20, 80)).tolist()
        found.append(Cost(engine, torch.get_num_threads(), middle, lo, hi, median(seconds), median(reading)))
    return found
