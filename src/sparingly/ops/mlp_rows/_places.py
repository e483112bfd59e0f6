"""What the CPU kernels are handed as addresses, as arrays again."""

from __future__ import annotations

import numpy as np

from sparingly.ops._numba import kernel as compiled
from sparingly.ops._views import matrix_at, vector_at


@compiled
def arrays(like, sizes, at):
    """hidden, up, bias, down, ids, weights, scores and sums; rows of the type of ``like``.

    sizes: tokens, k, block, num_units, d_in, d_out, number of the activation; at: an address for each.
    """
    tokens, k, block, num_units, d_in, d_out, _ = sizes
    hidden, up, down = (
        matrix_at(at[0], tokens, d_in, np.float32),
        matrix_at(at[1], num_units, d_in, like.dtype),
        matrix_at(at[3], num_units, d_out, like.dtype),
    )
    bias, ids = vector_at(at[2], num_units, like.dtype), matrix_at(at[4], tokens, k, np.int64)
    weights = matrix_at(at[5], tokens if at[5] else 0, k, np.float32)
    scores, sums = matrix_at(at[6], tokens, k * block, np.float32), matrix_at(at[7], tokens, d_out, np.float32)
    return hidden, up, bias, down, ids, weights, scores, sums
