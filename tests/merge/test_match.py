"""Scores and targets: against brute force in float64, exactly where the scores are exact."""

from __future__ import annotations

import pytest
import torch
from merge import brute
from merge.merge_cases import (
    CHANNELS,
    DTYPES,
    LAYOUTS,
    SCORES,
    TOKENS,
    alternate,
    generator,
    laid_out,
    lists,
    match,
    normal,
    signs,
    whole_numbers,
)

from saccade import merge as M
from saccade.reference.match import allowed
from saccade.testing import error_budget

INF = float("inf")


def every_score(metric, src, dst, kind):
    """All pairs [B, A, K] in the precision of `metric`, in torch's own order."""
    rows = torch.arange(metric.shape[0])[:, None]
    a, b = (metric[rows, i.long().expand(metric.shape[0], -1)] for i in (src, dst))
    dot, aa, bb = a @ b.mT, a.square().sum(-1)[..., None], b.square().sum(-1)[:, None]
    if kind == "dot":
        return dot
    return dot * aa.rsqrt() * bb.rsqrt() if kind == "cosine" else (2 * dot - aa - bb).clamp(max=0)


def test_by_hand():
    x = torch.tensor([[[3.0, 4.0], [6.0, 8.0], [0.0, 0.0], [-4.0, 3.0], [1.0, 0.0]]], dtype=torch.float64)
    for kind, expected in {
        "cosine": ([1.0, 0.0, 0.6], [1, 1, 1]),
        "dot": ([50.0, 0.0, 6.0], [1, 1, 1]),
        "l2": ([-25.0, -25.0, -34.0], [1, 3, 3]),  # token 4: 1 lies at -89, 3 at -34
    }.items():
        score, target = match("reference", x, *lists([0, 2, 4], [1, 3]), score=SCORES[kind])
        torch.testing.assert_close(score[0, [0, 2, 4]], torch.tensor(expected[0], dtype=torch.float64))
        assert target[0, [0, 2, 4]].tolist() == expected[1]
        assert score[0, [1, 3]].tolist() == [-INF, -INF] and target[0, [1, 3]].tolist() == [-1, -1]


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_the_float64_best(every, kind, dtype):
    """Each score within the fp32 budget, each target as good as the best within it."""
    impl, device = every
    for i, (tokens, channels) in enumerate(zip(TOKENS, (*CHANNELS, 700, 40), strict=True)):
        batch = 2 if tokens > 16 else 16  # enough pairs for an error of torch that is no luck
        x = normal((batch, tokens, channels), dtype, seed=i, layout=LAYOUTS[i % 5], device=device)
        x = x if x.stride(-1) == 1 or channels == 1 else x.contiguous()
        src, dst = alternate(tokens, device)
        score, target = match(impl, x, src, dst, score=SCORES[kind])
        assert score.dtype == torch.float32 and target.dtype == torch.int32
        assert score.shape == target.shape == (batch, tokens)
        assert (score[:, 1::2] == -INF).all() and (target[:, 1::2] == -1).all()
        if not dst.shape[1]:
            assert (score == -INF).all() and (target == -1).all()
            continue
        wide = x.cpu()
        exact = every_score(wide.double(), src.cpu(), dst.cpu(), kind)
        single = every_score(wide.float(), src.cpu(), dst.cpu(), kind)
        best = exact.amax(-1)
        got = score[:, ::2].cpu()
        budget = error_budget(single, single, exact)  # of all pairs, not of the best alone
        assert float((got.double() - best).abs().max()) <= budget.allowed, (tokens, channels)
        slack = 2 * budget.allowed
        at = target[:, ::2].cpu().long()
        assert (at % 2 == 1).all() and (at < tokens).all()
        assert (exact.gather(2, at[..., None] // 2)[..., 0] >= best - slack).all()


def exact_metric(kind, shape, dtype, seed, device, distinct=None):
    return (
        signs(shape, dtype, seed=seed, device=device, distinct=distinct)
        if kind == "cosine"
        else whole_numbers(shape, dtype, seed=seed, device=device)
    )


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_scores_equal_brute_force(every, kind, dtype):
    """Sources and destinations in any order, that leave tokens out, differ from sample to sample and overlap."""
    impl, device = every
    for seed, (tokens, channels, distinct) in enumerate(
        [(1, 4, 1), (2, 16, None), (13, 64, 4), (21, 4, None), (33, 16, 2)]
    ):
        x = exact_metric(kind, (3, tokens, channels), dtype, seed, device, distinct)
        x[1, tokens // 2] = 0.0  # a row of zeros is like nothing, and like everything equally little
        g = generator(seed)
        half = tokens // 2
        order = torch.stack([torch.randperm(tokens, generator=g) for _ in range(3)]).int()
        for src, dst in [
            (order[:, :half], order[:, half : half + max(half - 2, 0)]),
            (order[:1, half:], order[:1, :half]),
            (order, order.flip(1).contiguous()),
            (order[:1], order[:, half:]),
        ]:
            src, dst = src.contiguous().to(device), dst.contiguous().to(device)
            score, target = match(impl, x, src, dst, score=SCORES[kind])
            for b in range(3):
                rows = x[b].double().tolist()
                s, d = (i[b % i.shape[0]].tolist() for i in (src, dst))
                expected = brute.match(rows, s, d, kind)
                assert target[b].tolist() == expected[1], (tokens, b)
                assert score[b].tolist() == expected[0], (tokens, b)


@pytest.mark.parametrize("kind", SCORES)
def test_all_rows_alike(every, kind):
    """Every score is the same number to the bit, whatever tile a pair falls in, so the first destination takes all."""
    impl, device = every
    for tokens, channels in [(2, 5), (65, 33), (300, 80), (515, 64)]:
        for dtype in DTYPES:
            x = normal((1, 1, channels), dtype, seed=channels, device=device).expand(2, tokens, channels)
            src, dst = lists(list(range(1, tokens, 2)), list(range(0, tokens, 2))[::-1], device)
            score, target = match(impl, x, src, dst, score=SCORES[kind])
            assert (target[:, 1::2] == dst[0, 0]).all(), (tokens, dtype)
            assert score[:, 1::2].unique().numel() == 1


def test_few_different_rows(every):
    """Rows of the same values choose the same destination: the first of its kind."""
    impl, device = every
    base = normal((1, 5, 48), seed=3, device=device)
    kinds = torch.randint(0, 5, (400,), generator=generator(4))
    x = base[:, kinds.to(device)]
    src, dst = alternate(400, device)
    score, target = match(impl, x, src, dst, score=0)
    for kind in range(5):
        own = torch.nonzero(kinds[::2] == kind)[:, 0] * 2
        assert target[0, own].unique().numel() == 1 and score[0, own].unique().numel() == 1
        first = int(torch.nonzero(kinds[1::2] == kind)[0, 0]) * 2 + 1
        assert int(target[0, own[0]]) == first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranges(every, dtype):
    """Runs of the destination list: several, adjacent, empty, none."""
    impl, device = every
    tokens, channels = 40, 16
    x = signs((2, tokens, channels), dtype, device=device, seed=2)
    src, dst = alternate(tokens, device)
    g = generator(5)
    for runs in (1, 2, 3):
        for batch in (1, 2):
            edges = torch.randint(0, 21, (batch, 20, 2 * runs), generator=g).sort(-1).values
            ranges = edges.view(batch, 20, runs, 2).int().to(device)
            mask = allowed(ranges.cpu(), 20)
            score, target = match(impl, x, src, dst, ranges, score=0)
            for b in range(2):
                expected = brute.match(
                    x[b].double().tolist(), src[0].tolist(), dst[0].tolist(), "cosine", mask[b % batch].tolist()
                )
                assert (score[b].tolist(), target[b].tolist()) == expected


@pytest.mark.parametrize("kind", SCORES)
def test_protected_tokens_neither_choose_nor_are_chosen(every, kind):
    impl, device = every
    x = exact_metric(kind, (2, 24, 16), torch.float32, 6, device)
    src, dst = alternate(24, device)
    for batch in (1, 2):
        protect = torch.rand(batch, 24, generator=generator(7)) < 0.4
        score, target = match(impl, x, src, dst, None, protect.to(device), SCORES[kind])
        for b in range(2):
            own = set(torch.nonzero(protect[b % batch])[:, 0].tolist())
            expected = brute.match(x[b].double().tolist(), src[0].tolist(), dst[0].tolist(), kind, None, own)
            assert (score[b].tolist(), target[b].tolist()) == expected
    score, target = match(impl, x, src, dst, None, torch.ones(1, 24, dtype=torch.bool, device=device), SCORES[kind])
    assert (score == -INF).all() and (target == -1).all()


@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 0, 4), (2, 6, 0)])
def test_empty(every, shape):
    impl, device = every
    src, dst = alternate(shape[1], device)
    score, target = match(impl, torch.zeros(shape, device=device), src, dst, score=0)
    assert score.shape == shape[:2]
    if shape == (2, 6, 0):  # no channels: all cosines are 0
        assert score[0].tolist() == [0.0, -INF] * 3 and target[0].tolist() == [1, -1] * 3


