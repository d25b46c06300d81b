"""ToMe's parity against an oracle of our own in float64: plans, values, order of rows, and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from merge.tome_oracle import Oracle, alternate

from saccade import merge
from saccade.merge import MergeSchedule, Random, Strided, TokenMerger

TOKENS = (("class", True, False), ("none", False, False), ("both", True, True), ("distill", False, True))


def inputs(n, seed=0, batch=2, width=5):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(batch, n, width, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, n, 3, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 5, (batch, n, 1), generator=generator).double()
    return metric, x, size


def agree(plan, oracles):
    for b, oracle in enumerate(oracles):
        assert plan.inverse[b].tolist() == oracle.row_of
        assert plan.head[b].tolist() == oracle.heads
        bounds = plan.ptr[b].tolist()
        members = [plan.members[b, i:j].tolist() for i, j in itertools.pairwise(bounds)]
        assert members == oracle.members()
        for i, score in oracle.scores.items():
            assert abs(float(plan.score[b, i]) - score) < 1e-14


@pytest.mark.parametrize("n", [8, 9, 21])
@pytest.mark.parametrize(("class_token", "distill_token"), [t[1:] for t in TOKENS], ids=[t[0] for t in TOKENS])
def test_every_r_up_to_the_clamp_and_beyond(n, class_token, distill_token):
    metric, x, size = inputs(n)
    most = (n - class_token - distill_token) // 2
    for r in range(most + 3):
        merger = merge.tome(r, class_token, distill_token, parity=True)
        y, total, plan = merger(x, metric, size)
        oracles = [alternate(m, r, class_token, distill_token) for m in metric]
        if oracles[0] is None:
            assert plan.inverse.tolist() == [list(range(n))]  # ToMe hands x on as it is
            torch.testing.assert_close(y, x, rtol=1e-14, atol=1e-14)
            assert torch.equal(total.double(), size)
            continue
        assert plan.rows == n - min(r, most)
        agree(plan, oracles)
        for b, oracle in enumerate(oracles):
            rows, sizes = oracle.merge(x[b], size[b, :, 0])
            torch.testing.assert_close(y[b], rows, rtol=1e-14, atol=1e-14)
            assert torch.equal(total[b, :, 0].double(), sizes)
            assert torch.equal(merger.unmerge(y, plan)[b], oracle.unmerge(y[b]))


@pytest.mark.parametrize("mode", ["mean", "sum", "max", "replace"])
def test_modes(mode):
    metric, x, size = inputs(20, seed=3)
    plan = merge.tome(6, parity=True).match(metric)
    y, _ = merge.merge(x, plan, size, mode=mode)
    for b in range(2):
        rows, _ = alternate(metric[b], 6, class_token=True).merge(x[b], size[b, :, 0], mode)
        torch.testing.assert_close(y[b], rows, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("class_token", "distill_token"), [t[1:] for t in TOKENS[:3]], ids=[t[0] for t in TOKENS[:3]])
def test_without_parity_rows_lie_as_their_tokens(class_token, distill_token):
    metric, x, size = inputs(19, seed=5)
    y, total, plan = merge.tome(5, class_token, distill_token)(x, metric, size)
    assert torch.equal(plan.head, plan.head.sort(1).values)
    ours, theirs = plan, merge.tome(5, class_token, distill_token, parity=True).match(metric)
    assert torch.equal(ours.head.sort(1).values, theirs.head.sort(1).values)
    back = merge.unmerge(merge.merge(x, theirs, size)[0], theirs)
    torch.testing.assert_close(merge.unmerge(y, ours), back, rtol=1e-14, atol=1e-14)
    assert float(total.sum()) == float(size.sum())


def test_protected_tokens_stay_in_front_and_alone():
    metric, x, _ = inputs(18, seed=6)
    metric[:, 1], metric[:, 2] = metric[:, 0] * 2, metric[:, 0] * 3  # the most alike of all
    for class_token, distill_token in ((True, False), (True, True)):
        y, size, _ = merge.tome(8, class_token, distill_token, parity=True)(x, metric)
        count = class_token + distill_token
        assert torch.equal(y[:, :count], x[:, :count]) and float(size[:, :count].max()) == 1.0


@pytest.mark.parametrize(("n", "k"), [(12, 2), (12, 3), (20, 4), (20, 5)])
def test_kth(n, k):
    metric, x, size = inputs(n, seed=7)
    dst = list(range(k - 1, n, k))
    src = [i for i in range(n) if i not in dst]
    merger = TokenMerger(len(src), partition=Strided(k))
    y, total, plan = merger(x, metric, size)
    assert y.shape[1] == n // k
    oracles = [Oracle(m, len(src), src, dst) for m in metric]
    agree(plan, oracles)
    for b, oracle in enumerate(oracles):
        rows, sizes = oracle.merge(x[b], size[b, :, 0])
        torch.testing.assert_close(y[b], rows, rtol=1e-14, atol=1e-14)
        assert torch.equal(total[b, :, 0].double(), sizes)


@pytest.mark.parametrize("r", [1, 5, 9])
def test_random(r):
    metric, x, _ = inputs(19, seed=8)
    partition = Random(19 - r, seed=4)
    _, dst = partition.lists(19, torch.device("cpu"))
    dst = dst[0].tolist()
    src = [i for i in range(19) if i not in dst]
    y, _, plan = TokenMerger(r, partition=partition)(x, metric)
    assert y.shape[1] == len(dst) == 19 - r
    agree(plan, [Oracle(m, r, src, dst) for m in metric])


def test_a_token_of_zeros_is_no_nan():
    metric, x, _ = inputs(16, seed=9)
    metric[:, 4], metric[:, 7] = 0.0, 0.0
    for parity in (False, True):
        y, _, plan = merge.tome(7, class_token=False, parity=parity)(x, metric)
        assert y.isfinite().all() and float(plan.score[:, 4].max()) >= 0.0


def test_sizes_chain_over_layers():
    _metric, x, _ = inputs(24, seed=10)
    merger = TokenMerger(MergeSchedule.constant(4, 3, protected=1))
    y, size, whole = x, None, x.clone()
    for layer in range(3):
        y, size, _ = merger(y, None, size, index=layer)
    assert y.shape[1] == 12 and torch.equal(size.sum(1), torch.full((2, 1), 24.0))
    torch.testing.assert_close((y * size).sum(1), whole.sum(1), rtol=1e-12, atol=1e-12)
