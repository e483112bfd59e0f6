"""The ledger against counts worked out by hand."""

from __future__ import annotations

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F

from sparingly.energy import ledger
from sparingly.energy.ledger import Entry, count, record
from sparingly.energy.torch_rules import tensor_bytes

T, D, N = 3, 8, 5


def entry(book: ledger.Ledger, op: str, dtype: str = "float32") -> Entry:
    return book.entries[op, dtype]


def test_mm_reads_both_operands_and_writes_the_result():
    a, b = torch.randn(T, D), torch.randn(D, N)
    with count() as book:
        _ = a @ b
    assert book.entries == {("aten::mm", "float32"): Entry(T * D * N, 0, 4 * (T * D + D * N), 4 * T * N, 1)}
    assert book.coverage == 1.0


@pytest.mark.parametrize("inference", [False, True])
def test_linear_counts_the_same_with_and_without_autograd(inference: bool):
    layer, x = torch.nn.Linear(D, N), torch.randn(T, D)
    with torch.inference_mode(inference), count() as book:
        layer(x)
    expected = Entry(T * D * N, T * N, 4 * (T * D + D * N + N), 4 * T * N, 1)
    assert book.entries == {("aten::addmm", "float32"): expected}


def test_bfloat16_halves_the_bytes_and_stands_under_its_own_dtype():
    a, b = torch.randn(T, D).bfloat16(), torch.randn(D, N).bfloat16()
    with count() as book:
        _ = a @ b
    assert entry(book, "aten::mm", "bfloat16") == Entry(T * D * N, 0, 2 * (T * D + D * N), 2 * T * N, 1)


