"""A scout for speech: energies of seven octaves against a floor that follows the noise, and a few hidden units.

A chunk costs it some 500 multiplications; silero-vad takes 384,000. Octaves are those of Haar's wavelet: sums and
differences of neighbours, again and again. The floor of each falls fast and rises slowly. The network sees by how many
octaves of power each is above its floor now, was in the chunk before, and was in the mean of late.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparingly.ops._numba import inlined, kernel
from sparingly.workloads.stream_data import CHUNK

BANDS = 7
FEATURES = 3 * BANDS
FALLS, RISES, KEEPS = 0.1, 0.01, 0.8
"""Of the way down to what a band has now, of the way up (at most one octave counts), and of the mean so far."""

MOST, ROWS = 256, FEATURES + 2
"""Units that there is room for, and parameters of each."""
# Places in the state, one array because each argument of a kernel costs a call 70 ns: after features and floors whether
# a stream has begun, what the bands have now, room for halves and units, and the parameters.
BEGUN = FEATURES + BANDS
NOW = BEGUN + 1
ROOM = NOW + BANDS
UNITS = ROOM + max(MOST, CHUNK // 2)


@inlined
def _log2(x):
    """Of a float32 of at least 1, to 0.001: the exponent, and a cubic of the rest. A call of libm takes ten times as
    long, and there are seven for each chunk."""
    bits = np.float32(x).view(np.int32)
    rest = np.int32((bits & 0x7FFFFF) | 0x3F800000).view(np.float32)
    curve = np.float32(-2.153620718) + rest * (
        np.float32(3.047884161) + rest * (np.float32(-1.051875031) + rest * np.float32(0.158248643))
    )
    return np.float32((bits >> 23) - 127) + curve


@inlined
def _hear(x, start, state):
    """Samples int16 from x[start] on -> in ``state`` log2 of each band's mean power, highest octave first."""
    total, n = np.float32(0.0), CHUNK // 2
    for i in range(CHUNK // 2):
        a, b = np.float32(x[start + 2 * i]), np.float32(x[start + 2 * i + 1])
        total += (a - b) * (a - b)
        state[ROOM + i] = a + b
    state[NOW] = _log2(total / np.float32(n) + np.float32(1.0))
    scale = np.float32(1.0)
    for band in range(1, BANDS - 1):
        n //= 2
        scale *= np.float32(2.0)
        total = np.float32(0.0)
        for i in range(n):
            a, b = state[ROOM + 2 * i], state[ROOM + 2 * i + 1]
            total += (a - b) * (a - b)
            state[ROOM + i] = a + b
        state[NOW + band] = _log2(total / (np.float32(n) * scale) + np.float32(1.0))
    total = np.float32(0.0)
    for i in range(n):
        total += state[ROOM + i] * state[ROOM + i]
    state[NOW + BANDS - 1] = _log2(total / (np.float32(n) * np.float32(2.0) * scale) + np.float32(1.0))


@inlined
def _follow(state):
    """Put what a chunk has, in the room of ``state``, into the features and floors at the front of ``state``."""
    if state[BEGUN] == np.float32(0.0):
        state[BEGUN] = np.float32(1.0)
        for band in range(BANDS):
            state[FEATURES + band] = state[NOW + band]
    for band in range(BANDS):
        above = state[NOW + band] - state[FEATURES + band]
        state[BANDS + band] = state[band]
        state[band] = above
        mean = state[2 * BANDS + band]
        state[2 * BANDS + band] = np.float32(KEEPS) * mean + np.float32(1.0 - KEEPS) * above
        step = np.float32(FALLS) * above if above < 0 else np.float32(RISES) * min(above, np.float32(1.0))
        state[FEATURES + band] += step


@inlined
def _judge(state):
    """The network's score of the features."""
    units = (state.size - UNITS - 1) // ROWS
    for unit in range(units):
        state[ROOM + unit] = state[UNITS + FEATURES * units + unit]
    for i in range(FEATURES):
        feature, row = state[i], UNITS + i * units
        for unit in range(units):
            state[ROOM + unit] += feature * state[row + unit]
    score = state[state.size - 1]
    for unit in range(units):
        score += max(state[ROOM + unit], np.float32(0.0)) * state[UNITS + (FEATURES + 1) * units + unit]
    return score


@kernel
def _one(state, x):
    """x int16 [256] -> its score."""
    _hear(x, 0, state)
    _follow(state)
    return _judge(state)


@kernel
def _many(x, state, out):
    """x int16 [n * 256] -> out float32 [n]."""
    for row in range(out.size):
        _hear(x, row * CHUNK, state)
        _follow(state)
        out[row] = _judge(state)


@kernel
def _features(x, state, out):
    """x int16 [n * 256] -> out float32 [n, 21]."""
    for row in range(out.shape[0]):
        _hear(x, row * CHUNK, state)
        _follow(state)
        for i in range(FEATURES):
            out[row, i] = state[i]


class Scout:
    """Chunks int16 [n, 256] of a stream -> scores float32 [n], a log-odds of speech; ``step(chunk)`` -> that of one.

    Args:
        parameters: float32 [23 * units + 1]: weights of each feature to all units, the units' biases, their weights in
            the score, and its bias. None: nothing learned.
    """

    def __init__(self, parameters: np.ndarray | None = None):
        learned = np.zeros(1, np.float32) if parameters is None else np.asarray(parameters, np.float32)
        if (len(learned) - 1) % ROWS or len(learned) > MOST * ROWS + 1:
            raise ValueError(f"parameters must be {ROWS} * units + 1 numbers, units at most {MOST}, got {len(learned)}")
        self._state = np.concatenate([np.zeros(UNITS, np.float32), learned])
        # Not a method: that would add a third to what a call costs.
        self.step: Callable[[np.ndarray], float] = partial(_one, self._state)

    @property
    def units(self) -> int:
        return (len(self._state) - UNITS - 1) // ROWS

    @property
    def parameters(self) -> np.ndarray:
        return self._state[UNITS:].copy()

    def reset(self) -> None:
        """Begin another stream: its first chunk is the floor."""
        self._state[:UNITS] = 0

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        out = np.empty(len(chunks), np.float32)
        _many(chunks.reshape(-1), self._state, out)
        return out

    def features(self, chunks: np.ndarray) -> np.ndarray:
        """float32 [n, 21], what the network sees."""
        out = np.empty((len(chunks), FEATURES), np.float32)
        _features(chunks.reshape(-1), self._state, out)
        return out

    def macs(self) -> int:
        """Of a chunk: squares of the bands, floors and means, and the network's products."""
        return CHUNK + 3 * BANDS + self.units * (FEATURES + 1)

    def size_bytes(self) -> int:
        """Samples, state and weights that a chunk reads."""
        return 2 * CHUNK + 4 * (BEGUN + ROWS * self.units)


def learn(features: np.ndarray, speech: np.ndarray, units: int, passes: int = 12) -> tuple[Scout, float]:
    """features float32 [n, 21], speech bool [n] -> (a scout that answers alike, processor-seconds of its training)."""
    start = time.process_time()
    x, y = torch.from_numpy(features), torch.from_numpy(speech.astype(np.float32))
    mean, scale = x.mean(0), x.std(0) + 1e-6
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, units), nn.ReLU(), nn.Linear(units, 1))
    steps, batch = max(10, passes * len(x) // 512), min(512, len(x))
    optim = torch.optim.Adam(model.parameters())
    plan = torch.optim.lr_scheduler.OneCycleLR(optim, 1e-2, total_steps=steps)
    for _ in range(steps):
        some = torch.randint(len(x), (batch,), generator=generator)
        optim.zero_grad()
        F.binary_cross_entropy_with_logits(model((x[some] - mean) / scale)[:, 0], y[some]).backward()
        optim.step()
        plan.step()
    first: Any = model[0]
    last: Any = model[2]
    with torch.no_grad():
        weight = first.weight / scale
        bias = first.bias - weight @ mean
        parameters = torch.cat([weight.T.reshape(-1), bias, last.weight[0], last.bias]).numpy()
    return Scout(parameters), time.process_time() - start
