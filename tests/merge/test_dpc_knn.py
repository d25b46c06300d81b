"""Density peaks, against Chat-UniVi's algorithm without its noise, in float64 with all N x N distances."""

from __future__ import annotations

import pytest
import torch
from merge.merge_cases import generator

import saccade
from saccade import merge as M

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")


def peaks(x, k):
    """Distances [N][N] and density * delta [N] of one sample [N, C]; equal densities: the earlier is the denser."""
    x = x.double()
    squares = ((x[:, None] - x[None]) ** 2).sum(-1) / x.shape[1]  # ties stay ties: no root is squared again
    density = (-squares.sort(-1).values[:, :k].mean(-1)).exp().tolist()
    distance = squares.sqrt().tolist()
    farthest, n = max(map(max, distance)), len(x)
    score = []
    for i in range(n):
        denser = [distance[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        score.append(density[i] * min(denser, default=farthest))
    return distance, score


def brute(distance, score, clusters):
    """Centres, ascending, and the cluster of each token."""
    n = len(score)
    centres = sorted(sorted(range(n), key=lambda i: (-score[i], i))[:clusters])
    nearest = [min(range(clusters), key=lambda c: (distance[i][centres[c]], c)) for i in range(n)]
    for c, i in enumerate(centres):
        nearest[i] = c  # a centre is in its own cluster, also where another lies in the same place
    return centres, nearest


def check(x, k, many, every):
    expected = [peaks(sample, k) for sample in x]
    for clusters in many:
        plan = M.dpc_knn(x.to(every[1]), clusters, k, impl=every[0])
        assert plan.rows == clusters and plan.counts.tolist() == [clusters] * len(x)
        for b, (distance, score) in enumerate(expected):
            centres, nearest = brute(distance, score, clusters)
            assert plan.head[b].tolist() == centres
            assert plan.inverse[b].tolist() == nearest
        assert (plan.dropped == 0).all()


def test_by_hand(every):
    x = torch.tensor([[[0.0], [1.0], [10.0], [2.0], [11.0], [1.0]]], device=every[1])
    # k = 2: squared distances to the nearest other 1, 0, 1, 1, 1, 0, halved: tokens 1 and 5 are the densest, 1 before 5.
    plan = M.dpc_knn(x, 2, k=2, impl=every[0])
    assert plan.head.tolist() == [[1, 2]] and plan.inverse.tolist() == [[0, 0, 1, 0, 1, 0]]
    y, size = M.merge(x, plan)
    assert y.flatten().tolist() == [1.0, 10.5] and size.flatten().tolist() == [4, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,channels", ((1, 3), (2, 1), (17, 8), (64, 24), (130, 33)))
def test_is_chat_univis(every, tokens, channels, dtype):
    spots = 3 * torch.randn(2, 6, channels, generator=generator(1))
    pick = torch.randint(0, 6, (2, tokens), generator=generator(2))
    x = spots.gather(1, pick[..., None].expand(-1, -1, channels)) / 2
    x = (x + torch.randn(2, tokens, channels, generator=generator(3)) / 2).to(dtype)
    for k in sorted({1, min(5, tokens), min(9, tokens)}):
        # With k = 1 all densities are 1.
        many = {1, tokens} if k == 1 else {1, min(5, tokens), max(tokens // 2, 1), tokens}
        check(x, k, sorted(many), every)


@pytest.mark.parametrize("k", (1, 2, 4, 8))
def test_ties_go_to_the_earlier(every, k):
    x = torch.randint(-1, 2, (3, 40, 4), generator=generator(k)).float()  # many equal rows, distances and densities
    check(x, k, (1, 3, 17, 40), every)


def test_all_the_same(every):
    plan = M.dpc_knn(torch.ones(1, 9, 5, device=every[1]), 3, impl=every[0])
    assert plan.head.tolist() == [[0, 1, 2]] and plan.inverse.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0, 0]]


def test_far_apart_does_not_underflow(every):
    # All densities, exp(-5000) and less, are 0 in fp32; the last two tokens are the densest all the same.
    x = torch.tensor([[[900.0], [250.0], [100.0], [0.0]]], device=every[1])
    plan = M.dpc_knn(x, 2, k=2, impl=every[0])
    assert plan.head.tolist() == [[2, 3]] and plan.inverse.tolist() == [[0, 0, 0, 1]]


def test_tokens_that_are_not_finite(every):
    x = torch.randn(2, 20, 8, generator=generator(0))
    clean = [i for i in range(20) if i not in (3, 7, 11)]
    alone = M.dpc_knn(x[:1, clean].to(every[1]), 4, impl=every[0])
    x[0, 3, 1], x[0, 7, 0], x[0, 11, 5] = NAN, INF, -INF
    plan = M.dpc_knn(x.to(every[1]), 4, impl=every[0])
    assert plan.inverse[0, [3, 7, 11]].tolist() == [-1] * 3 and plan.dropped.tolist() == [3, 0]
    assert torch.equal(plan.inverse[0, clean], alone.inverse[0])
    assert plan.head[0].tolist() == [clean[i] for i in alone.head[0]]
    y = M.merge(x.to(every[1]), plan)[0]
    assert y.isfinite().all()
    x[0, 1:] = NAN  # one token is left for four clusters
    plan = M.dpc_knn(x.to(every[1]), 4, impl=every[0])
    assert plan.inverse[0, 0] == 0 and plan.rows == 4 and int((plan.inverse[0] >= 0).sum()) == 4


def test_the_same_every_time_and_for_any_batch_and_stride(every):
    x = torch.randn(3, 50, 16, generator=generator(0)).to(every[1])
    plan = M.dpc_knn(x, 7, impl=every[0])
    wide = torch.full((3, 50, 32), NAN, device=every[1])
    wide[..., 16:] = x
    for again in (M.dpc_knn(x, 7, impl=every[0]), M.dpc_knn(wide[..., 16:], 7, impl=every[0])):
        assert torch.equal(again.inverse, plan.inverse) and torch.equal(again.head, plan.head)
    parts = [M.dpc_knn(x[i : i + 1], 7, impl=every[0]) for i in range(3)]
    assert torch.equal(torch.cat([p.inverse for p in parts]), plan.inverse)
    assert torch.equal(torch.cat([p.head for p in parts]), plan.head)


def test_gradient_of_merged_values_only():
    x = torch.randn(1, 8, 3, generator=generator(0), dtype=torch.float64, requires_grad=True)
    plan = M.dpc_knn(x, 3)
    assert not plan.score.requires_grad
    torch.autograd.gradcheck(lambda x: M.merge(x, plan)[0], (x,))


def test_compiles_into_one_graph():
    x = torch.randn(2, 30, 8, generator=generator(0))
    compiled = torch.compile(lambda x: M.dpc_knn(x, 4).inverse, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), M.dpc_knn(x, 4).inverse)


X = torch.ones(2, 6, 3)
BAD = {
    "type": (([1.0], 2), {}, TypeError, "x: expected a tensor"),
    "dimensions": ((X[0], 2), {}, ValueError, "x: expected 3 dimensions"),
    "dtype": ((X.int(), 2), {}, TypeError, "x: expected dtype"),
    "no samples": ((X[:0], 2), {}, ValueError, "x: expected at least one sample and one token"),
    "no tokens": ((X[:, :0], 2), {}, ValueError, "x: expected at least one sample and one token"),
    "clusters": ((X, 7), {}, ValueError, "clusters: expected at most 6"),
    "no clusters": ((X, 0), {}, ValueError, "clusters: expected a whole number of at least 1"),
    "clusters type": ((X, 2.0), {}, TypeError, "clusters: expected a whole number"),
    "k": ((X, 2), {"k": 7}, ValueError, "k: expected at most 6"),
    "no k": ((X, 2), {"k": 0}, ValueError, "k: expected a whole number of at least 1"),
    "float64 by a kernel": ((X.double(), 2), {"impl": "cpu"}, ValueError, "no float64 kernel of this op"),
    "impl": ((X, 2), {"impl": "fast"}, ValueError, "impl: expected one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, named, error, message = BAD[case]
    with pytest.raises(error) as caught:
        M.dpc_knn(*arguments, **named)
    assert message in str(caught.value)


def test_explain():
    assert saccade.explain("dpc_knn", X, 2).verdicts["cuda"].startswith("needs tensors on a CUDA device")
    many = torch.ones(1, 40, 3)
    assert saccade.explain("dpc_knn", many, 2, 33).verdicts["cuda"] == "takes k up to 32, got 33"
    assert "takes k" not in saccade.explain("dpc_knn", many, 2, k=32).verdicts["cuda"]
    check(torch.randn(1, 40, 3, generator=generator(0)), 33, (3,), ("cpu", "cpu"))
