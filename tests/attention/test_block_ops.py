"""block_pool, block_select and block_transpose: by hand, and every implementation against the specification."""

from __future__ import annotations

import pytest
import torch
from attention import block_cases as cases
from attention.block_cases import SELECT_SHAPES, SHARE, THRESHOLD, TOP, call, small_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade._load import BINARY
from saccade.reference.block_pool import block_pool
from saccade.reference.block_select import block_select
from saccade.reference.block_transpose import block_transpose

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---- the specification, by hand --------------------------------------------------------------------------------------------
def test_pool_by_hand():
    x = torch.arange(6.0).view(1, 1, 3, 2)
    assert block_pool(x, None, 2).tolist() == [[[[1.0, 2.0], [4.0, 5.0]]]]
    order = torch.tensor([[[2, 0, -1, -1, -1, 1]]], dtype=torch.int32)
    assert block_pool(x, order, 2).tolist() == [[[[2.0, 3.0], [0.0, 0.0], [2.0, 3.0]]]]
    assert block_pool(x.double(), None, 4).dtype == torch.float64


def chosen(scores, classes=None, mode=TOP, keep=1, p=0.0):
    """Full and partial list of one row of scores."""
    k = torch.tensor(scores)[None, None, :, None]
    classes = None if classes is None else torch.tensor(classes, dtype=torch.uint8)[None, None, None]
    counts, indices, p_counts, p_indices = block_select(torch.ones(1, 1, 1, 1), k, classes, mode, keep, p, 1.0)
    full = indices.flatten()[: int(counts)].tolist()
    return full if classes is None else (full, p_indices.flatten()[: int(p_counts)].tolist())


def test_select_by_hand():
    scores = [1.0, 3.0, 3.0, 2.0]
    assert chosen(scores, keep=1) == [1] and chosen(scores, keep=2) == [1, 2] and chosen(scores, keep=3) == [1, 2, 3]
    assert chosen(scores, keep=9) == [0, 1, 2, 3] and chosen(scores, keep=0) == []
    halves = torch.tensor([0.5, 0.125, 0.25, 0.125]).log().tolist()
    assert chosen(halves, mode=SHARE, p=0.5) == [0]
    assert chosen(halves, mode=SHARE, p=0.51) == [0, 2] and chosen(halves, mode=SHARE, p=0.76) == [0, 1, 2]
    assert chosen(halves, mode=SHARE, p=1.0) == [0, 1, 2, 3] and chosen(halves, mode=SHARE, p=0.1, keep=3) == [0, 1, 2]
    assert chosen(halves, mode=THRESHOLD, p=0.2) == [0, 2] and chosen(halves, mode=THRESHOLD, p=0.9, keep=1) == [0]
    assert chosen(halves, mode=THRESHOLD, p=0.9, keep=0) == []


def test_select_classes_by_hand():
    scores = [9.0, 1.0, 2.0, 3.0, 0.0]
    assert chosen(scores, [0, 1, 2, 3, 4], keep=1) == ([3], [2, 4])
    assert chosen(scores, [0, 1, 2, 3, 4], keep=2) == ([1, 3], [2, 4])
    assert chosen(scores, [3, 1, 1, 0, 0], mode=SHARE, p=0.7, keep=0) == ([0, 2], [])  # 9 takes no share
    assert chosen(scores, [0, 0, 0, 0, 0], keep=3) == ([], [])