def test_backward_of_a_linear_adds_the_two_products_of_its_gradients():
    x, w = torch.randn(T, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    with count() as forward:
        y = x @ w.t()
    grad = torch.ones(T, N)
    with count() as backward:
        y.backward(grad)
    assert forward.macs == T * D * N
    assert backward.macs == 2 * T * D * N
    assert entry(backward, "aten::mm").calls == 2
    # grad with w, grad with x; both gradients written.
    read = 4 * ((T * N + N * D) + (T * N + T * D))
    assert entry(backward, "aten::mm").bytes_read == read
    assert entry(backward, "aten::mm").bytes_written == 4 * (T * D + N * D)


def test_embedding_reads_only_the_rows_asked_for():
    table, ids = torch.randn(1000, D), torch.tensor([3, 7, 7])
    with count() as book:
        F.embedding(ids, table)
    assert book.total == Entry(0, 0, 3 * 8 + 3 * D * 4, 3 * D * 4, 1)


def test_dense_gradient_of_an_embedding_writes_the_whole_table():
    table, ids = torch.randn(1000, D, requires_grad=True), torch.tensor([3, 7])
    out = F.embedding(ids, table)
    with count() as book:
        out.backward(torch.ones_like(out))
    assert entry(book, "aten::embedding_dense_backward").bytes_written == 4 * (1000 * D + 2 * D)


def test_embedding_bag_reads_rows_and_writes_one_sum_per_bag():
    table, ids, offsets = torch.randn(1000, D), torch.tensor([1, 2, 3, 4]), torch.tensor([0, 3])
    with count() as book:
        F.embedding_bag(ids, table, offsets, mode="sum")
    (total,) = [e for (op, _), e in book.entries.items() if "embedding_bag" in op]
    assert (total.bytes_read, total.bytes_written) == (4 * 8 + 2 * 8 + 4 * D * 4, 2 * D * 4)


def test_index_select_and_gather_read_what_they_return():
    table, ids = torch.randn(1000, D), torch.tensor([5, 6])
    with count() as book:
        table.index_select(0, ids)
        _ = table[ids]
    assert book.bytes_read == 2 * (2 * 8 + 2 * D * 4)


def test_views_are_free_and_expanded_operands_count_what_is_there():
    row = torch.randn(1, D)
    with count() as book:
        wide = row.expand(1000, D).view(1000, D).t()
    assert book.total == Entry()
    with count() as book:
        _ = wide + 1
    assert (book.bytes_read, book.bytes_written) == (4 * D, 4 * 1000 * D)


def test_one_tensor_used_twice_is_read_once():
    x = torch.randn(100)
    with count() as book:
        _ = x * x
    assert (book.bytes_read, book.bytes_written, book.other) == (400, 400, 100)


def test_in_place_operations_read_and_write_their_target():
    x, y = torch.zeros(100), torch.ones(100)
    with count() as book:
        x.add_(y)
        x.copy_(y)
        x.zero_()
    assert entry(book, "aten::add_") == Entry(0, 100, 800, 400, 1)
    assert entry(book, "aten::copy_") == Entry(0, 0, 400, 400, 1)
    assert entry(book, "aten::zero_") == Entry(0, 0, 0, 400, 1)


def test_a_scatter_in_place_touches_only_what_the_index_names():
    target, index, source = torch.zeros(1000, D), torch.tensor([2, 9]), torch.ones(2, D)
    with count() as book:
        target.index_add_(0, index, source)
    assert book.total == Entry(0, 2 * D, 2 * 8 + 2 * (2 * D * 4), 2 * D * 4, 1)


def test_convolution_forward_and_backward_macs():
    conv, x = torch.nn.Conv2d(2, 3, 3, bias=False), torch.randn(1, 2, 8, 8, requires_grad=True)
    per_pass = 3 * 6 * 6 * 2 * 3 * 3
    with count() as book:
        y = conv(x)
    assert book.macs == per_pass
    with count() as book:
        y.backward(torch.ones_like(y))
    assert book.macs == 2 * per_pass


def test_attention_counts_both_products_and_half_of_a_causal_one():
    q = torch.randn(1, 2, 4, 8)
    with count() as full:
        F.scaled_dot_product_attention(q, q, q)
    with count() as causal:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert full.macs == 2 * 4 * 4 * (8 + 8)
    assert causal.macs == 2 * (1 + 2 + 3 + 4) * (8 + 8)


@pytest.mark.parametrize("fused, foreach", [(True, False), (False, True), (False, False)])
def test_adamw_writes_parameter_and_both_moments(fused: bool, foreach: bool):
    p = torch.nn.Parameter(torch.randn(1000))
    p.grad = torch.randn(1000)
    optimizer = torch.optim.AdamW([p], fused=fused, foreach=foreach)
    optimizer.step()
    with count() as book:
        optimizer.step()
    assert book.coverage == 1.0
    assert book.bytes_written >= 3 * 4000
    assert book.bytes_read >= 4 * 4000


def test_a_whole_training_step_is_covered():
    model = torch.nn.Sequential(torch.nn.Linear(D, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, N))
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = torch.randn(T, D), torch.tensor([0, 1, 4])
    with count() as book:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert not book.unknown
    # Three products per layer but the first, which has no gradient of its input.
    assert book.macs == T * (2 * D * 16 + 3 * 16 * N)


def test_unknown_operations_lower_coverage_and_are_named():
    with torch.library._scoped_library("sparingly_test_unknown", "DEF") as library:
        library.define("mystery(Tensor x) -> Tensor")
        library.impl("mystery", lambda x: x.clone(), "CPU")
        x = torch.randn(10)
        with count() as book:
            torch.ops.sparingly_test_unknown.mystery(x)
            _ = x + x
    assert [op for op, _ in book.unknown] == ["sparingly_test_unknown::mystery"]
    assert book.coverage == pytest.approx(0.5)
    assert book.bytes == 80


def test_coverage_of_an_empty_ledger_is_not_a_number():
    with count() as book:
        pass
    assert book.coverage != book.coverage
    assert book.as_dict()["coverage"] is None


def test_record_reaches_every_open_ledger_and_none_after():
    with count() as outer:
        record("sparingly::x", dtype=torch.int8, macs=3, bytes_read=4)
        with count() as inner:
            _ = torch.ones(2) + 1
            record("sparingly::x", dtype="int8", macs=5)
            assert ledger.active()
    record("sparingly::x", dtype=torch.int8, macs=100)
    assert not ledger.active()
    assert inner.entries["sparingly::x", "int8"] == Entry(5, 0, 0, 0, 1)
    assert outer.entries["sparingly::x", "int8"] == Entry(8, 0, 4, 0, 2)
    assert entry(outer, "aten::add") == entry(inner, "aten::add")


def test_record_refuses_negative_counts_and_books_nothing():
    with count() as book, pytest.raises(ValueError, match="must not be negative"):
        record("sparingly::x", dtype="float32", macs=-1)
    assert not book.entries


def test_the_ledger_is_closed_when_the_block_raises():
    with pytest.raises(KeyError), count():
        raise KeyError("x")
    assert not ledger.active()


def test_own_operations_record_themselves_once():
    """The body's PyTorch operations are the kernel's business: only its own record counts."""
    with torch.library._scoped_library("sparingly", "FRAGMENT") as library:
        library.define("test_only_double(Tensor x) -> Tensor")

        def body(x: torch.Tensor) -> torch.Tensor:
            record("sparingly::test_only_double", dtype=x.dtype, other=x.numel(), bytes_read=40, bytes_written=40)
            return x.clone().mul_(2)

        library.impl("test_only_double", body, "CPU")
        with count() as outer, count() as inner:
            torch.ops.sparingly.test_only_double(torch.ones(10))
    for book in (outer, inner):
        own = {key: e for key, e in book.entries.items() if key[0] != "aten::ones"}
        assert own == {("sparingly::test_only_double", "float32"): Entry(0, 10, 40, 40, 1)}
        assert not book.unknown


def test_threads_count_for_themselves():
    books: dict[int, int] = {}
    barrier = threading.Barrier(2)

    def work(size: int) -> None:
        with count() as book:
            barrier.wait()
            _ = torch.ones(size, size) @ torch.ones(size, size)
            record("sparingly::x", dtype="float32", macs=size)
            barrier.wait()
        books[size] = book.macs

    threads = [threading.Thread(target=work, args=(size,)) for size in (4, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert books == {4: 4**3 + 4, 9: 9**3 + 9}


def test_pool_threads_have_no_ledger_and_shared_ledgers_lose_nothing():
    with count() as book, ThreadPoolExecutor(4) as pool:
        assert not pool.submit(ledger.active).result()
        contexts = [contextvars.copy_context() for _ in range(4)]

        def add() -> None:
            for _ in range(200):
                record("sparingly::x", dtype="float32", macs=1)

        for done in [pool.submit(context.run, add) for context in contexts]:
            done.result()
    assert book.macs == 800


def test_tensor_bytes_of_sparse_and_overlapping_tensors():
    indices = torch.tensor([[1, 5]])
    sparse = torch.sparse_coo_tensor(indices, torch.ones(2, D), (1000, D), check_invariants=True)
    assert tensor_bytes(sparse) == 2 * 8 + 2 * D * 4
    windows = torch.arange(10.0).unfold(0, 5, 1)
    assert windows.numel() == 30
    assert tensor_bytes(windows) == 40


def test_text_and_json_name_the_operations():
    with count() as book:
        _ = torch.ones(2, 2) @ torch.ones(2, 2)
    assert "aten::mm float32: 8 MACs" in str(book)
    assert book.as_dict()["total"]["macs"] == 8
