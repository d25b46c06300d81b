"""block_select on the emulated GPU: the lists of the reference where scores are exact, as good ones elsewhere."""

from __future__ import annotations

import pytest
import torch
from emulation.block_structs import BlockSelectArgs
from emulation.cuda_emulator import call

from saccade.reference.block_select import SHARE, THRESHOLD, TOP, block_select

INF, NAN = float("inf"), float("nan")
Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
SMALL, LARGE = 40, 101  # key blocks for a warp a row, and for a block of threads a row


def run(
    q: torch.Tensor, k: torch.Tensor, classes: torch.Tensor | None, mode: int, keep: int, p: float, scale: float
) -> Lists:
    batch, heads, rows, width = q.shape
    keys = k.shape[2]
    keep = min(keep, keys)
    wide = keep if mode == TOP and classes is None else keys
    counts, indices = (torch.full(s, -9, dtype=torch.int32) for s in ((batch, heads, rows), (batch, heads, rows, wide)))
    p_counts, p_indices = torch.full_like(counts, -9), torch.full_like(indices, -9)
    args = BlockSelectArgs(q.data_ptr(), k.data_ptr())
    args.batch, args.heads, args.kv_heads, args.head_dim = batch, heads, k.shape[1], width
    args.q_blocks, args.k_blocks, args.mode, args.keep, args.p, args.scale = rows, keys, mode, keep, p, scale
    args.width, args.counts, args.indices = wide, counts.data_ptr(), indices.data_ptr()
    if classes is None:
        p_counts = p_indices = counts.new_empty(0)
    else:
        assert classes.is_contiguous() and classes.dtype == torch.uint8
        args.classes, args.p_counts, args.p_indices = classes.data_ptr(), p_counts.data_ptr(), p_indices.data_ptr()
        args.class_stride = tuple(classes.stride(i) if classes.shape[i] > 1 else 0 for i in range(2))
    call("block_select", "block_select", args)
    return counts, indices, p_counts, p_indices


def check_same(*case, **options) -> None:
    for got, want in zip(run(*case, **options), block_select(*case, **options), strict=True):
        assert torch.equal(got, want)


def exact_scores(
    rows: int, keys: int, heads: tuple[int, int] = (2, 1), seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers, many of them equal: every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(-2, 3, (1, h, n, 24), generator=generator).float()
        for h, n in zip(heads, (rows, keys), strict=True)
    )


def classes_of(keys: int, shape: tuple[int, ...] = (1, 1, 9)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(keys)
    classes = torch.randint(0, 5, (*shape, keys), generator=generator, dtype=torch.uint8)
    classes[..., 0, :] = 0
    classes[..., 1, :] = 3
    return classes


@pytest.mark.parametrize("keys", [1, SMALL, LARGE])
@pytest.mark.parametrize("with_classes", [False, True])
def test_top(keys: int, with_classes: bool) -> None:
    rows = 5 if keys < LARGE else 3
    q, k = exact_scores(rows, keys)
    classes = classes_of(keys, (1, 2, rows)) if with_classes else None
    for keep in sorted({0, 1, keys // 3, keys}):
        check_same(q, k, classes, TOP, keep, 0.0, 0.5)


@pytest.mark.parametrize("mode", [SHARE, THRESHOLD])
@pytest.mark.parametrize("keys", [SMALL, LARGE])
def test_shares_of_equal_weights(keys: int, mode: int) -> None:
    """Scores are equal, so shares are k / n: ties go to the first, and nothing is rounded."""
    rows = 5 if keys < LARGE else 3
    q, k = exact_scores(rows, keys)
    for p in (0.0, 2.0**-7, 0.25, 0.5, 1.0):
        check_same(q * 0, k, None, mode, 2, p, 1.0)
        check_same(q * 0, k, classes_of(keys, (1, 1, rows)), mode, 0, p, 1.0)


def shares(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    return (scale * q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT).softmax(-1)


@pytest.mark.parametrize("keys", [SMALL, LARGE])
def test_shares_of_random_scores(keys: int) -> None:
    generator = torch.Generator().manual_seed(keys)
    rows = 5 if keys < LARGE else 3
    q, k = torch.randn(2, 2, rows, 40, generator=generator), torch.randn(2, 1, keys, 40, generator=generator)
    share = shares(q, k, 0.3)
    ranked = share.sort(-1, descending=True).values.cumsum(-1)
    for p in (0.1, 0.6, 0.95):
        counts, indices, *_ = run(q, k, None, SHARE, 1, p, 0.3)
        fewest = (ranked < p).sum(-1) + 1
        sure = ((ranked - p).abs() > 1e-5).all(-1)  # nothing is decided by rounding
        assert sure.sum() >= sure.numel() - 2 and torch.equal(counts[sure].long(), fewest[sure])
        want = block_select(q, k, None, SHARE, 1, p, 0.3)
        assert torch.equal(indices[sure], want[1][sure])
        cut = 2 * p / keys
        got, want = run(q, k, None, THRESHOLD, 1, cut, 0.3), block_select(q, k, None, THRESHOLD, 1, cut, 0.3)
        sure = ((share - cut).abs() > 1e-6).all(-1)
        assert sure.any() and torch.equal(got[1][sure], want[1][sure])


@pytest.mark.parametrize("keys", [SMALL, LARGE])
def test_scores_that_are_not_finite(keys: int) -> None:
    q, k = exact_scores(3, keys)
    k[..., 3, 0], k[..., 5, 1], k[..., 9, 2] = NAN, INF, -INF
    for mode, p in ((TOP, 0.0), (SHARE, 0.5), (SHARE, 1.0), (THRESHOLD, 0.25)):
        check_same(q, k, None, mode, 6, p, 1.0)
    k[:] = NAN
    check_same(q, k, None, SHARE, 2, 0.5, 1.0)
    check_same(q, k, classes_of(keys, (1, 1, 3)), TOP, 4, 0.0, 1.0)


def test_sizes() -> None:
    q, k = exact_scores(1, 5)
    check_same(q[..., :7].contiguous(), k[..., :7].contiguous(), None, TOP, 2, 0.0, 1.0)
    check_same(q, k[:, :, :0].contiguous(), None, SHARE, 1, 0.5, 1.0)
    with pytest.raises(RuntimeError, match="16384"):
        run(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 16385, 8), None, TOP, 1, 0.0, 1.0)