def test_transpose_by_hand():
    starts = torch.tensor([[[0, 4, 2]]], dtype=torch.int32)
    counts = torch.tensor([[[2, 1, 2]]], dtype=torch.int32)
    indices = torch.tensor([0, 2, 1, 2, 2], dtype=torch.int32)
    ids = torch.tensor([10, 11, 12, 13, 14], dtype=torch.int32)
    found = block_transpose(starts, counts, indices, ids, 3)
    assert [t.flatten().tolist() for t in found] == [[0, 1, 2], [1, 1, 3], [0, 2, 0, 1, 2], [10, 12, 11, 14, 13]]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, -0.5, 0.0, 1.0, 1.0, 3.0]), min_size=1, max_size=9),
    st.integers(0, 2),
    st.integers(0, 10),
    st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.99]),
    st.data(),
)
def test_select_equals_brute_force(scores, mode, keep, p, data):
    classes = data.draw(st.lists(st.integers(0, 4), min_size=len(scores), max_size=len(scores)))
    ranked = sorted((i for i, c in enumerate(classes) if c in (1, 2)), key=lambda i: (-scores[i], i))
    weight = {i: torch.tensor(scores[i]).double().exp().item() for i in ranked}
    total = sum(weight.values())
    p = float(torch.tensor(p))
    taken = set(ranked[:keep])
    if mode == SHARE:
        sums = [sum(weight[i] for i in ranked[:n]) for n in range(len(ranked) + 1)]
        if any(abs(s - p * total) < 1e-9 * total for s in sums):
            return  # on the edge the order of summation decides
        taken |= set(ranked[: next(n for n, s in enumerate(sums) if s >= p * total)]) if ranked else set()
    if mode == THRESHOLD:
        if any(abs(w - p * total) < 1e-9 * total for w in weight.values()):
            return
        taken |= {i for i in ranked if weight[i] >= p * total}
    taken |= {i for i, c in enumerate(classes) if c >= 3}
    want = tuple([i for i in sorted(taken) if classes[i] in kinds] for kinds in ((1, 3), (2, 4)))
    assert chosen(scores, classes, mode, keep, p) == want
    if BINARY.problem is None:
        k, c = torch.tensor(scores)[None, None, :, None], torch.tensor(classes, dtype=torch.uint8)[None, None, None]
        ours = torch.ops.saccade.block_select(torch.ones(1, 1, 1, 1), k, c, mode, keep, p, 1.0)
        theirs = block_select(torch.ones(1, 1, 1, 1), k, c, mode, keep, p, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- implementations -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases.POOL_SHAPES)
@pytest.mark.parametrize("kind", ["plain", "order", "orders"])
def test_pool(implementation, shape, dtype, kind):
    cases.check_pool(*implementation, shape, dtype, kind)


def test_pool_exact(implementation):
    cases.check_pool_exact(*implementation)


def test_pool_contains_what_is_not_finite(implementation):
    cases.check_pool_contains(*implementation)


@pytest.mark.parametrize("shape", SELECT_SHAPES)
@pytest.mark.parametrize("classes", ["none", "shared", "own"])
def test_select(implementation, shape, classes):
    cases.check_select(*implementation, shape, classes)


def test_select_special(implementation):
    cases.check_select_special(*implementation)


def test_select_many_blocks(implementation):
    """More key blocks than a program holds at once."""
    cases.check_select(
        *implementation, (1, 1, 1, 3, 2500, 16), "own", [(TOP, 700, 0.0), (SHARE, 1, 0.4), (THRESHOLD, 5, 0.001)]
    )


