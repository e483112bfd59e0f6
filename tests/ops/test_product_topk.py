"""The best sums of two lists against all sums."""

from __future__ import annotations

import pytest
import torch

from sparingly.energy import count
from sparingly.ops import fallbacks, product_topk
from sparingly.ops.product_topk import OP
from sparingly.ops.product_topk.reference import reference


def lists(rows: int = 9, n: int = 12, m: int = 7, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(rows, size, generator=generator).to(dtype) for size in (n, m))


def answer(left, right, k):
    return (left.float().unsqueeze(2) + right.float().unsqueeze(1)).flatten(1).topk(k, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, k", [({}, 1), ({}, 20), ({}, 84), ({"n": 1}, 5), ({"m": 1}, 12), ({"rows": 0}, 3)])
def test_the_best_of_all_sums(poisoned, dtype, shape, k):
    left, right = lists(**shape, dtype=dtype)
    expected = answer(left, right, k)
    for found in (product_topk(left, right, k), reference(left, right, k)):
        assert torch.equal(found[0], expected.values)
        # Sums of bfloat16 scores may be equal.
        sums = (left.float().unsqueeze(2) + right.float().unsqueeze(1)).flatten(1)
        assert torch.equal(sums.gather(1, found[1]), expected.values)
        assert all(len(set(row)) == k for row in found[1].tolist())
    assert not fallbacks()


def test_two_threads_give_the_same(two_threads):
    left, right = lists(rows=50)
    assert torch.equal(product_topk(left, right, 9)[1], answer(left, right, 9).indices)


def test_nan_is_the_largest():
    left, right = lists()
    left[3, 5] = float("nan")
    scores, ids = product_topk(left, right, 4)
    assert scores[3].isnan().all() and (ids[3] // 7 == 5).all() and not scores[:3].isnan().any()


def test_gradients():
    # Further apart than the steps of the numerical gradient.
    left, right = ((one.double() * 100).round().requires_grad_() for one in lists(rows=3))
    left = (left.detach() + torch.arange(12) * 1e-3).requires_grad_()
    right = (right.detach() + torch.arange(7) * 2e-2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: product_topk(a, b, 10)[0], (left, right))
    torch.library.opcheck(OP.definition, (left, right, 10))
    torch.library.opcheck(OP.definition, (left.detach().float().requires_grad_(), right.detach().float(), 10))


def test_count():
    left, right = lists()
    with count() as ledger:
        product_topk(left, right, 4)
    ((_, work),) = ledger.entries.items()
    # Pairs (i, j) with (i + 1) * (j + 1) <= 4: 4 + 2 + 1 + 1.
    assert work.other == 9 * (12 + 7) + 9 * 2 * 8 and work.macs == 0
    assert work.bytes_read == 9 * 19 * 4 and work.bytes_written == 9 * 4 * 12


@pytest.mark.parametrize("k", [0, 85])
def test_bad_arguments(k):
    left, right = lists()
    with pytest.raises(ValueError, match=rf"k must be in 1\.\.84, the number of sums, got {k}"):
        product_topk(left, right, k)
    with pytest.raises(ValueError, match="as many rows and one dtype"):
        product_topk(left[:3], right, 2)
