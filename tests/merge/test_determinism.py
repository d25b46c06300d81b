"""The same bits: from run to run, for any batch, any number of threads, any instruction set where sums are exact."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge.merge_cases import DTYPES, MODES, SCORES, normal, same_plan, signs, whole_numbers

from saccade import merge as M
from saccade._dispatch import raw

TESTS = Path(__file__).parents[1]


def everything(impl, x, score="cosine"):
    """All results of the family for metric and values x [B, N, C], as a list of tensors with a batch."""
    plan = M.match(x, x.shape[1] // 3, score=score, impl=impl)
    out = [plan.inverse, plan.ptr, plan.members, plan.head, plan.score]
    leaf = x.detach().clone().requires_grad_()
    size = torch.linspace(1, 7, x.shape[1], device=x.device).expand(x.shape[0], -1)
    for mode in MODES:
        y, total, log_total = M.merge(leaf, plan, size, mode=mode, log_size=True, impl=impl)
        back = M.unmerge(y, plan, residual=x, gate=x, impl=impl)
        (dx,) = torch.autograd.grad(back, leaf, x)
        out += [y.detach(), total, log_total, back.detach(), dx]
    if impl != "reference":
        out.append(raw("row_similarity", impl)(x, x.flip(1).contiguous()))
        out.append(raw("knn_density", impl)(x, min(5, x.shape[1])))
        out.append(raw("keep_top", impl)(plan.score.nan_to_num(neginf=-9.0), x.shape[1] // 2))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 37, 24), (2, 260, 80)])
def test_each_sample_alone_and_again(implementation, dtype, shape):
    impl, device = implementation
    x = normal(shape, dtype, seed=1, device=device)
    whole = everything(impl, x)
    assert all(torch.equal(a, b) for a, b in zip(whole, everything(impl, x), strict=True))
    for b in range(shape[0]):
        alone = everything(impl, x[b : b + 1])
        for i, (a, w) in enumerate(zip(alone, whole, strict=True)):
            assert torch.equal(a[0], w[b]), (b, i)
    twice = everything(impl, torch.cat((x, x.flip(0))))
    assert all(torch.equal(t[: shape[0]], w) for t, w in zip(twice, whole, strict=True))


def test_thread_count_changes_no_bit():
    """Bits of inexact sums too."""
    threads = torch.get_num_threads()
    inputs = [normal((1, 700, 33), seed=2), normal((5, 64, 40), torch.bfloat16, seed=3), normal((2, 1, 8))]
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([r for x in inputs for r in everything("cpu", x)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def exact_inputs():
    """Every score and every sum is exact (unit sizes aside): no order of summation can show."""
    for dtype in DTYPES:
        yield "cosine", signs((2, 130, 64), dtype, seed=4, distinct=9)
        yield "dot", whole_numbers((2, 75, 33), dtype, seed=5)
        yield "l2", whole_numbers((2, 75, 33), dtype, seed=6)


def exact_results(impl, device="cpu"):
    out = []
    for score, x in exact_inputs():
        x = x.to(device)
        plan = M.match(x, x.shape[1] // 3, score=score, impl=impl)
        out += [plan.inverse, plan.ptr, plan.members, plan.head, plan.score]
        for mode in ("sum", "max", "replace"):
            y, total = M.merge(x, plan, mode=mode, impl=impl)
            out += [y, total, M.unmerge(y, plan, residual=x, gate=x, impl=impl)]
    return [t.cpu() for t in out]


def test_implementations_agree_where_sums_are_exact(implementation):
    impl, device = implementation
    for a, b in zip(exact_results(impl, device), exact_results("reference"), strict=True):
        assert torch.equal(a, b)


CHILD = """
import sys, torch
sys.path[:0] = [{tests!r}]
from merge.test_determinism import exact_results
torch.save(exact_results("cpu"), sys.argv[1])
"""


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_instruction_set_changes_no_exact_bit(level, tmp_path):
    file = tmp_path / "out.pt"
    environment = {**os.environ, "SACCADE_CPU_CAPABILITY": level, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", CHILD.format(tests=str(TESTS)), str(file)], env=environment, check=True)
    for a, b in zip(torch.load(file), exact_results("cpu"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", SCORES)
def test_neighbours_in_a_sample_do_not_matter(implementation, kind):
    """A source's score and choice depend on it and the destinations alone, not on where in a tile it lies."""
    impl, device = implementation
    x = normal((1, 200, 40), seed=7, device=device)
    dst = torch.arange(1, 200, 2, dtype=torch.int32, device=device)[None]
    src = torch.arange(0, 200, 2, dtype=torch.int32, device=device)[None]
    op = raw("match", impl)
    score, target = op(x, src, dst, None, None, SCORES[kind])
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1)).to(device)
    for some in (src[:, order], src[:, 37:38], src[:, 5:60], src[:, order[:33]]):
        some = some.contiguous()
        own, goal = op(x, some, dst, None, None, SCORES[kind])
        at = some[0].long()
        assert torch.equal(own[0, at], score[0, at]) and torch.equal(goal[0, at], target[0, at])


def test_order_of_destinations_decides_ties_only(implementation):
    impl, device = implementation
    x = normal((1, 150, 24), seed=8, device=device)
    src = torch.arange(0, 150, 2, dtype=torch.int32, device=device)[None]
    dst = torch.arange(1, 150, 2, dtype=torch.int32, device=device)[None]
    want = raw("match", impl)(x, src, dst, None, None, 0)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(2)).to(device)
    got = raw("match", impl)(x, src, dst[:, order].contiguous(), None, None, 0)
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])


def test_plans_from_two_calls_are_equal(implementation):
    impl, device = implementation
    x = normal((2, 120, 16), seed=9, device=device)
    for kw in ({}, {"order": "similarity"}, {"share_batch": True}, {"whole_batch": True}, {"window": 2}):
        assert same_plan(M.match(x, 30, impl=impl, **kw), M.match(x, 30, impl=impl, **kw))
