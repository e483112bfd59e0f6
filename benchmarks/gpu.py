"""The Triton kernels against PyTorch on one NVIDIA GPU: time per call, achieved bandwidth and measured joules per call.

    python benchmarks/gpu.py --json results/gpu.jsonl

Needs a CUDA device and Triton, else it says so and exits with 2. Every contender first has to give the right answer,
and each call gets other ids (of a pool drawn beforehand). Times are medians of calls in random order among the
contenders; joules come from NVML's counter over windows of at least 10 s (its own updates are 0.1 s apart) and are
gross. One JSON line per contender, with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
Maker = Callable[["Inputs"], "dict[str, Call]"]
POOL = 32  # id sets that take turns
STEP = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison: rows [num_rows, width] of dtype, ids [tokens, k]; best: how many topk_rows keeps."""

    op: str
    dtype: str
    tokens: int
    num_rows: int
    width: int
    k: int
    best: int = 5


CASES = [
    Case(op, dtype, tokens, 1_000_000, 256, k)
    for op in ("gather_dot", "gather_accumulate", "topk_rows")
    for dtype in ("float32", "bfloat16")
    for tokens, k in ((1, 10_000), (256, 2048))
] + [Case("row_adamw", dtype, 1, 1_000_000, 256, 16_384) for dtype in ("float32", "bfloat16")]
QUICK = [Case(c.op, c.dtype, c.tokens, 50_000, c.width, c.k // 8) for c in CASES if c.dtype == "float32"]


class Inputs:
    """Tensors of a case; ``redraw`` puts another set of ids, sorted per token and without repeats, into ``ids``."""

    def __init__(self, case: Case, seed: int):
        generator = torch.Generator("cuda").manual_seed(seed)
        dtype = getattr(torch, case.dtype)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda")

        self.case = case
        self.rows = draw(case.num_rows, case.width).to(dtype)
        self.hidden = draw(case.tokens, case.width).to(dtype)
        self.weights = draw(case.tokens, case.k)
        self.grad = draw(case.k, case.width)
        self.pool = [self._ids(case, generator) for _ in range(POOL)]
        self.ids = self.pool[0].clone()
        self._next = 0

    @staticmethod
    def _ids(case: Case, generator: torch.Generator) -> Tensor:
        # One id from each of k equal stretches: distinct, spread evenly, and cheap to draw for any shape.
        stretch = case.num_rows // case.k
        offsets = torch.randint(0, stretch, (case.tokens, case.k), generator=generator, device="cuda")
        return offsets + torch.arange(case.k, device="cuda") * stretch

    def redraw(self) -> None:
        self._next = (self._next + 1) % POOL
        self.ids.copy_(self.pool[self._next])


def kernel(case: Case, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """The Triton kernel of a case; ends the benchmark where it does not apply."""
    module = importlib.import_module(f"sparingly.ops.{case.op}.triton")
    reason = module.unsupported(*arguments)
    if reason:
        raise SystemExit(f"the kernel of {case} does not apply: {reason}")
    return module.kernel


def selected(inputs: Inputs) -> Tensor:
    """rows of every token: [tokens, k, width]."""
    ids = inputs.ids
    return inputs.rows.index_select(0, ids.flatten()).view(*ids.shape, inputs.rows.shape[1])


def of_gather_dot(inputs: Inputs) -> dict[str, Call]:
    """All contenders give scores [tokens, k]."""
    run = kernel(inputs.case, (inputs.hidden, inputs.rows, inputs.ids))

    def gathered() -> Tensor:
        return torch.bmm(selected(inputs), inputs.hidden.unsqueeze(2)).squeeze(2)

    def dense() -> Tensor:
        return torch.nn.functional.linear(inputs.hidden, inputs.rows).gather(1, inputs.ids)

    return {
        "sparingly": lambda: run(inputs.hidden, inputs.rows, inputs.ids),
        "sparingly unchecked": lambda: run(inputs.hidden, inputs.rows, inputs.ids, check_ids=False),
        "index_select + bmm": gathered,
        "index_select + bmm, compiled": torch.compile(gathered),
        "linear over all rows": dense,
    }


def of_gather_accumulate(inputs: Inputs) -> dict[str, Call]:
    """All contenders give sums [tokens, width]."""
    run = kernel(inputs.case, (inputs.weights, inputs.rows, inputs.ids))
    weights = inputs.weights.to(inputs.rows.dtype)

    def gathered() -> Tensor:
        return torch.bmm(weights.unsqueeze(1), selected(inputs)).squeeze(1)

    def bag() -> Tensor:
        return torch.nn.functional.embedding_bag(inputs.ids, inputs.rows, per_sample_weights=weights, mode="sum")

    return {
        "sparingly": lambda: run(inputs.weights, inputs.rows, inputs.ids),
        "sparingly unchecked": lambda: run(inputs.weights, inputs.rows, inputs.ids, check_ids=False),
        "index_select + bmm": gathered,
        "index_select + bmm, compiled": torch.compile(gathered),
        "embedding_bag": bag,
    }


def of_topk_rows(inputs: Inputs) -> dict[str, Call]:
    """All contenders give the best scores [tokens, best], first of a pair."""
    best = inputs.case.best
    run = kernel(inputs.case, (inputs.hidden, inputs.rows, inputs.ids, best))

    def gathered() -> tuple[Tensor, Tensor]:
        scores = torch.bmm(selected(inputs), inputs.hidden.unsqueeze(2)).squeeze(2)
        values, places = scores.topk(best)
        return values, inputs.ids.gather(1, places)

    return {
        "sparingly": lambda: run(inputs.hidden, inputs.rows, inputs.ids, best),
        "sparingly unchecked": lambda: run(inputs.hidden, inputs.rows, inputs.ids, best, check_ids=False),
        "index_select + bmm + topk": gathered,
        "index_select + bmm + topk, compiled": torch.compile(gathered),
    }


def of_row_adamw(inputs: Inputs) -> dict[str, Call]:
    """Each contender steps its own copy of the bank and gives it back."""

    def bank() -> list[Tensor]:
        moments = [torch.zeros_like(inputs.rows, dtype=torch.float32) for _ in range(2)]
        return [inputs.rows.clone(), *moments, torch.zeros(len(inputs.rows), dtype=torch.int32, device="cuda")]

    mine, gathered, fused = bank(), bank(), bank()
    run = kernel(inputs.case, (*mine, inputs.ids[0], inputs.grad))

    def step() -> Tensor:
        run(*mine, inputs.ids[0], inputs.grad, **STEP)
        return mine[0]

    def by_index(state: list[Tensor], ids: Tensor, grad: Tensor) -> Tensor:
        param, avg, sq, steps = state
        count = steps[ids] + 1
        first, second = avg[ids].lerp(grad, 1 - STEP["beta1"]), sq[ids].lerp(grad.square(), 1 - STEP["beta2"])
        time = count.double().unsqueeze(1)
        rate = (STEP["lr"] / (1 - STEP["beta1"] ** time)).float()
        root = (second / (1 - STEP["beta2"] ** time).float()).sqrt() + STEP["eps"]
        value = param[ids].float() * (1 - STEP["lr"] * STEP["weight_decay"]) - rate * first / root
        for target, source in zip(state, (value.to(param.dtype), first, second, count), strict=True):
            target.index_copy_(0, ids, source)
        return param

    compiled = torch.compile(by_index)
    return {
        "sparingly": step,
        "index and index_copy_": lambda: by_index(gathered, inputs.ids[0], inputs.grad),
        "index and index_copy_, compiled": lambda: compiled(fused, inputs.ids[0], inputs.grad),
    }


MAKERS: dict[str, Maker] = {
    "gather_dot": of_gather_dot,
    "gather_accumulate": of_gather_accumulate,
    "topk_rows": of_topk_rows,
    "row_adamw": of_row_adamw,
}


def captured(call: Call) -> Call:
    """The same call as one replay of a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def contenders(inputs: Inputs) -> dict[str, Call]:
    """Every contender, and again as a CUDA graph (ids are unchecked in one, and row_adamw cannot be captured)."""
    plain = MAKERS[inputs.case.op](inputs)
    graphs = {
        f"{name}, CUDA graph": captured(call)
        for name, call in plain.items()
        if name != "sparingly" and inputs.case.op != "row_adamw"
    }
    return {**plain, **graphs}


def wrong(calls: dict[str, Call], inputs: Inputs) -> Iterator[str]:
    """What differs from the first contender by more than the dtype explains (fp32 without TF32, bf16 results)."""
    bound = 1e-4 if inputs.case.dtype == "float32" else 2e-2
    values: dict[str, Tensor] = {}
    for name, call in calls.items():
        inputs._next = 0
        inputs.redraw()
        result = call()
        values[name] = (result[0] if isinstance(result, tuple) else result).double().clone()
    first = next(iter(values.values()))
    for name, value in values.items():
        error = ((value - first).abs().max() / first.abs().max()).item()
        if not error < bound:
            yield f"{name}: {error:.3g} off"


def time_calls(calls: dict[str, Call], inputs: Inputs, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds per call by CUDA events, contenders in random order in every round: median and 20/80 percentiles."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for warm_up in (True, False):
        for _ in range(5 if warm_up else rounds):
            for name in random.sample(list(calls), len(calls)):
                inputs.redraw()
                torch.cuda.synchronize()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                calls[name]()
                end.record()
                end.synchronize()
                if not warm_up:
                    seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: _quantiles(torch.tensor(times)) for name, times in seconds.items()}


def _quantiles(times: Tensor) -> dict[str, float]:
    low, middle, high = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"median": middle, "p20": low, "p80": high, "n": times.numel()}


def measure_joules(call: Call, inputs: Inputs, window_s: float) -> dict[str, Any]:
    """Records of ENERGY.md per call and GPU, the calls made one after the other for at least window_s."""
    from sparingly.energy.measurement import measure
    from sparingly.energy.meters import Nvml

    calls = 0
    with measure([Nvml()]) as result:
        start = time.monotonic()
        while time.monotonic() - start < window_s:
            for _ in range(100):
                inputs.redraw()
                call()
            calls += 100
            torch.cuda.synchronize()
    records = [r if r.value is None else r.per(calls, "call") for r in result.gross]
    return {"calls": calls, "seconds_per_call": result.wall_s / calls, "joules": [r.as_dict() for r in records]}


def run_case(case: Case, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result row per contender, without the machine line."""
    inputs = Inputs(case, options.seed)
    calls = contenders(inputs)
    problems = list(wrong(calls, inputs))
    if problems:
        raise SystemExit(f"{case}: contenders disagree: {'; '.join(problems)}")
    times = time_calls(calls, inputs, options.rounds)
    row_bytes = case.tokens * case.k * case.width * inputs.rows.element_size()
    for name in random.sample(list(calls), len(calls)):
        row: dict[str, Any] = {"benchmark": "gpu", **asdict(case), "contender": name, "time_s": times[name]}
        row["selected_rows_bytes_per_s"] = row_bytes / times[name]["median"]
        if options.window_s:
            row["energy"] = measure_joules(calls[name], inputs, options.window_s)
        yield row


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="append the rows to this file (default: print them)")
    parser.add_argument("--op", choices=list(MAKERS), action="append", help="only this operator; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small fp32 shapes")
    parser.add_argument("--rounds", type=int, default=100, help="timed calls per contender")
    parser.add_argument("--window-s", type=float, default=11.0, help="seconds per energy window, at least 10; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if 0 < options.window_s < 10 or options.window_s < 0:
        parser.error(f"--window-s must be 0 or at least 10 (NVML updates every 0.1 s), got {options.window_s}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    return options


def refusal() -> str | None:
    """Why this benchmark cannot run here, or None."""
    if not torch.cuda.is_available():
        return f"it needs an NVIDIA GPU, and this PyTorch ({torch.__version__}) sees none"
    if importlib.util.find_spec("triton") is None:
        return "it needs Triton, which CUDA builds of PyTorch bring along"
    return None


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    reason = refusal()
    if reason:
        print(f"benchmarks/gpu.py cannot run: {reason}", file=sys.stderr)
        return 2
    from sparingly.energy.machine import commit, machine_info, versions

    random.seed(options.seed)
    line = {"machine": machine_info(), "versions": versions(), "commit": commit()}
    cases = [case for case in (QUICK if options.quick else CASES) if not options.op or case.op in options.op]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(options.json.open("a")) if options.json else sys.stdout
        for case in cases:
            for row in run_case(case, options):
                print(json.dumps({**row, **line}), file=out, flush=True)
            torch.compiler.reset()
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
