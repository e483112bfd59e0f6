"""Shares of right answers with their intervals, alone and paired."""

from __future__ import annotations

import numpy as np


def share(values: np.ndarray) -> dict[str, float]:
    """Mean of bools [n] with its 95 % Wilson interval."""
    n, p, z = len(values), float(values.mean()), 1.959964
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return {"value": p, "lo": (middle - half) / (1 + z * z / n), "hi": (middle + half) / (1 + z * z / n)}


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Mean of a - b over the same pairs, bools [n >= 2] each, with its 95 % normal interval."""
    gap = a.astype(float) - b.astype(float)
    half = 1.959964 * gap.std(ddof=1) / len(gap) ** 0.5
    return {"value": float(gap.mean()), "lo": float(gap.mean() - half), "hi": float(gap.mean() + half)}
