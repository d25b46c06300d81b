"""match on the emulated GPU: the same choice as the reference where scores are exact, as good a one elsewhere."""

from __future__ import annotations

from ctypes import c_int64

import pytest
import torch
from emulation.cuda_emulator import DTYPES, call, workspace
from emulation.merge_structs import COSINE, DOT, L2, MatchArgs

from saccade.reference.match import match
from saccade.testing.budget import check_budget

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INF, NAN = float("inf"), float("nan")
Results = tuple[torch.Tensor, torch.Tensor]


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def batch_stride(x: torch.Tensor | None) -> int:
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def run(
    metric: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
    ranges: torch.Tensor | None = None,
    protect: torch.Tensor | None = None,
    score: int = COSINE,
) -> Results:
    """Takes what the raw op takes."""
    batch, tokens, channels = metric.shape
    assert metric.stride(2) == 1 or channels < 2
    best = torch.full((batch, tokens), NAN)
    target = torch.full((batch, tokens), -99, dtype=torch.int32)
    args = MatchArgs(metric.data_ptr(), (c_int64 * 2)(*metric.stride()[:2]))
    for name, x in (("src", src), ("dst", dst), ("ranges", ranges), ("protect", protect)):
        assert x is None or x.is_contiguous()
        setattr(args, name, pointer(x))
        setattr(args, f"{name}_stride", batch_stride(x))
    args.batch, args.tokens, args.channels = batch, tokens, channels
    args.sources, args.destinations = src.shape[1], dst.shape[1]
    args.range_count = 0 if ranges is None else ranges.shape[2]
    args.score, args.dtype = score, DTYPES[metric.dtype]
    args.best, args.target = best.data_ptr(), target.data_ptr()
    space = workspace("match", "match", args)
    args.workspace = space.data_ptr()
    call("match", "match", args)
    return best, target


def places(*values: range | list[int]) -> torch.Tensor:
    """One list for all samples, or one for each."""
    return torch.stack([torch.tensor(list(v), dtype=torch.int32) for v in values])


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair_scores(metric: torch.Tensor, score: int) -> torch.Tensor:
    """[B, N, N] in float64."""
    x = metric.double()
    if score == COSINE:
        x = x / x.norm(dim=-1, keepdim=True)
    return -torch.cdist(x, x).square() if score == L2 else x @ x.mT


def check_as_good(metric, src, dst, ranges=None, protect=None, score=COSINE) -> None:
    """Scores inside the budget; every choice as good as the best, to the accuracy of the scores."""
    best, target = run(metric, src, dst, ranges, protect, score)
    same, _ = match(metric.float(), src, dst, ranges, protect, score)
    exact, wanted = match(metric.double(), src, dst, ranges, protect, score)
    budget = check_budget("match", best, same, exact)
    assert torch.equal(target < 0, wanted < 0)
    chosen = pair_scores(metric, score).gather(-1, target.clamp(min=0).long()[..., None])[..., 0]
    assert ((exact - chosen)[target >= 0] <= 2 * budget.allowed).all()


def check_same(metric, src, dst, ranges=None, protect=None, score=COSINE) -> None:
    best, target = run(metric, src, dst, ranges, protect, score)
    wanted_best, wanted_target = match(metric.float(), src, dst, ranges, protect, score)
    assert torch.equal(target, wanted_target)
    assert torch.equal(best, wanted_best)


def integers(batch: int, tokens: int, channels: int, score: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows with exact scores, many of them equal; for the cosine, of norm 1, 2, 4 or 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (batch, tokens, channels), generator=generator)
    if score == COSINE:
        x = torch.zeros(batch, tokens, channels)
        for i in range(4):
            x[..., i : i + 1] = torch.randint(0, 2, (batch, tokens, 1), generator=generator) * 2.0 - 1
        x *= 2.0 ** torch.randint(-1, 2, (batch, tokens, 1), generator=generator)
        x[:, 7::11] = 0
    return x.to(dtype)


