"""What stands between the matrices of a decoded token, in one compiled call each: norm, and rotation with attention.

As PyTorch operations these take 4 ms per token of SmolLM2-135M, mostly calls, beside 35 ms of matrices in float32 and 9
in int8; as these two kernels 1.5 ms.
"""

from __future__ import annotations

import numpy as np

from sparingly.ops._numba import kernel
from sparingly.ops._views import matrix_at, vector_at


@kernel
def rms_norm(width, eps, x, gain, out):
    """``out = x / sqrt(mean(x ** 2) + eps) * gain`` of float32 [width] at addresses."""
    values, gains, result = (
        vector_at(x, width, np.float32),
        vector_at(gain, width, np.float32),
        vector_at(out, width, np.float32),
    )
    total = np.float32(0.0)
    for j in range(width):
        total += values[j] * values[j]
    scale = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
    for j in range(width):
        result[j] = values[j] * scale * gains[j]


@kernel
def attend(sizes, scaling, places):
    """One token's attention: turns its query and key, stores key and value, mixes the values so far.

    At addresses, float32: qkv [heads + 2 * shared, width], cos and sin [width] of its position, cache [2, shared,
    positions, width], out [heads, width]. ``sizes`` ends in the token's position.
    """
    heads, shared, width, positions, position = sizes
    qkv, cos, sin, cache, out = places
    x, mixed = matrix_at(qkv, heads + 2 * shared, width, np.float32), matrix_at(out, heads, width, np.float32)
    c, s = vector_at(cos, width, np.float32), vector_at(sin, width, np.float32)
    keys = matrix_at(cache, shared * positions, width, np.float32)
    values = matrix_at(cache + 4 * shared * positions * width, shared * positions, width, np.float32)
    half, group = width // 2, heads // shared
    for head in range(shared):
        row = head * positions + position
        for j in range(half):
            low, high = x[heads + head, j], x[heads + head, half + j]
            keys[row, j] = low * c[j] - high * s[j]
            keys[row, half + j] = high * c[half + j] + low * s[half + j]
        for j in range(width):
            values[row, j] = x[heads + shared + head, j]
    query, weights = np.empty(width, np.float32), np.empty(position + 1, np.float32)
    for head in range(heads):
        first = head // group * positions
        for j in range(half):
            low, high = x[head, j] * np.float32(scaling), x[head, half + j] * np.float32(scaling)
            query[j] = low * c[j] - high * s[j]
            query[half + j] = high * c[half + j] + low * s[half + j]
        top = np.float32(-np.inf)
        for t in range(position + 1):
            score = np.float32(0.0)
            for j in range(width):
                score += query[j] * keys[first + t, j]
            weights[t] = score
            top = max(top, score)
        total = np.float32(0.0)
        for t in range(position + 1):
            weights[t] = np.exp(weights[t] - top)
            total += weights[t]
        for j in range(width):
            mixed[head, j] = np.float32(0.0)
        for t in range(position + 1):
            weight = weights[t] / total
            for j in range(width):
                mixed[head, j] += weight * values[first + t, j]
