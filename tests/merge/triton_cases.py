"""Checks of the token-merging Triton kernels in Triton's interpreter: run as a program, with TRITON_INTERPRET=1, it takes the name of a
check per line and answers with a JSON line. Names come from `CHECKS`, which needs no Triton to be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from interpreted import serve

from saccade.reference.keep_top import keep_top as reference_keep_top
from saccade.reference.knn_density import knn_density as reference_knn_density
from saccade.reference.match import allowed
from saccade.reference.match import match as reference_match
from saccade.reference.merge import merge as reference_merge
from saccade.reference.merge import merge_bwd as reference_merge_bwd
from saccade.reference.merge_plan import merge_plan as reference_merge_plan
from saccade.reference.prompt_pool3d import prompt_pool3d as reference_prompt_pool3d
from saccade.reference.row_similarity import row_similarity as reference_row_similarity
from saccade.reference.unmerge import unmerge as reference_unmerge
from saccade.testing import check_budget

CHECKS: dict[str, Callable[[], None]] = {}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
COSINE, DOT, L2 = range(3)
MEAN, SUM, MAX, REPLACE = range(4)


def check(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    words = (*args, *(k if v is True else f"{k}={v}" for k, v in kwargs.items()))
    name = "-".join([function.__name__, *(str(a).removeprefix("torch.") for a in words)])
    assert name not in CHECKS, name
    CHECKS[name] = lambda: function(*args, **kwargs)


def same(name: str, out: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal values, NaN included, and the same dtype."""
    assert out.dtype == expected.dtype and out.shape == expected.shape, (name, out.dtype, out.shape, expected.shape)
    if not torch.equal(out.nan_to_num(7.5), expected.nan_to_num(7.5)):
        wrong = (out != expected) & ~(out.isnan() & expected.isnan())
        raise AssertionError(f"{name}: {int(wrong.sum())} of {out.numel()} differ, the first at {wrong.nonzero()[0]}")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0, strided: bool = False) -> torch.Tensor:
    """Normal values; strided: the rows are slices of wider ones that hold NaN, and the batch is reversed in memory."""
    values = torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)
    if not strided:
        return values
    wide = torch.full((shape[1], shape[0], *shape[2:-1], shape[-1] + 3), math.nan, dtype=dtype)
    view = wide.transpose(0, 1)[..., 1:-2]
    view.copy_(values)
    return view


# match -----------------------------------------------------------------------------------------------------------------------