@pytest.mark.parametrize("lead", [(1, 1), (2, 3)])
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 9), (130, 70), (33, 1), (3, 1000)])
@pytest.mark.parametrize("storage", ["padded", "compressed"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_transpose(implementation, lead, rows, columns, storage, with_ids):
    cases.check_transpose(*implementation, lead, rows, columns, storage, with_ids)


def test_there_and_back(implementation):
    """Transposed twice, the lists are what they were, one behind the other."""
    impl, device = implementation
    starts, counts, indices, ids = cases.some_lists((2, 2), 17, 23, "padded")
    there = [t.to(device) for t in (starts, counts, indices, ids)]
    back = call("block_transpose", impl, *call("block_transpose", impl, *there, 23), 17)
    used = torch.arange(23) < counts[..., None]
    total = int(counts.sum())
    assert torch.equal(back[1].cpu(), counts)
    assert torch.equal(back[2].cpu()[:total], indices[used]) and torch.equal(back[3].cpu()[:total], ids[used])


def test_empty(implementation):
    impl, device = implementation
    f = lambda *shape: torch.zeros(*shape, device=device)  # noqa: E731
    i = lambda *shape: torch.zeros(*shape, dtype=torch.int32, device=device)  # noqa: E731
    assert call("block_pool", impl, f(2, 3, 0, 8), None, 64).shape == (2, 3, 0, 8)
    assert call("block_pool", impl, f(0, 3, 70, 8), None, 64).shape == (0, 3, 2, 8)
    assert not call("block_pool", impl, f(1, 1, 0, 8), i(1, 1, 64) - 1, 64).any()
    for mode in (TOP, SHARE, THRESHOLD):
        counts, indices, *_ = call("block_select", impl, f(1, 2, 3, 8), f(1, 1, 0, 8), None, mode, 2, 0.5, 1.0)
        assert not counts.any() and indices.shape == (1, 2, 3, 0)
        assert call("block_select", impl, f(1, 2, 0, 8), f(1, 1, 5, 8), None, mode, 2, 0.5, 1.0)[0].shape == (1, 2, 0)
    for rows, columns in ((0, 3), (3, 0), (0, 0)):
        starts, counts, indices, _ = call(
            "block_transpose", impl, i(1, 2, rows), i(1, 2, rows), i(1, 2, rows, columns), None, columns
        )
        assert starts.shape == counts.shape == (1, 2, columns) and not counts.any() and indices.numel() == 0
    t = call("block_transpose", impl, i(1, 1, 2), i(1, 1, 2), i(7) + 5, None, 3)
    assert not t[1].any() and not t[2].any()


def test_outside_of_storage_is_refused_on_the_cpu():
    one = lambda x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    for starts, counts, indices in (
        ([[[0, 3]]], [[[2, 2]]], [0, 1, 0, 1]),  # ends behind the entries
        ([[[-1, 2]]], [[[2, 2]]], [0, 1, 0, 1]),
        ([[[0, 2]]], [[[2, 2]]], [0, 1, 0, 7]),  # a column that is not there
        ([[[0, 0]]], [[[3, 3]]], [0, 1, 1]),  # one list twice
    ):
        with pytest.raises(RuntimeError, match="starts, counts"):
            torch.ops.saccade.block_transpose(one(starts), one(counts), one(indices), None, 3)


# ---- determinism -----------------------------------------------------------------------------------------------------------
def test_threads_change_no_bit():
    x = torch.randn(2, 3, 1000, 72, generator=cases.seeded(7))
    q, k = (torch.randn(2, 4, n, 40, generator=cases.seeded(n)) for n in (50, 60))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            pooled = torch.ops.saccade.block_pool(x, None, 64)
            lists = [t for m in range(3) for t in torch.ops.saccade.block_select(q, k, None, m, 3, 0.3, 0.2)]
            found.append([pooled, *lists])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_each_sample_alone(implementation):
    impl, device = implementation
    x = torch.randn(3, 2, 300, 64, generator=cases.seeded(8)).to(device)
    whole = call("block_pool", impl, x, None, 64)
    lists = call("block_select", impl, whole, whole, None, SHARE, 1, 0.4, 2.0)
    for b in range(3):
        own = call("block_pool", impl, x[b : b + 1], None, 64)
        assert torch.equal(own[0], whole[b])
        for a, w in zip(call("block_select", impl, own, own, None, SHARE, 1, 0.4, 2.0)[:2], lists[:2], strict=True):
            assert torch.equal(a[0], w[b])


def test_opcheck():
    assert BINARY.problem is None, BINARY.problem
    ops = torch.ops.saccade
    for x, order in ((torch.randn(2, 2, 70, 8), None), (torch.randn(1, 2, 70, 8).bfloat16(), cases.an_order(70, 64))):
        torch.library.opcheck(ops.block_pool.default, (x, order, 64))
    q, k = small_numbers(1, 2, 3, 8), small_numbers(1, 1, 5, 8)
    for classes in (None, cases.some_classes((1, 2), 3, 5)):
        for mode in range(3):
            torch.library.opcheck(ops.block_select.default, (q, k, classes, mode, 2, 0.5, 1.0))
    starts, counts, indices, ids = cases.some_lists((1, 2), 4, 6, "padded")
    for given_ids in (None, ids):
        torch.library.opcheck(ops.block_transpose.default, (starts, counts, indices, given_ids, 6))