@pytest.mark.parametrize("sources, destinations", [([], [0, 1]), ([0, 1], []), ([], [])])
def test_no_sources_or_no_destinations(every, sources, destinations):
    impl, device = every
    x = normal((2, 3, 8), device=device)
    x[1, 1, 3] = INF
    score, target = match(impl, x, *lists(sources, destinations, device))
    assert (score == -INF).all()
    assert target.tolist() == [[-1, -1, -1], [-1, -2, -1]]


def test_far_apart_by_l2(every):
    """A squared distance beyond fp32 is -inf, and still no reason to choose what may not be chosen."""
    impl, device = every
    x = torch.zeros(1, 4, 2, device=device)
    x[0, :, 0] = torch.tensor([1.5e19, -1.5e19, -1.6e19, 1.0])
    protect = torch.tensor([[False, True, False, False]], device=device)
    score, target = match(impl, x, *lists([0], [1, 2], device), None, protect, SCORES["l2"])
    assert int(target[0, 0]) in (2, -1) and float(score[0, 0]) == -INF


def test_small_and_large_rows_by_cosine(every):
    """Norms from 1e-18 to 1e18: their products leave fp32, the cosines do not."""
    impl, device = every
    base = normal((1, 9, 16), seed=8)
    scale = torch.tensor([1e-18, 1.0, 1e18, 1e-10, 1e10, 1.0, 1e-18, 1e18, 1e18])[:, None]
    x = (base * scale).to(device)
    src, dst = alternate(9, device)
    score, target = match(impl, x, src, dst)
    exact = every_score(x.double().cpu(), src.cpu(), dst.cpu(), "cosine")
    peer = every_score(base.float(), src.cpu(), dst.cpu(), "cosine")
    truth = every_score(base.double(), src.cpu(), dst.cpu(), "cosine")
    assert (exact - truth).abs().max() < 1e-6
    assert (score[:, ::2].double().cpu() - exact.amax(-1)).abs().max() < 4e-7 + 2 * (peer - truth).abs().max()
    assert torch.equal(target[:, ::2].cpu().long(), exact.argmax(-1) * 2 + 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_function_takes_any_strides(implementation, layout):
    impl, device = implementation
    x = signs((2, 30, 16), seed=9, device=device)
    want, got = (M.match(v, 11, impl=impl) for v in (x, laid_out(x, layout)))
    assert torch.equal(want.inverse, got.inverse) and torch.equal(want.score, got.score)
    expanded = x[:1].expand(3, -1, -1)
    assert torch.equal(M.match(expanded, 11, impl=impl).inverse, M.match(x[:1], 11, impl=impl).inverse.expand(3, -1))


def test_heads(implementation):
    impl, device = implementation
    metric = signs((2 * 3, 20, 16), seed=10, device=device).view(2, 3, 20, 16)
    apart = M.match(metric, 4, heads="per_head", impl=impl)
    assert torch.equal(apart.inverse, M.match(metric.flatten(0, 1), 4, impl=impl).inverse)
    assert torch.equal(M.match(metric, 4, impl=impl).inverse, M.match(metric.mean(1), 4, impl=impl).inverse)


def test_float64_runs_by_the_reference():
    x = normal((1, 12, 8), torch.float64)
    plan = M.match(x, 3)
    assert plan.score.dtype == torch.float64
    with pytest.raises(ValueError, match="impl: 'cpu' cannot run match here: no float64"):
        M.match(x, 3, impl="cpu")


def test_the_metric_gets_no_gradient(implementation):
    impl, device = implementation
    x = normal((1, 12, 8), device=device).requires_grad_()
    plan = M.match(x, 3, impl=impl)
    assert not plan.score.requires_grad