# ---- scores and choices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [COSINE, DOT, L2])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("batch", "tokens", "channels"), [(1, 90, 80), (2, 23, 7)])
def test_alternate_tokens(dtype: torch.dtype, batch: int, tokens: int, channels: int, score: int) -> None:
    src, dst = places(range(0, tokens, 2)), places(range(1, tokens, 2))
    check_as_good(rows(batch, tokens, channels, dtype=dtype), src, dst, score=score)


@pytest.mark.parametrize("score", [COSINE, DOT, L2])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_ties_take_the_first_place(dtype: torch.dtype, score: int) -> None:
    metric = integers(1, 300, 8, score, dtype)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).tolist()
    check_same(metric, places(order[:50]), places(order[50:]), score=score)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_all_rows_are_equal(dtype: torch.dtype) -> None:
    """Whatever the tile: equal rows have equal bits."""
    metric = rows(1, 1, 72, dtype=dtype).expand(1, 200, 72).contiguous()
    best, target = run(metric, places(range(0, 40)), places(range(199, 39, -1)))
    assert (target[0, :40] == 199).all() and (target[0, 40:] == -1).all()
    assert best[0, :40].unique().numel() == 1


@pytest.mark.parametrize(("dtype", "channels"), [(F16, 0), (F16, 1), (BF16, 200), (F32, 0), (F32, 1), (F32, 210)])
def test_channels(dtype: torch.dtype, channels: int) -> None:
    """None, one, and more than stay in shared memory beside 64 (fp32) rows; test_the_large_tile has the others."""
    metric = integers(1, 30, max(channels, 8), DOT, dtype)[..., :channels]
    check_same(metric, places(range(0, 30, 3)), places(range(1, 30, 3)), score=DOT)


@pytest.mark.parametrize(("channels", "destinations", "score"), [(100, 140, L2), (200, 90, COSINE)])
def test_the_large_tile(channels: int, destinations: int, score: int) -> None:
    """Three samples, 128 rows a tile: same bits as alone, with 32. 200 channels are read again for every tile."""
    metric = rows(3, 10 + destinations, channels, dtype=BF16, seed=2)
    src, dst = places(range(0, 10)), places(range(10, 10 + destinations))
    check_as_good(metric, src, dst, score=score)
    together, alone = run(metric, src, dst, score=score), run(metric[2:], src, dst, score=score)
    assert all(torch.equal(x[2:], y) for x, y in zip(together, alone, strict=True))


def test_several_tiles_of_sources() -> None:
    check_as_good(rows(1, 150, 16, dtype=F16), places(range(0, 140)), places(range(140, 150)))
    check_as_good(rows(1, 150, 16, dtype=F32), places(range(0, 140)), places(range(140, 150)))


# ---- lists, ranges, protection ---------------------------------------------------------------------------------------


def test_every_sample_its_own_lists() -> None:
    metric = integers(2, 40, 8, L2, F16)
    check_same(metric, places([3, 1, 30], [9, 2, 5]), places(range(20, 28), range(32, 24, -1)), score=L2)
    check_same(metric, places([3, 1, 30]), places(range(20, 28), range(32, 24, -1)), score=L2)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("shared", [True, False])
