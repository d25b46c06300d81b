"""Raw ops that have no public function of their own name here: row_similarity, keep_top, knn_density."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge.merge_cases import DTYPES, LAYOUTS, generator, normal, whole_numbers

from saccade._dispatch import raw
from saccade._load import BINARY
from saccade.reference import keep_top as keep_reference
from saccade.reference import knn_density as knn_reference
from saccade.reference import row_similarity as similarity_reference
from saccade.testing import check_budget

INF, NAN = math.inf, math.nan


def call(op, impl):
    here = {"row_similarity": similarity_reference, "keep_top": keep_reference, "knn_density": knn_reference}
    return getattr(here[op], op) if impl == "reference" else raw(op, impl)


def test_similarity_by_hand():
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    y = torch.tensor([[[4.0, 3.0], [1.0, 1.0], [-2.0, 0.0]]], dtype=torch.float64)
    out = similarity_reference.row_similarity(x, y)
    torch.testing.assert_close(out, torch.tensor([[0.96, 0.0, -1.0]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarity(implementation, dtype):
    impl, device = implementation
    op = raw("row_similarity", impl)
    for i, (b, n, c) in enumerate(
        [(2, 33, 7), (1, 64, 64), (3, 5, 129), (2, 60, 520), (2, 40, 1), (1, 0, 8), (0, 4, 8)]
    ):
        layout = [la for la in LAYOUTS if la != "strided"][i % 4]
        x, y = normal((b, n, c), dtype, seed=i, layout=layout), normal((b, n, c), dtype, seed=i + 9)
        pairs = [
            (x, y),
            (x, x),
            (x, y[:1, :1].expand(b, n, c) if b and n else y),
            (x, y[:, :1].expand(b, n, c) if n else y),
        ]
        for a, o in pairs:
            out = op(a.to(device), o.to(device))
            assert out.dtype == torch.float32 and out.shape == (b, n)
            peer = similarity_reference.row_similarity(a, o)
            check_budget(f"{b} {n} {c}", out, peer, similarity_reference.row_similarity(a.double(), o.double()))


def test_similarity_of_a_row_to_itself_does_not_exceed_one_much(implementation):
    impl, device = implementation
    x = normal((1, 500, 80), torch.bfloat16, device=device)
    assert (raw("row_similarity", impl)(x, x) - 1).abs().max() <= 3e-7


def brute_top(scores, k):
    """Python sorts stably; NaN goes last."""
    order = sorted(
        range(len(scores)), key=lambda i: (math.isnan(scores[i]), 0 if math.isnan(scores[i]) else -scores[i])
    )
    return sorted(order[:k])


VALUES = st.sampled_from([-INF, -2.5, -1e-40, -0.0, 0.0, 1e-40, 0.5, 0.5, 1.0, 3e38, INF, NAN])


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, max_size=40), st.data())
def test_keep_top_equals_brute_force(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    x = torch.tensor([scores], dtype=torch.float32).view(1, -1)
    want = brute_top(x[0].tolist(), k)
    assert keep_reference.keep_top(x, k)[0].tolist() == want
    assert BINARY.problem is None, BINARY.problem
    out = torch.ops.saccade.keep_top(x, k)
    assert out.dtype == torch.int64 and out[0].tolist() == want


@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 255, 256, 257, 1024, 1025, 4099])
@pytest.mark.parametrize("kind", ["ties", "normal", "equal", "near"])
def test_keep_top(implementation, tokens, kind):
    impl, device = implementation
    g = generator(tokens)
    x = {
        "ties": torch.randint(-2, 3, (3, tokens), generator=g).float(),
        "normal": torch.randn(3, tokens, generator=g),
        "equal": torch.full((3, tokens), -0.0),
        "near": 1 + torch.randint(0, 5, (3, tokens), generator=g) * 2**-23,  # differ in the last bits
    }[kind]
    x[:, ::7] = NAN if kind == "ties" else x[:, ::7]
    wide = torch.full((3, 2 * tokens), NAN)
    wide[:, :tokens] = x
    for k in sorted({0, 1, tokens // 3, tokens - 1, tokens}):
        want = torch.tensor([brute_top(row.tolist(), k) for row in x]).view(3, k)
        assert torch.equal(raw("keep_top", impl)(x.to(device), k).cpu(), want)
        assert torch.equal(raw("keep_top", impl)(wide.to(device)[:, :tokens], k).cpu(), want)  # strided rows
        assert torch.equal(keep_reference.keep_top(x, k), want)


def test_keep_top_empty(every):
    impl, device = every
    assert call("keep_top", impl)(torch.zeros(0, 5, device=device), 2).shape == (0, 2)
    assert call("keep_top", impl)(torch.zeros(2, 0, device=device), 0).shape == (2, 0)


def brute_density(rows, k):
    out = []
    for i, a in enumerate(rows):
        far = sorted(
            0.0 if i == j else math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True)) for j, b in enumerate(rows)
        )
        out.append(math.fsum(far[:k]) / k / len(a))
    return out


def test_density_equals_brute_force(every):
    """Exactly: whole numbers, k and C powers of two."""
    impl, device = every
    for tokens in (8, 13, 40):
        x = whole_numbers((2, tokens, 8), seed=tokens)
        x[0, 3] = x[0, 5]  # neighbours at distance 0
        for k in (1, 2, 4, 8):
            out = call("knn_density", impl)(x.to(device), k)
            assert out.dtype == torch.float32 and out.tolist() == [brute_density(x[b].tolist(), k) for b in range(2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_density(implementation, dtype):
    impl, device = implementation
    for i, (b, n, c, k) in enumerate(
        [(2, 33, 7, 5), (1, 65, 64, 65), (2, 3, 129, 2), (1, 130, 40, 7), (1, 1, 5, 1), (0, 4, 8, 2)]
    ):
        layout = [la for la in LAYOUTS if la != "strided"][i % 4]
        x = normal((b, n, c), dtype, seed=i, layout=layout)
        out = raw("knn_density", impl)(x.to(device), k)
        peer, truth = knn_reference.knn_density(x, k), knn_reference.knn_density(x.double(), k)
        check_budget(f"{b} {n} {c} {k}", out, peer, truth)


def test_density_of_equal_rows(every):
    """No distance below 0, however the products round."""
    impl, device = every
    x = normal((1, 1, 50), device=device).expand(1, 70, 50)
    out = call("knn_density", impl)(x, 9)
    assert (out >= 0).all() and out.max() < 1e-5


def test_raw_ops_keep_memory_safe():
    """Direct callers get errors, not a crash, whose text names the argument."""
    ops = torch.ops.saccade
    x, i = torch.ones(2, 6, 4), lambda *s: torch.zeros(*s, dtype=torch.int32)
    src, dst = i(1, 3), i(1, 3)
    inverse, ptr, members, head = i(2, 6), i(2, 5), i(2, 6), i(2, 4)
    total = torch.ones(2, 4)
    bad = {
        "src": [(ops.match, (x, src.long(), dst, None, None, 0)), (ops.match, (x, i(3, 3), dst, None, None, 0))],
        "dst": [(ops.match, (x, src, dst[0], None, None, 0)), (ops.match, (x, src, i(2, 6)[:, ::2], None, None, 0))],
        "ranges": [
            (ops.match, (x, src, dst, i(1, 2, 1, 2), None, 0)),
            (ops.match, (x, src, dst, i(1, 3, 1, 3), None, 0)),
        ],
        "protect": [
            (ops.match, (x, src, dst, None, torch.zeros(1, 5, dtype=torch.bool), 0)),
            (ops.match, (x, src, dst, None, i(1, 6), 0)),
        ],
        "score": [
            (ops.match, (x, src, dst, None, None, 3)),
            (ops.merge_plan, (torch.zeros(2, 6, dtype=torch.float64), i(2, 6), 6, 0, 0.0, False)),
        ],
        "metric": [(ops.match, (x.long(), src, dst, None, None, 0)), (ops.match, (x[0], src, dst, None, None, 0))],
        "target": [
            (ops.merge_plan, (torch.zeros(2, 6), i(2, 5), 6, 0, 0.0, False)),
            (ops.merge_plan, (torch.zeros(2, 6), i(2, 6).long(), 6, 0, 0.0, False)),
        ],
        "rows": [(ops.merge_plan, (torch.zeros(2, 6), i(2, 6), -1, 0, 0.0, False))],
        "ptr": [
            (ops.merge, (x, None, i(2, 4), members, head, 0)),
            (ops.merge, (x, None, ptr.long(), members, head, 0)),
        ],
        "members": [
            (ops.merge, (x, None, ptr, i(2, 5), head, 0)),
            (ops.merge, (x, None, ptr, members.long(), head, 0)),
        ],
        "head": [(ops.merge, (x, None, ptr, members, head.float(), 0))],
        "weight": [(ops.merge, (x, torch.ones(2, 5), ptr, members, head, 0))],
        "mode": [(ops.merge, (x, None, ptr, members, head, 4))],
        "inverse": [
            (ops.unmerge, (torch.ones(2, 4, 4), i(3, 6), None, None)),
            (ops.merge_bwd, (torch.ones(2, 4, 4), None, None, total, i(2, 6).long(), ptr, members, head, 0)),
        ],
        "residual": [
            (ops.unmerge, (torch.ones(2, 4, 4), inverse, torch.ones(2, 5, 4), None)),
            (ops.unmerge, (torch.ones(2, 4, 4), inverse, x.half(), None)),
        ],
        "gate": [(ops.unmerge, (torch.ones(2, 4, 4), inverse, None, torch.ones(2, 3, 4)))],
        "total": [(ops.merge_bwd, (torch.ones(2, 4, 4), None, None, torch.ones(2, 3), inverse, ptr, members, head, 0))],
        "x": [
            (ops.merge_bwd, (torch.ones(2, 4, 4), None, None, total, inverse, ptr, members, head, 2)),
            (ops.merge, (x.double(), None, ptr, members, head, 0)),
            (ops.merge, (torch.ones(2, 6, 8)[..., ::2], None, ptr, members, head, 0)),
        ],
        "y": [(ops.row_similarity, (x, torch.ones(2, 5, 4))), (ops.row_similarity, (x, x.half()))],
        "scores": [(ops.keep_top, (torch.zeros(2, 3, dtype=torch.float64), 1)), (ops.keep_top, (torch.zeros(3), 1))],
        "k": [
            (ops.keep_top, (torch.zeros(2, 3), 4)),
            (ops.keep_top, (torch.zeros(2, 3), -1)),
            (ops.knn_density, (x, 0)),
            (ops.knn_density, (x, 7)),
        ],
    }
    wrong = []
    for name, calls in bad.items():
        for op, arguments in calls:
            try:
                op(*arguments)
                wrong.append(f"{op} accepts a bad {name}")
            except (RuntimeError, ValueError, TypeError) as error:
                if name not in str(error).splitlines()[0]:
                    wrong.append(f"{op} {name}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def test_targets_outside_of_the_sample_are_no_targets():
    target = torch.tensor([[99, -1, 5, 2**31 - 1, -7]], dtype=torch.int32)
    inverse, *_ = torch.ops.saccade.merge_plan(torch.zeros(1, 5), target, 5, 5, -INF, False)
    assert inverse.tolist() == [[0, 1, 2, 3, 4]]
