"""A whole small network, from row ids to the best classes, as one compiled call."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from sparingly.energy import ledger
from sparingly.nn.bag import SelectiveBag
from sparingly.nn.head import SelectiveHead
from sparingly.ops._arrays import as_numpy, check_range
from sparingly.ops._numba import axpy, kernel, prefetch_row
from sparingly.ops._pages import request_huge_pages
from sparingly.selectors import Graph
from sparingly.selectors._graph_search import search


@kernel
def _answer(ids, table, gain, shift, eps, search_arguments, scores, classes):
    """Bag, LayerNorm and graph walk of every token; False, with nothing written, if an id is out of range.

    Scores end in infinity or NaN where the answer is not complete.
    """
    width = table.shape[1]
    for token in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            if ids[token, j] < -1 or ids[token, j] >= table.shape[0]:
                return False
    hidden = np.empty((ids.shape[0], width), np.float32)
    counts = np.empty((ids.shape[0], 3), np.int64)
    for token in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            if ids[token, j] >= 0:
                prefetch_row(table, ids[token, j])
        for j in range(width):
            hidden[token, j] = np.float32(0.0)
        used = 0
        for j in range(ids.shape[1]):
            if ids[token, j] >= 0:
                axpy(np.float32(1.0), table, ids[token, j], hidden, token)
                used += 1
        share = np.float32(1.0) / np.sqrt(np.float32(max(used, 1)))
        mean = np.float32(0.0)
        for j in range(width):
            hidden[token, j] *= share
            mean += hidden[token, j]
        mean /= np.float32(width)
        spread = np.float32(0.0)
        for j in range(width):
            spread += (hidden[token, j] - mean) * (hidden[token, j] - mean)
        scale = np.float32(1.0) / np.sqrt(spread / np.float32(width) + eps)
        for j in range(width):
            hidden[token, j] = (hidden[token, j] - mean) * scale * gain[j] + shift[j]
    search(0, ids.shape[0], hidden, *search_arguments, scores, classes, counts)  # pyright: ignore[reportCallIssue]
    return True


class Plan:
    """``head.topk(norm(bag(ids)), k)`` in one compiled call on one thread, without PyTorch in between.

    For small networks at batch 1: the calls between the layers cost more there than the layers. It reads the modules'
    own parameters, so in-place changes show; build it again after ``refresh``, ``tune``, ``.to()`` or loading.

    Args:
        bag: float32, on the CPU.
        norm: a LayerNorm over the bag's width, with weight and bias.
        head: with a fitted :class:`Graph`; float32 or bfloat16 rows, or :meth:`SelectiveHead.int8`.
        k: how many classes an answer has, in 1..the selector's setting.

    Raises TypeError or ValueError, saying what is needed, if the modules are not of that kind. While a ledger counts,
    the modules themselves run, so that it sees what they do; the work is the same.
    """

    def __init__(self, bag: SelectiveBag, norm: nn.LayerNorm, head: SelectiveHead, k: int = 1):
        selector = head.selector
        if not isinstance(selector, Graph):
            raise TypeError(f"head must have a Graph selector, got {type(selector).__name__}")
        if not selector.fitted or head.exact:
            raise ValueError("head answers exactly, so there is nothing to plan: refresh() it, and tune() it anew")
        if not 1 <= k <= selector.setting:
            raise ValueError(f"k must be in 1..{selector.setting}, the selector's setting, got {k}")
        if norm.normalized_shape != (bag.dim,) or norm.weight is None or norm.bias is None:
            raise ValueError(f"norm must be a LayerNorm over {bag.dim} with weight and bias, got {norm}")
        for name, tensor in (("bag", bag.weight), ("norm", norm.weight), ("head", head.weight)):
            if not tensor.is_cpu:
                raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
        if bag.weight.dtype != torch.float32 or norm.weight.dtype != torch.float32:
            raise TypeError(f"bag and norm must be float32, got {bag.weight.dtype} and {norm.weight.dtype}")
        self._modules, self.k = (bag, norm, head), k
        for tensor in (bag.weight, head.weight):
            request_huge_pages(tensor.detach())  # Only faster where the system grants it.
        parts = (as_numpy(bag.weight), as_numpy(norm.weight), as_numpy(norm.bias), np.float32(norm.eps))
        self._trunk, self._search = parts, selector.arguments(head.weight, head.bias, head.scale, k)

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 [tokens, m], -1 is a pad -> scores float32 [tokens, k], classes int64 [tokens, k].

        Raises IndexError for an id out of range. A token for which the walk found fewer than k classes, or whose
        scores are not finite, makes the modules answer (and raise, and count) as they always do.
        """
        bag, norm, head = self._modules
        if ledger.active():
            return head.topk(norm(bag(ids)), self.k)
        tokens = ids.shape[0]
        scores, classes = np.empty((tokens, self.k), np.float32), np.empty((tokens, self.k), np.int64)
        if not _answer(ids.numpy(), *self._trunk, self._search, scores, classes):
            check_range(ids, bag.num_rows)
        if not all(map(math.isfinite, scores[:, -1].tolist())):
            return head.topk(norm(bag(ids)), self.k)
        return torch.from_numpy(scores), torch.from_numpy(classes)
