from __future__ import annotations

import numpy as np
import pytest
import torch

from sparingly.ops import _numba
from sparingly.ops._arrays import as_numpy


@pytest.mark.parametrize("d", [0, 1, 7, 64, 257])
def test_int8_dot_is_exact(d):
    random = np.random.default_rng(0)
    left, right = (random.integers(-128, 128, (3, d)).astype(np.int8) for _ in range(2))
    assert _numba.dot_i8(left, 2, right, 1) == left[2].astype(np.int64) @ right[1].astype(np.int64)


def test_int8_dot_of_the_largest_width():
    extreme = np.full((1, 131_071), -128, dtype=np.int8)
    assert _numba.dot_i8(extreme, 0, extreme, 0) == 131_071 * 128 * 128


def test_bfloat16_is_widened_exactly():
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.isfinite()].unsqueeze(1)
    one = np.ones((1, 1), dtype=np.float32)
    bits = as_numpy(numbers)
    for row in range(0, len(bits), 997):
        assert _numba.dot(bits, row, one, 0) == numbers[row].float().item()


@pytest.mark.parametrize("k", [1, 2, 7, 40])
def test_heap_keeps_the_best(k):
    random = np.random.default_rng(k)
    scores, positions = np.empty((2, k), np.float32), np.empty((2, k), np.int64)
    # Few different scores, so that ties are common.
    values = random.integers(0, 9, 33).astype(np.float32)
    _numba.heap_clear(scores, positions, 1)
    for position in random.permutation(33):
        _numba.heap_push(scores, positions, 1, values[position], position)
    _numba.heap_sort(scores, positions, 1)
    expected = sorted(range(33), key=lambda position: (-values[position], position))[:k]
    missing = k - len(expected)
    assert positions[1].tolist() == expected + [_numba.NOTHING] * missing
    assert scores[1].tolist() == [values[position] for position in expected] + [-np.inf] * missing


def test_prefetch_beyond_the_end_does_no_harm():
    rows = np.ones((4, 16), np.float32)
    _numba.prefetch_row(rows, 3)
    _numba.prefetch_row(rows, 1_000_000_000)
    assert _numba.dot(rows, 3, rows, 0) == 16.0
