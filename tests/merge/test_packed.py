"""Packed sequences: each as if it were alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge.merge_cases import check_plan, normal, signs

from saccade import merge as M


def check_alone(impl, x, bounds, r, **kw):
    plan = M.match(x, r, cu_seqlens=bounds, impl=impl, **kw)
    check_plan(plan)
    row = 0
    assert plan.cu_rows.dtype == torch.int32 and int(plan.cu_rows[0]) == 0
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        alone = M.match(x[:, a:b], r, impl=impl, **kw)
        assert int(plan.cu_rows[i]) == row
        shift = lambda t, by: torch.where(t >= 0, t + by, t)  # noqa: E731
        assert torch.equal(plan.inverse[:, a:b], shift(alone.inverse, row))
        assert torch.equal(plan.head[:, row : row + alone.rows], shift(alone.head, a))
        assert torch.equal(plan.score[:, a:b], alone.score)
        row += alone.rows
    assert int(plan.cu_rows[-1]) == row == plan.rows
    return plan


@pytest.mark.parametrize("partition", [M.Alternate(), M.Strided(3), M.Random(2, seed=1)])
@pytest.mark.parametrize("score", ["cosine", "l2"])
def test_each_as_if_alone(every, partition, score):
    impl, device = every
    x = signs((1, 50, 16), seed=1, device=device)
    for bounds in ([0, 50], [0, 10, 50], [0, 4, 9, 30, 50]):
        check_alone(impl, x, bounds, 2, partition=partition, score=score)


def test_random_values(implementation):
    """Not exact scores: the bits of a sequence do not depend on its neighbours."""
    impl, device = implementation
    check_alone(impl, normal((1, 300, 40), torch.bfloat16, device=device), [0, 7, 130, 201, 300], 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.data())
def test_any_lengths(lengths, data):
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    r = data.draw(st.integers(0, min((n + 1) // 2 if n > 1 else 0 for n in lengths)))
    check_alone(
        "auto",
        signs(
            (1, bounds[-1], 4),
            seed=len(lengths),
            distinct=data.draw(st.sampled_from([None, 2])) if bounds[-1] else None,
        ),
        bounds,
        r,
    )


def test_forms_of_cu_seqlens():
    x = signs((1, 20, 16))
    want = M.match(x, 2, cu_seqlens=[0, 8, 20])
    for form in ((0, 8, 20), torch.tensor([0, 8, 20]), torch.tensor([0, 8, 20], dtype=torch.int32)):
        got = M.match(x, 2, cu_seqlens=form)
        assert torch.equal(got.inverse, want.inverse) and torch.equal(got.cu_rows, want.cu_rows)


def test_ratio_of_each_length():
    plan = M.match(signs((1, 30, 16)), ratio=0.3, cu_seqlens=[0, 10, 30])
    assert plan.cu_rows.tolist() == [0, 7, 21]


def test_protected_and_not_finite(every):
    impl, device = every
    x = signs((1, 24, 16), seed=2, device=device)
    x[0, [0, 2, 4, 6]] = float("nan")
    mask = torch.zeros(1, 24, dtype=torch.bool, device=device)
    mask[0, 12:15] = True
    plan = M.match(x, 3, protect=mask, cu_seqlens=[0, 10, 24], impl=impl)
    check_plan(plan)
    assert int(plan.dropped) == 2 and (plan.inverse[0, [0, 2]] == -1).all()  # one finite source in the first sequence
    assert plan.cu_rows.tolist() == [0, 7, 18]
    y, size = M.merge(x, plan, impl=impl)
    assert float(size.sum()) == 22 and int(y.isnan().any(-1).sum()) == 2


def test_limit_of_each_sequence():
    x = signs((1, 24, 16))
    with pytest.raises(ValueError, match="r: at most 2 tokens of a sequence of 4 can be merged, got 3"):
        M.match(x, 3, cu_seqlens=[0, 20, 24])
    with pytest.raises(ValueError, match="r: at most 0 tokens of a sequence of 1 can be merged, got 1"):
        M.match(x, 1, cu_seqlens=[0, 23, 24])
    mask = torch.zeros(24, dtype=torch.bool)
    mask[20:23] = True
    for protect in (mask, [20, 21, 22]):
        with pytest.raises(ValueError, match="r: at most 0 tokens of a sequence of 4 can be merged, got 1"):
            M.match(x, 1, cu_seqlens=[0, 20, 24], protect=protect)


def test_merge_and_back(every):
    impl, device = every
    x = signs((1, 40, 16), seed=3, device=device)
    plan = M.match(x, 4, cu_seqlens=[0, 17, 40], impl=impl)
    v = normal((1, 40, 6), device=device).requires_grad_()
    y, _ = M.merge(v, plan, impl=impl)
    back = M.unmerge(y, plan, impl=impl)
    back.sum().backward()
    parts = torch.cat(
        [M.merge(v[:, a:b], M.match(x[:, a:b], 4, impl=impl), impl=impl)[0] for a, b in ((0, 17), (17, 40))], 1
    )
    assert torch.equal(parts, y) and v.grad.shape == v.shape
    assert M.merge_positions(plan, torch.arange(40, device=device)).shape == (32,)