def exact_rows(batch: int, tokens: int, channels: int, dtype: torch.dtype, score: int) -> torch.Tensor:
    """Rows whose scores are exact: integers, and for the cosine norms of 0, 2 or 4. Many are equal."""
    g = seeded(tokens)
    kinds = max(2, tokens // 4)
    if score == COSINE:
        signs = torch.randint(0, 2, (kinds, channels), generator=g) * 2 - 1
        count = torch.tensor([0, 4, 16])[torch.randint(0, 3, (kinds, 1), generator=g)].clamp(max=channels // 4 * 4)
        count = torch.where((count > 4) & (count < 16), 4, count)
        values = signs.where(torch.arange(channels) < count, 0)
        values = values.gather(1, torch.rand(kinds, channels, generator=g).argsort(1))
    else:
        values = torch.randint(-3, 4, (kinds, channels), generator=g)
    return values[torch.randint(0, kinds, (batch, tokens), generator=g)].to(dtype)


def partition(
    batch: int, tokens: int, shared: bool, everything: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources, destinations and ranges of the destination list: lists not sorted, some tokens in neither, some ranges empty."""
    g = seeded(batch + tokens)
    order = torch.stack([torch.randperm(tokens, generator=g) for _ in range(1 if shared else batch)]).int()
    if everything:  # every token chooses among those before it in the list, as DPC-KNN has it
        ends = torch.arange(tokens).expand(len(order), -1)
        return order, order, torch.stack((torch.zeros_like(ends), ends), -1)[:, :, None].int()
    half = tokens // 2
    src, dst = order[:, :half].clone(), order[:, half : tokens - tokens // 10].clone()
    edges = torch.randint(0, dst.shape[1] + 1, (*src.shape, 4), generator=g).sort(-1).values
    return src, dst, edges.reshape(*src.shape, 2, 2).int()


def match_case(
    score, batch, tokens, channels, dtype, exact=True, ranges=False, protect=False, bad=False, shared=False,
    everything=False, strided=False,
):  # fmt: skip
    from saccade._triton.match import match

    g = seeded(7)
    if exact:
        metric = exact_rows(batch, tokens, channels, dtype, score)
    else:
        metric = normal(batch, tokens, channels, dtype=dtype, strided=strided)
    src, dst, bounds = partition(batch, tokens, shared, everything)
    bounds = bounds if ranges or everything else None
    mask = torch.rand(1 if shared else batch, tokens, generator=g) < 0.2 if protect else None
    if bad:
        hurt = torch.rand(batch, tokens, generator=g) < 0.2
        metric[hurt] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)[torch.arange(int(hurt.sum())) % 3][
            :, None
        ]
        metric[hurt & (torch.rand(batch, tokens, generator=g) < 0.5), 1:] = 1.0
    best, target = match(metric, src, dst, bounds, mask, score)
    peer, expected = reference_match(metric, src, dst, bounds, mask, score)
    if exact:
        same("score", best, peer)
        same("target", target, expected)
        return
    exact_best, _ = reference_match(metric.double(), src, dst, bounds, mask, score)
    budget = check_budget("score", best, peer, exact_best)
    same("who chooses", target < 0, expected < 0)
    same("not finite", target == -2, expected == -2)
    # Any choice that is as good as the best, as far as the scores can tell.
    chooses = target >= 0
    rows = torch.arange(batch)[:, None].expand(-1, tokens)[chooses]
    wide = metric.double()
    a, b = wide[chooses], wide[rows, target[chooses].long()]
    value = (a * b).sum(-1)
    if score == COSINE:
        value = value / (a.norm(dim=-1) * b.norm(dim=-1))
    elif score == L2:
        value = -((a - b) ** 2).sum(-1)
    loss = float((exact_best[chooses] - value).max())
    assert loss <= 2 * budget.allowed, f"a choice is worse by {loss}, allowed {2 * budget.allowed}"
    if bounds is not None and not everything:
        full = src.expand(batch, -1)
        place = (dst.expand(batch, -1)[:, None] == target.gather(1, full.long())[..., None]) & allowed(
            bounds, dst.shape[1]
        )
        assert bool((place.any(-1) == (target.gather(1, full.long()) >= 0)).all())


check(match_case, COSINE, 2, 41, 24, F32)
check(match_case, COSINE, 2, 330, 48, BF16, protect=True, bad=True)  # several tiles of destinations
check(match_case, COSINE, 1, 300, 20, F16, ranges=True)
check(match_case, COSINE, 2, 70, 17, F32, shared=True, bad=True)
check(match_case, DOT, 2, 41, 7, F16, ranges=True, bad=True, protect=True)
check(match_case, DOT, 3, 40, 200, BF16, shared=True)
check(match_case, DOT, 1, 400, 7, F32)
check(match_case, L2, 2, 90, 33, F32, ranges=True, shared=True, protect=True)
check(match_case, L2, 2, 131, 8, BF16, everything=True, bad=True)
check(match_case, COSINE, 2, 67, 80, F32, exact=False, strided=True)
check(match_case, COSINE, 2, 260, 72, BF16, exact=False, ranges=True, strided=True, bad=True)
check(match_case, DOT, 2, 33, 130, F16, exact=False, protect=True)
check(match_case, L2, 2, 50, 40, F16, exact=False, everything=True)
check(match_case, COSINE, 1, 20, 1, F32, exact=False)


def match_invariant():
    """Bits do not depend on the other samples of the batch, nor on where the rows lie."""
    from saccade._triton.match import match

    metric = normal(3, 90, 24, dtype=BF16)
    src, dst, _ = partition(3, 90, True, False)
    best, target = match(metric, src, dst, None, None, COSINE)
    for b in range(3):
        apart = normal(3, 90, 24, dtype=BF16, strided=True)[b : b + 1]
        for x in (metric[b : b + 1], apart):
            one, chosen = match(x, src, dst, None, None, COSINE)
            same("score", one, best[b : b + 1])
            same("target", chosen, target[b : b + 1])


def match_empty():
    """No samples, tokens, sources, destinations, channels, ranges."""
    from saccade._triton.match import match

    for batch, tokens, sources, destinations, channels, count in (
        (0, 4, 2, 2, 3, None), (2, 0, 0, 0, 3, None), (2, 4, 0, 2, 3, None), (2, 4, 2, 0, 3, None),
        (2, 4, 2, 2, 0, None), (2, 4, 2, 2, 3, 0), (1, 1, 1, 1, 1, 1),
    ):  # fmt: skip
        metric = normal(batch, tokens, channels)
        src = torch.arange(sources)[None].int()
        dst = (tokens - 1 - torch.arange(destinations))[None].int()
        bounds = None if count is None else torch.tensor([0, 1]).expand(1, sources, count, 2).int()
        for score in (COSINE, DOT, L2):
            best, target = match(metric, src, dst, bounds, None, score)
            expected = reference_match(metric, src, dst, bounds, None, score)
            same("target", target, expected[1])
            check_budget("score", best, expected[0], expected[0].double())


check(match_invariant)
check(match_empty)

# merge_plan, keep_top --------------------------------------------------------------------------------------------------------


def scored(batch: int, tokens: int, ties: int, bad: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and targets as match gives them: with ties > 1, few values and few targets; `bad` of the rows are not finite."""
    g = seeded(tokens + seed)
    score = torch.full((batch, tokens), -math.inf)
    target = torch.full((batch, tokens), -1, dtype=torch.int32)
    for b in range(batch):
        order = torch.randperm(tokens, generator=g)
        src, dst = order[: tokens // 2], order[tokens // 2 :]
        if len(src):
            target[b, src] = dst[torch.randint(0, max(1, len(dst) // ties), (len(src),), generator=g)].int()
            values = torch.randn(len(src), generator=g)
            score[b, src] = values.round() if ties > 1 else values
        hurt = (torch.rand(tokens, generator=g) < bad) & (target[b] < 0)
        target[b, hurt] = -2
        score[b, torch.rand(tokens, generator=g) < bad / 4] = math.nan
        score[b, score[b] == 0] = (0.0, -0.0)[b % 2]
    if tokens > 8:
        score[:, 3], score[:, 5] = math.inf, -math.inf
    return score, target


def plan_case(batch, tokens, r, rows, threshold=-math.inf, ties=1, bad=0.0, whole=False, small=True):
    from saccade._triton import merge_plan as module

    score, target = scored(batch, tokens, ties, bad)
    module.SMALL, module.BLOCK = ((256, 1024), 4096) if small else ((), 256)
    outs = module.merge_plan(score, target, rows, r, threshold, whole)
    expected = reference_merge_plan(score, target, rows, r, threshold, whole)
    for name, out, e in zip(("inverse", "ptr", "members", "head", "counts"), outs, expected, strict=True):
        same(name, out, e)


for _small in (True, False):
    check(plan_case, 2, 41, 13, 28, small=_small)
    check(plan_case, 2, 40, 20, 20, ties=40, small=_small)  # all into one row
    check(plan_case, 2, 210, 80, 126, ties=10, bad=0.2, small=_small)  # a few more left than rows: dropped
    check(plan_case, 1, 90, 30, 50, 1.0, ties=2, bad=0.05, small=_small)  # many more
    check(plan_case, 3, 210, 400, 150, -0.5, ties=10, bad=0.2, whole=True, small=_small)
    check(plan_case, 1, 9, 0, 14, small=_small)  # padding
    check(plan_case, 1, 1, 0, 1, small=_small)
    check(plan_case, 1, 7, 0, 0, small=_small)
    check(plan_case, 1, 0, 0, 3, small=_small)
    check(plan_case, 0, 5, 1, 4, small=_small)
check(plan_case, 2, 900, 400, 500, ties=400, bad=0.05, small=False)
check(plan_case, 1, 1200, 500, 700, ties=600)  # a program sees more than one tile
check(plan_case, 3, 700, 500, 600, -0.5, ties=3, whole=True, small=False)
check(plan_case, 1, 257, 100, 157, ties=30, bad=0.1, whole=True)  # held by the larger of the small kernels


def top_case(batch, tokens, k, what):
    from saccade._triton import keep_top as module

    g = seeded(tokens)
    module.BLOCK = 1024
    scores = torch.randn(batch, tokens, generator=g)
    if what == "ties":
        scores = scores.round()
    elif what == "nan":
        scores = (scores.round() * math.inf).where(torch.rand(batch, tokens, generator=g) < 0.7, math.nan)
    elif what == "zeros":
        scores = torch.tensor([0.0, -0.0])[torch.randint(0, 2, (batch, tokens), generator=g)]
    elif what == "strided":
        scores = torch.randn(tokens, batch, generator=g).T
    same("kept", module.keep_top(scores, k), reference_keep_top(scores, k))


for _what in ("plain", "ties", "nan", "zeros", "strided"):
    check(top_case, 2, 77, 31, _what)
    check(top_case, 2, 2500, 1100, _what)
for _tokens, _k in ((1, 1), (1, 0), (5, 5), (0, 0)):
    check(top_case, 3, _tokens, _k, "ties")
check(top_case, 0, 5, 2, "plain")

# merge, unmerge --------------------------------------------------------------------------------------------------------------


def some_plan(batch: int, tokens: int, rows: int, hub: bool) -> tuple[torch.Tensor, ...]:
    """Inverse, ptr, members, head of a plan with dropped tokens and rows of padding; a hub takes all that is merged."""
    score, target = scored(batch, tokens, tokens if hub else 1, 0.1)
    return reference_merge_plan(score, target, rows, tokens // 2 - (0 if hub else 2), -math.inf, False)[:4]


def merge_case(
    mode, batch, tokens, rows, width, dtype, weighted=False, shared=False, hub=False, bad=False, strided=False
):
    """Forward and gradient; NaN and -inf in x for the maximum."""
    from saccade._triton import merge as module
    from saccade._triton.merge_bwd import merge_bwd

    module.LONG, module.CHUNK = (8, 4) if hub else (64, 16)
    inverse, ptr, members, head = some_plan(1 if shared else batch, tokens, rows, hub)
    x = normal(batch, tokens, width, dtype=dtype, strided=strided)
    if mode == MAX:
        x = (x * 2).round() / 2  # ties
        x[:, ::5] = -math.inf
    if bad:
        x[:, 3, : width // 2], x[:, 4, width // 3 :] = math.nan, math.inf
    weight = torch.rand(1 if shared else batch, tokens, generator=seeded(3)) + 0.5 if weighted else None
    if weight is not None:
        weight[:, :4] = 0  # a row may weigh nothing
    outs = module.merge(x, weight, ptr, members, head, mode)
    peer = reference_merge(x, weight, inverse, head, mode)
    exact = reference_merge(x.double(), weight, inverse, head, mode)
    for name, out, p, e in zip(("y", "total", "log"), outs, peer, exact, strict=True):
        assert out.dtype == p.dtype
        check_budget(name, out, p, e)
    if mode in (MAX, REPLACE):
        same("y", outs[0], peer[0])
    dy = normal(batch, rows, width, dtype=dtype, seed=5, strided=strided)
    dx = merge_bwd(dy, x if mode == MAX else None, weight, outs[1], inverse, ptr, members, head, mode)
    args = (weight, inverse, head, mode)
    check_budget("dx", dx, reference_merge_bwd(dy, x, *args), reference_merge_bwd(dy.double(), x, *args), factor=3)
    assert dx.dtype == dtype
    if mode != MEAN:
        same("dx", dx, reference_merge_bwd(dy, x, *args))
    if rows and batch > 1 and not shared:  # bits of one sample alone
        last = slice(batch - 1, batch)
        own = None if weight is None else weight[last]
        alone = module.merge(x[last], own, ptr[last], members[last], head[last], mode)
        for name, one, out in zip(("y", "total", "log"), alone, outs, strict=True):
            same(f"{name} of one sample", one, out[last])


for _mode in (MEAN, SUM, MAX, REPLACE):
    for _dtype, _weighted in ((F32, True), (BF16, False), (F16, True)):
        check(merge_case, _mode, 2, 31, 19, 40, _dtype, weighted=_weighted, strided=_dtype == BF16)
    check(merge_case, _mode, 2, 50, 27, 264, BF16, weighted=_mode != MAX, hub=True, shared=_mode == SUM)
    check(merge_case, _mode, 1, 90, 45, 24, F32, hub=True, bad=_mode >= MAX)
check(merge_case, MAX, 2, 41, 24, 7, F32, bad=True)
check(merge_case, REPLACE, 3, 31, 40, 5, F16, weighted=True, shared=True)  # more rows than tokens
check(merge_case, MEAN, 3, 31, 19, 33, BF16, weighted=True, shared=True, strided=True)
for _batch, _tokens, _rows, _width in (
    (0, 4, 3, 2),
    (2, 0, 0, 3),
    (2, 0, 2, 3),
    (2, 4, 0, 3),
    (2, 4, 3, 0),
    (1, 1, 1, 1),
):
    check(merge_case, MEAN, _batch, _tokens, _rows, _width, F32)
    if _tokens:
        check(merge_case, MAX, _batch, _tokens, _rows, _width, F32)


def unmerge_case(batch, tokens, rows, width, dtype, residual, gate, shared=False, strided=False):
    """gate: None, or which of its first two axes have their full length."""
    from saccade._triton.unmerge import unmerge

    inverse = some_plan(1 if shared else batch, tokens, rows, False)[0]
    y = normal(batch, rows, width, dtype=dtype, strided=strided)
    r = normal(batch, tokens, width, dtype=dtype, seed=1, strided=strided) if residual else None
    g = None
    if gate is not None:
        g = normal(batch if "b" in gate else 1, tokens if "n" in gate else 1, width, dtype=dtype, seed=2)
    out = unmerge(y, inverse, r, g)
    wide = [None if t is None else t.double() for t in (r, g)]
    check_budget("out", out, reference_unmerge(y, inverse, r, g), reference_unmerge(y.double(), inverse, *wide))
    if r is None and g is None:
        same("out", out, reference_unmerge(y, inverse, r, g))


for _dtype in (F32, F16, BF16):
    check(unmerge_case, 2, 31, 19, 40, _dtype, False, None)
    check(unmerge_case, 2, 31, 19, 40, _dtype, True, "b", strided=True)
check(unmerge_case, 2, 31, 19, 300, BF16, False, "n", shared=True)
check(unmerge_case, 3, 31, 19, 5, F32, True, "bn", shared=True)
check(unmerge_case, 2, 31, 19, 9, F16, True, "", strided=True)
check(unmerge_case, 2, 31, 19, 16, BF16, True, None)
for _batch, _tokens, _rows, _width in ((0, 4, 3, 2), (2, 0, 0, 3), (2, 4, 0, 3), (2, 4, 3, 0)):
    check(unmerge_case, _batch, _tokens, _rows, _width, F32, True, "bn")

# prompt_pool3d, row_similarity, knn_density ----------------------------------------------------------------------------------


def pool_case(size, width, kernel, stride, dtype, temperature=0.1, strided=False):
    """Forward and both gradients, these against autograd of the specification."""
    from saccade._triton.prompt_pool3d import prompt_pool3d
    from saccade._triton.prompt_pool3d_bwd import prompt_pool3d_bwd

    x = normal(2, *size, width, dtype=dtype)
    if strided:
        wide = torch.full((2, size[1], size[0], size[2], 2 * width), math.nan, dtype=dtype).transpose(1, 2)[..., width:]
        x = wide.copy_(x)
    weights = torch.rand(2, *size, generator=seeded(1))
    weights[1] = weights[1].softmax(-1)
    args = (*kernel, *stride, temperature)
    y = prompt_pool3d(x, weights, *args)
    grads = [tuple(t.to(d or t.dtype, copy=True).requires_grad_() for t in (x, weights)) for d in (None, torch.float64)]
    peer, exact = (reference_prompt_pool3d(t, w, kernel, stride, temperature) for t, w in grads)
    check_budget("y", y, peer, exact)
    assert y.dtype == dtype
    dy = normal(*y.shape, dtype=dtype, seed=9)
    dx, dweights = prompt_pool3d_bwd(dy, x, weights, *args)
    (peer * dy).sum().backward()
    (exact * dy.double()).sum().backward()
    names = ("dx", "dweights")
    for name, out, p, e in zip(names, (dx, dweights), grads[0], grads[1], strict=True):
        assert p.grad is not None and e.grad is not None and out.dtype == p.grad.dtype
        check_budget(name, out, p.grad, e.grad, factor=3)


check(pool_case, (4, 6, 6), 40, (2, 3, 3), (2, 3, 3), BF16)
check(pool_case, (4, 6, 7), 12, (2, 3, 3), (1, 2, 2), F32, strided=True)  # overlapping
check(pool_case, (3, 7, 5), 264, (2, 2, 2), (2, 3, 3), F16, strided=True)  # gaps and remainders
check(pool_case, (1, 5, 5), 7, (1, 5, 5), (1, 5, 5), F32, 0.01)
check(pool_case, (2, 4, 4), 3, (1, 1, 1), (1, 1, 1), F32)
check(pool_case, (5, 4, 3), 8, (3, 3, 2), (1, 1, 1), F32, 2.0)


def pool_empty():
    """No columns, or no window that fits."""
    from saccade._triton.prompt_pool3d import prompt_pool3d
    from saccade._triton.prompt_pool3d_bwd import prompt_pool3d_bwd

    for shape in ((0, 2, 2, 2, 3), (2, 2, 2, 2, 0), (2, 1, 2, 2, 3)):
        x, weights = torch.ones(shape), torch.ones(shape[:4])
        y = prompt_pool3d(x, weights, 2, 1, 1, 1, 1, 1, 0.1)
        assert y.shape == (shape[0], shape[1] - 1, 2, 2, shape[4])
        dx, dweights = prompt_pool3d_bwd(y, x, weights, 2, 1, 1, 1, 1, 1, 0.1)
        same("dx", dx, torch.zeros_like(x))
        same("dweights", dweights, torch.zeros_like(weights))


check(pool_empty)


def similarity_case(batch, tokens, channels, dtype, layout="plain"):
    from saccade._triton.row_similarity import row_similarity

    x = normal(batch, tokens, channels, dtype=dtype, strided=layout == "strided")
    y = normal(batch, tokens, channels, dtype=dtype, seed=1) + x
    if layout == "one":
        y = y[:1, :1].expand(batch, tokens, -1)
    if tokens > 4:
        x[:, 1], x[:, 2, 0], x[:, 3, 0] = 0, math.nan, math.inf
    out = row_similarity(x, y)
    check_budget("out", out, reference_row_similarity(x, y), reference_row_similarity(x.double(), y.double()))
    if dtype == F32 and tokens > 4:  # a norm that only fp32 cannot hold
        x[:, 4, 0] = 1e25
        out = row_similarity(x, y)
        assert out[:, 4].isnan().all() and not out[:, 0].isnan().any()
    for b in range(batch):  # wherever a row lies, and whatever lies beside it
        same("bits", row_similarity(x[b : b + 1].clone(), y[b : b + 1]), out[b : b + 1])
    same("bits", row_similarity(x[:, 1:], y[:, 1:]), out[:, 1:])


check(similarity_case, 2, 9, 300, BF16)
check(similarity_case, 2, 70, 33, F32, "strided")
check(similarity_case, 2, 7, 64, F16, "one")
check(similarity_case, 3, 5, 8, F32, "strided")
check(similarity_case, 1, 1, 1, F32)
check(similarity_case, 2, 3, 0, F32)
check(similarity_case, 0, 3, 4, F32)
check(similarity_case, 2, 1, 4, BF16)


def knn_case(batch, tokens, channels, k, dtype, bad=False, strided=False, exact=False, workspace=1 << 24):
    from saccade._triton import knn_density as module

    module.WORKSPACE = workspace
    x = normal(batch, tokens, channels, dtype=dtype, strided=strided)
    if exact:
        x = (x * 2).round()
    if bad:
        x[:, ::6, -1] = math.nan
        x[:, 1::6] = math.inf
    out = module.knn_density(x, k)
    check_budget("out", out, reference_knn_density(x, k), reference_knn_density(x.double(), k))
    if batch > 1:
        same("bits", module.knn_density(x[1:2], k), out[1:2])
    if k == tokens:  # the nearest row is the row itself, at no distance at all
        own = module.knn_density(x, 1)
        same("own", own, torch.zeros_like(own).where(own.isfinite(), own))


check(knn_case, 2, 17, 40, 5, F32)
check(knn_case, 2, 12, 24, 12, BF16, exact=True)
check(knn_case, 1, 40, 8, 7, F32, bad=True, strided=True, workspace=1 << 10)
check(knn_case, 1, 20, 300, 3, BF16, strided=True)
check(knn_case, 2, 9, 5, 9, F32, bad=True)
check(knn_case, 2, 1, 4, 1, F32)
check(knn_case, 0, 3, 4, 1, F32)


def far():
    """A batch stride beyond 2^31 elements."""
    from saccade._triton.match import match
    from saccade._triton.merge import merge
    from saccade._triton.unmerge import unmerge

    store = torch.empty(2**31 + 4096, dtype=BF16).as_strided((2, 20, 16), (2**31 + 8, 16, 1))
    x = store.copy_(normal(2, 20, 16, dtype=BF16))
    src, dst, _ = partition(2, 20, False, False)
    for one, other in zip(
        match(x, src, dst, None, None, 0), match(x.contiguous(), src, dst, None, None, 0), strict=True
    ):
        same("match", one, other)
    inverse, ptr, members, head = some_plan(2, 20, 12, False)
    same("merge", merge(x, None, ptr, members, head, 0)[0], merge(x.contiguous(), None, ptr, members, head, 0)[0])
    same("unmerge", unmerge(x, inverse, None, None), unmerge(x.contiguous(), inverse, None, None))


check(far)


def registered():
    """Ops and schemas under their _triton names."""
    from saccade._load import schemas
    from saccade._triton.register import OPS
    from saccade.merge._fakes import FAKES

    inverse, ptr, members, head = some_plan(2, 20, 12, False)
    x, y = normal(2, 20, 16), normal(2, 12, 16)
    src, dst, bounds = partition(2, 20, False, False)
    volume = x.view(2, 5, 2, 2, 16)
    score, target = scored(2, 20, 1, 0.1)
    calls: dict[str, tuple[Any, ...]] = {
        "match": (x, src, dst, bounds, None, 0),
        "merge_plan": (score, target, 12, 8, 0.0, False),
        "merge": (x, None, ptr, members, head, MEAN),
        "merge_bwd": (y, x, None, y[..., 0].abs(), inverse, ptr, members, head, MAX),
        "unmerge": (y, inverse, x, None),
        "prompt_pool3d": (volume, volume[..., 0].contiguous(), 2, 1, 1, 2, 1, 1, 0.1),
        "prompt_pool3d_bwd": (volume[:, :2].contiguous(), volume, volume[..., 0].contiguous(), 2, 1, 1, 2, 1, 1, 0.1),
        "row_similarity": (x, x),
        "keep_top": (score, 5),
        "knn_density": (x, 3),
    }
    assert set(calls) == set(FAKES) < set(OPS) == set(schemas())
    for name, args in calls.items():
        op = getattr(torch.ops.saccade, f"{name}_triton").default
        base = getattr(torch.ops.saccade, name).default
        assert str(op._schema).split("(", 1)[1] == str(base._schema).split("(", 1)[1]
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


check(registered)


if __name__ == "__main__":
    serve(CHECKS)
