from __future__ import annotations

import sys
import time

import onnxruntime
import pytest
import torch
from torch import Tensor

from sparingly.workloads import _engines
from sparingly.workloads._engines import Engine, OnnxRuntime, best_by_batch, best_engine, best_scores, dense_engines

CLASSES, D, K = 1111, 64, 5  # not a multiple of the blocks of 128
# Largest error of a score, relative to the scores' standard deviation. int8 has 127 levels, bfloat16 8 bits.
TOLERANCE = {"fp32": 1e-5, "int8": 0.05, "bf16": 0.03}


@pytest.fixture
def layer() -> torch.nn.Linear:
    return torch.nn.Linear(D, CLASSES)


def _error(engine: Engine, layer: torch.nn.Linear, hidden: Tensor) -> float:
    """Largest error of the returned scores against float64, in standard deviations of all scores."""
    with torch.no_grad():
        exact = hidden.double() @ layer.weight.double().t()
        exact = exact if layer.bias is None else exact + layer.bias.double()
        scores, classes = engine.answer(hidden)
        assert scores.shape == classes.shape == (len(hidden), K)
        assert classes.dtype == torch.int64
        assert (scores.diff(dim=1) <= 0).all()
        returned = (exact.gather(1, classes) - scores).abs().max()
        # Whatever was returned is as good as the true best k.
        missed = (exact.topk(K).values - scores).abs().max()
        return float(torch.maximum(returned, missed) / exact.std())


@pytest.mark.parametrize("precision", _engines.PRECISIONS)
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_engines_give_the_exact_best(precision, tokens, bias):
    layer = torch.nn.Linear(D, CLASSES, bias=bias)
    hidden = torch.randn(tokens, D)
    for engine in dense_engines(layer, precision, K):
        assert engine.precision == precision
        assert _error(engine, layer, hidden) < TOLERANCE[precision], engine


@pytest.mark.parametrize("precision", _engines.PRECISIONS)
def test_the_last_class_can_win(layer, precision):
    """It lies in the part that does not fill a block; the padding behind it must never be returned."""
    with torch.no_grad():
        layer.bias[-1] = 50
        layer.bias[:-K] = -1000
    for engine in dense_engines(layer, precision, K):
        classes = engine.answer(torch.randn(3, D))[1]
        assert (classes[:, 0] == CLASSES - 1).all(), engine
        assert (classes.sort(1).values == torch.arange(CLASSES - K, CLASSES)).all(), engine


def test_a_wrong_weight_is_seen(layer):
    """The comparison above can fail: one changed row is enough."""
    hidden = torch.randn(8, D)
    engines = dense_engines(layer, "fp32", K)
    with torch.no_grad():
        best = layer(hidden).argmax(1)[0]
        changed = torch.nn.Linear(D, CLASSES)
        changed.load_state_dict(layer.state_dict())
        changed.weight[best] = 0
    assert all(_error(engine, changed, hidden) > TOLERANCE["int8"] for engine in engines)


@pytest.mark.parametrize("classes", [3, 127, 128, 640, 1000])
def test_best_scores_equal_topk(classes):
    scores = torch.randn(7, classes)
    k = min(3, classes)
    values, positions = best_scores(scores, k)
    expected = scores.topk(k)
    assert torch.equal(values, expected.values)
    assert torch.equal(positions, expected.indices)


def test_weights_are_not_changed(layer):
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for precision in _engines.PRECISIONS:
        for engine in dense_engines(layer, precision):
            engine.answer(torch.randn(2, D))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_one_session_per_thread_count(layer, monkeypatch):
    made = []
    session = onnxruntime.InferenceSession

    def recording(graph, options, **rest):
        made.append((options.intra_op_num_threads, options.get_session_config_entry("session.intra_op.allow_spinning")))
        return session(graph, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recording)
    engine, before = OnnxRuntime(layer), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            engine.answer(torch.randn(2, D))
    finally:
        torch.set_num_threads(before)
    assert made == [(1, "0"), (2, "0")]


def test_bad_arguments(layer, monkeypatch):
    with pytest.raises(ValueError, match="'fp16'"):
        dense_engines(layer, "fp16")
    with pytest.raises(ValueError, match="at least 640 classes"):
        OnnxRuntime(torch.nn.Linear(D, 639))
    with pytest.raises(ValueError, match="divisible by 16, got 40"):
        OnnxRuntime(torch.nn.Linear(40, CLASSES), kind="nbits")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"sparingly\[bench\]"):
        dense_engines(layer, "fp32")


class _Slow(Engine):
    """Burns ``ms`` of processor time per call, plus ``ms_per_token``."""

    precision = "fp32"

    def __init__(self, name: str, ms: float, ms_per_token: float = 0.0):
        super().__init__(torch.nn.Linear(2, CLASSES))
        self.name, self._ms, self._ms_per_token, self.threads = name, ms, ms_per_token, set()

    def answer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        self.threads.add(torch.get_num_threads())
        end = time.process_time() + (self._ms + self._ms_per_token * len(hidden)) * 1e-3
        while time.process_time() < end:
            pass
        return hidden, hidden.long()


def test_the_cheapest_engine_wins():
    slow, fast = _Slow("slow", 60), _Slow("fast", 6)
    before = torch.get_num_threads()
    best = best_engine([slow, fast], torch.zeros(2, 2), threads=(1, 2), rounds=3)
    assert best.engine is fast
    assert best.threads in (1, 2)
    assert slow.threads == fast.threads == {1, 2}
    assert torch.get_num_threads() == before
    assert best.batch == 2
    assert best.cpu_s >= 3e-3  # per token
    assert best.cpu_s == min(best.tried.values())
    assert best.tried["slow (fp32), 1 threads"] >= 30e-3


def test_each_batch_size_has_its_own_best(monkeypatch):
    small, large = _Slow("small", 1, 9), _Slow("large", 40, 0.5)
    monkeypatch.setattr(_engines, "MAX_SCORE_BYTES", 10 * CLASSES * 4)
    best = best_by_batch([small, large], torch.zeros(3, 2), batches=(1, 10, 11), threads=(1,), rounds=1)
    assert {batch: result.engine.name for batch, result in best.items()} == {1: "small", 10: "large"}


def test_every_call_takes_the_next_tokens():
    class Recording(_Slow):
        def answer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(hidden[:, 0].tolist())
            return super().answer(hidden)

    seen: list[list[float]] = []
    states = torch.arange(7.0).unsqueeze(1)
    best_engine([Recording("recording", 8)], states, threads=(1,), batch=3, rounds=2)
    assert seen[:3] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    for batch in (0, 8):
        with pytest.raises(ValueError, match=rf"batch must be in 1\.\.7.*got {batch}"):
            best_engine([_Slow("slow", 1)], states, batch=batch)


def test_threads_are_put_back_after_an_error():
    class Broken(_Slow):
        def answer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
            raise RuntimeError("broken")

    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken"):
        best_engine([Broken("broken", 1)], torch.zeros(1, 2), threads=(before + 1,))
    assert torch.get_num_threads() == before
