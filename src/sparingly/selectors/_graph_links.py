"""Links from inputs: classes that are best together for one input become neighbours in :class:`Graph`.

Lists made from the rows alone say which classes are alike; inputs say which classes compete. What an input's good
classes need in their lists is its best one, however far its row lies from theirs. Source: Chen et al., RoarGraph: A
Projected Bipartite Graph for Efficient Cross-Modal Approximate Nearest Neighbor Search, VLDB 2024, section 4 (links
from the best rows of queries); here counted over many inputs instead of projected from each::

    @article{chen2024roargraph, title={RoarGraph: A Projected Bipartite Graph for Efficient Cross-Modal Approximate
      Nearest Neighbor Search}, author={Chen, Meng and Zhang, Kai and He, Zhenying and Jing, Yinan and Wang, X. Sean},
      journal={PVLDB}, volume={17}, number={11}, year={2024}}
"""

from __future__ import annotations

import numpy as np

from sparingly.ops._numba import kernel
from sparingly.ops._threads import run_chunks

FOUND = 16
"""Best classes of an input that are linked to its very best."""
SHARE = 0.5
"""Of a list, at most, for links from inputs; the rest keeps what it held before."""


@kernel
def _spread(found, ends, towards, shares):
    """Sort the pairs (class found, best class) by the class found; ``ends``: where each class's pairs end, and begin.

    A pair weighs 1 / rank: the walk stands among the first ones when it ends.
    """
    for query in range(found.shape[0]):
        best = found[query, 0]
        for rank in range(1, found.shape[1]):
            other = found[query, rank]
            if other >= 0 and best >= 0:
                ends[other] -= 1
                towards[ends[other]] = best
                shares[ends[other]] = np.float32(1.0) / np.float32(rank)


@kernel
def _relink(start, stop, begins, towards, shares, lists, most):
    """Lists of classes start..stop: up to ``most`` best classes by their shares, then what the list held before."""
    degree = lists.shape[1]
    for row in range(start, stop):
        begin, end = begins[row], begins[row + 1]
        if begin == end:
            continue
        order = np.argsort(towards[begin:end])
        names = np.empty(end - begin, np.int32)
        sums = np.zeros(end - begin, np.float32)
        distinct = 0
        for j in range(end - begin):
            name = towards[begin + order[j]]
            if distinct == 0 or names[distinct - 1] != name:
                names[distinct] = name
                distinct += 1
            sums[distinct - 1] += shares[begin + order[j]]
        before = lists[row].copy()
        kept = 0
        for j in np.argsort(-sums[:distinct]):
            if kept == most:
                break
            lists[row, kept] = names[j]
            kept += 1
        linked = kept
        for j in range(degree):
            if kept == degree or before[j] < 0:
                break
            double = False
            for i in range(linked):
                double |= lists[row, i] == before[j]
            if not double:
                lists[row, kept] = before[j]
                kept += 1
        for j in range(kept, degree):
            lists[row, j] = -1


def link(lists: np.ndarray, found: np.ndarray) -> np.ndarray:
    """New lists int32 [n, degree]: links from inputs in front, in up to SHARE of each list, then what it held before.

    found: int64 [inputs, FOUND], the best classes of each input, best first, -1 where there were fewer.
    """
    others = found[:, 1:]
    pairs = np.bincount(others[others >= 0], minlength=len(lists))
    begins = np.zeros(len(lists) + 1, np.int64)
    np.cumsum(pairs, out=begins[1:])
    towards, shares = np.empty(begins[-1], np.int32), np.empty(begins[-1], np.float32)
    _spread(found, begins[1:].copy(), towards, shares)
    linked = lists.copy()
    run_chunks(_relink, len(lists), towards.nbytes * 16, begins, towards, shares, linked, int(SHARE * lists.shape[1]))
    return linked