def test_ranges(dtype: torch.dtype, shared: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    src, dst = places(range(0, 60)), places(range(199, 59, -1))
    edges = torch.randint(-3, 150, (1 if shared else 2, 60, 6), generator=generator).sort(-1).values
    edges[:, 5] = 7  # nothing to choose
    edges[:, 6] = torch.tensor([0, 140, 140, 140, 140, 140])
    ranges = edges.view(-1, 60, 3, 2).to(torch.int32)
    check_same(integers(2, 200, 8, L2, dtype), src, dst, ranges, score=L2)


def test_the_large_tile_with_ranges() -> None:
    generator = torch.Generator().manual_seed(5)
    ranges = torch.randint(0, 60, (1, 260, 4), generator=generator).sort(-1).values.view(1, 260, 2, 2).to(torch.int32)
    check_same(integers(1, 320, 8, DOT, F16), places(range(260)), places(range(260, 320)), ranges, score=DOT)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_source_may_be_a_destination(dtype: torch.dtype) -> None:
    """DPC-KNN: every token looks at those before it in another order."""
    order = torch.randperm(70, generator=torch.Generator().manual_seed(6)).tolist()
    upto = torch.arange(70, dtype=torch.int32)
    ranges = torch.stack((torch.zeros_like(upto), upto), -1)[None, :, None]
    check_same(integers(1, 70, 8, L2, dtype), places(order), places(order), ranges.contiguous(), score=L2)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_protected_tokens(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    metric = integers(2, 60, 8, DOT, dtype)
    src, dst = places(range(0, 60, 2)), places(range(1, 60, 2))
    for shape in ((1, 60), (2, 60)):
        check_same(metric, src, dst, protect=torch.rand(shape, generator=generator) < 0.4, score=DOT)
    check_same(metric, src, dst, protect=torch.ones(1, 60, dtype=torch.bool), score=DOT)


@pytest.mark.parametrize("score", [COSINE, DOT, L2])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_that_are_not_finite_touch_no_other(dtype: torch.dtype, score: int) -> None:
    clean = integers(1, 60, 8, score, dtype)
    metric = clean.clone()
    metric[0, 4, 1], metric[0, 9, 3], metric[0, 30, 0], metric[0, 31] = NAN, INF, -INF, 1e38
    metric[0, 50] = NAN  # in no list
    src, dst = places(range(0, 40, 2)), places(range(1, 40, 2))
    check_same(metric, src, dst, score=score)
    bad = torch.zeros(1, 60, dtype=torch.bool)
    bad[0, [4, 9, 30, 31, 50]] = True
    without = run(clean, src, dst, protect=bad, score=score)
    best, target = run(metric, src, dst, score=score)
    assert torch.equal(best, without[0]) and torch.equal(target[~bad], without[1][~bad])
    assert (target[bad] == -2).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norms_that_vanish(dtype: torch.dtype) -> None:
    """The square is 0 although the row is not: the cosine is 0 with all."""
    metric = integers(1, 20, 8, COSINE, dtype)
    metric[0, 2], metric[0, 3], metric[0, 4] = 1e-30, 1e-30, -1e-30
    check_same(metric, places(range(0, 20, 2)), places(range(1, 20, 2)))


# ---- memory and extents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F16])
def test_memory_layouts(dtype: torch.dtype) -> None:
    wide = rows(2, 30, 40, dtype=dtype, seed=3)
    src, dst = places(range(0, 15)), places(range(14, 1, -2))
    for x in (wide[..., :21], wide[..., 1:22], wide[:, ::2, 8:24], wide[:1].expand(2, -1, -1)):
        lists = (src[:, :7], dst[:, 1:]) if x.shape[1] == 15 else (src, dst)
        lists = tuple(y.contiguous() for y in lists)
        got, wanted = run(x, *lists), run(x.contiguous(), *lists)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("batch", "tokens", "sources", "destinations"), [(0, 4, 2, 2), (2, 0, 0, 0), (1, 4, 0, 2), (1, 4, 2, 0)]
)
def test_empty(batch: int, tokens: int, sources: int, destinations: int) -> None:
    metric = rows(batch, tokens, 8, dtype=F16)
    best, target = run(metric, places(range(sources)), places(range(tokens - destinations, tokens)))
    assert torch.equal(best, torch.full((batch, tokens), -INF)) and (target == -1).all()


def test_float64_is_refused() -> None:
    with pytest.raises(RuntimeError, match="float32, float16 and bfloat16"):
        run(torch.zeros(1, 4, 8, dtype=torch.float64), places([0]), places([1]))
