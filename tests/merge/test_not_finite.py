"""Rows that are not finite: never merged, never chosen, and no other row's bits depend on them."""

from __future__ import annotations

import pytest
import torch
from merge.merge_cases import DTYPES, SCORES, alternate, check_plan, generator, match, normal, signs

from saccade import merge as M
from saccade._dispatch import raw
from saccade.reference import knn_density as knn_reference
from saccade.reference import row_similarity as similarity_reference

INF, NAN = float("inf"), float("nan")
# One bad channel is enough; 3e38 and 1e30 are finite, their squares are not.
BAD = {"nan": NAN, "inf": INF, "-inf": -INF, "large": 3e38, "square": 1e30}


def broken_rows(tokens, seed):
    return torch.rand(tokens, generator=generator(seed)) < 0.25


def spoil(x, rows, value, channel=None):
    """x with one channel of each of `rows` (all samples) replaced."""
    out = x.clone()
    width = x.shape[-1]
    for n in torch.nonzero(rows)[:, 0].tolist():
        out[:, n, n % width if channel is None else channel] = value
    return out


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_they_reach_no_other_row(every, kind, value, dtype):
    """Whatever a bad row holds, all other rows keep the bits that they have when it is protected."""
    impl, device = every
    for tokens, channels in [(17, 5), (70, 40)]:
        x = normal((2, tokens, channels), dtype, seed=tokens, device=device)
        rows = broken_rows(tokens, channels)
        number = BAD[value] if dtype != torch.float16 or value not in ("large", "square") else INF
        bad = spoil(x, rows, number)
        src, dst = alternate(tokens, device)
        mask = rows[None].to(device)
        score, target = match(impl, bad, src, dst, score=SCORES[kind])
        want_score, want_target = match(impl, x, src, dst, None, mask, SCORES[kind])
        assert (target[:, rows] == -2).all() and (score[:, rows] == -INF).all()
        assert torch.equal(score[:, ~rows], want_score[:, ~rows])
        assert torch.equal(target[:, ~rows], want_target[:, ~rows])
        assert not score.isnan().any()
        again = match(impl, spoil(x, rows, NAN, 0), src, dst, score=SCORES[kind])  # another way to be broken
        assert torch.equal(score, again[0]) and torch.equal(target, again[1])


def test_within_ranges(every):
    impl, device = every
    x = signs((1, 24, 16), seed=1, device=device)
    rows = broken_rows(24, 3)
    window = M.Alternate().ranges(24, 1, torch.device("cpu")).to(device)
    src, dst = alternate(24, device)
    score, target = match(impl, spoil(x, rows, NAN), src, dst, window)
    want = match(impl, x, src, dst, window, rows[None].to(device))
    assert torch.equal(score[:, ~rows], want[0][:, ~rows]) and torch.equal(target[:, ~rows], want[1][:, ~rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_is_broken(every, dtype):
    impl, device = every
    for value in (NAN, INF):
        x = torch.full((2, 20, 8), value, dtype=dtype, device=device)
        score, target = match(impl, x, *alternate(20, device))
        assert (score == -INF).all() and (target == -2).all()
        plan = M.match(x, 6, impl=impl)
        check_plan(plan)
        assert plan.rows == 14 and plan.dropped.tolist() == [6, 6]
        assert plan.head.tolist() == [list(range(6, 20))] * 2  # the first are dropped


def test_bad_rows_pay_first(every):
    """Where they leave too few to merge, the first of them lose their place; with enough others, none does."""
    impl, device = every
    x = signs((3, 20, 16), seed=2, device=device)
    x[0, [4, 9]] = NAN  # a source and a destination: 9 sources are left
    x[1, [0, 2, 4, 6, 8, 11]] = INF  # 5 sources are left
    plan = M.match(x, 8, impl=impl)
    check_plan(plan)
    assert plan.dropped.tolist() == [0, 3, 0]
    assert plan.inverse[1, [0, 2, 4]].tolist() == [-1] * 3 and (plan.inverse[1, [6, 8, 11]] >= 0).all()
    lonely = [6, 8, 11]
    assert (plan.ptr.diff(dim=1)[1].gather(0, plan.inverse[1, lonely].long()) == 1).all()
    alone = M.match(x[2:], 8, impl=impl)
    assert torch.equal(alone.inverse[0], plan.inverse[2])


def test_a_threshold_drops_nothing(every):
    impl, device = every
    x = signs((2, 20, 16), seed=3, device=device)
    x[0, ::2] = NAN
    plan = M.match(x, threshold=0.0, impl=impl)
    assert plan.dropped.tolist() == [0, 0] and int(plan.counts[0]) == 20


def test_sharing_a_plan_protects_the_rows_of_every_sample(every):
    """A row that is bad in one sample is merged in none: along a shared plan it would reach others."""
    impl, device = every
    x = normal((3, 12, 8), device=device)
    x[1] = x[1, :1]  # all alike: this sample would merge anything
    bad = x.clone()
    bad[0, 2], bad[2, 7] = NAN, INF
    plan = M.match(bad, 4, share_batch=True, impl=impl)
    check_plan(plan)
    want = M.match(x, 4, share_batch=True, protect=[2, 7], impl=impl)
    assert torch.equal(plan.inverse, want.inverse) and int(plan.dropped) == 0
    y, _ = M.merge(bad, plan, impl=impl)
    assert (~y.isfinite()).any(-1).sum(1).tolist() == [1, 0, 1]
    most = M.match(bad, 5, share_batch=True, impl=impl)
    assert int(most.dropped) == 0
    every_source = M.match(bad, 6, share_batch=True, impl=impl)
    assert every_source.inverse[0, 2] == -1 and int(every_source.dropped) == 1


def test_whole_batch(every):
    impl, device = every
    x = signs((2, 16, 16), seed=4, device=device)
    x[0, :14] = NAN
    plan = M.match(x, 8, whole_batch=True, impl=impl)
    check_plan(plan)
    assert plan.dropped.tolist() == [0, 0] and int(32 - plan.counts.sum()) == 8


@pytest.mark.parametrize("value", BAD)
def test_row_similarity(every, value):
    impl, device = every
    op = similarity_reference.row_similarity if impl == "reference" else raw("row_similarity", impl)
    x, y = normal((2, 30, 20), device=device), normal((2, 30, 20), seed=1, device=device)
    rows = broken_rows(30, 5)
    want, got, other = op(x, y), op(spoil(x, rows, BAD[value]), y), op(x, spoil(y, rows, BAD[value]))
    for out in (got, other):
        assert out[:, rows].isnan().all() and torch.equal(out[:, ~rows], want[:, ~rows])


@pytest.mark.parametrize("value", BAD)
def test_knn_density(every, value):
    impl, device = every
    op = knn_reference.knn_density if impl == "reference" else raw("knn_density", impl)
    x = normal((2, 33, 20), device=device)
    rows = broken_rows(33, 6)
    got = op(spoil(x, rows, BAD[value]), 4)
    assert (got[:, rows] == INF).all()
    torch.testing.assert_close(got[:, ~rows], op(x[:, ~rows].contiguous(), 4))
    few = op(spoil(x, torch.arange(33) >= 3, NAN), 5)  # three finite rows, five neighbours wanted
    torch.testing.assert_close(few[:, :3], op(x[:, :3].contiguous(), 3))
