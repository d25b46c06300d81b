"""The best destination of every source; saccade/reference/match.py is the specification.

One launch finds the norms of all tokens and marks those that neither choose nor are chosen. In the other a program holds a block of
sources and streams the destinations past them: products, scores, and the best so far with its place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch, matrix
from saccade._triton.matrix import inverse_root, row_square
from saccade._triton.products import block_k, held_block, products
from saccade._triton.tile import program

COSINE, DOT, L2 = (tl.constexpr(i) for i in range(3))

NOWHERE = tl.constexpr(0x7FFFFFFF)  # after every place


@triton.jit(do_not_specialize=matrix.SIZES)
def match_norms_kernel(
    x_ptr, protect_ptr, norm_ptr, score_ptr, target_ptr, tokens, tiles, x_stride_b, x_stride_s, protect_stride,
    C: tl.constexpr, SCORE: tl.constexpr, HAS_PROTECT: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """norm [B, N] fp32: what the score needs of a row, NaN where it takes no part. score and target as if nothing matched."""
    _, i_tile, i_b = program(1, tiles)
    i = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m = i < tokens
    square = row_square(x_ptr + (i_b * x_stride_b + i * x_stride_s) * ALIGN, m, C, ROWS, BLOCK_D)
    finite = square < float("inf")
    norm = square
    if SCORE == COSINE:
        norm = inverse_root(square)
    elif SCORE == DOT:
        norm = tl.zeros_like(square)
    usable = finite
    if HAS_PROTECT:
        usable = usable & (tl.load(protect_ptr + i_b * protect_stride + i, mask=m, other=0) == 0)
    p = i_b * tokens + i
    tl.store(norm_ptr + p, tl.where(usable, norm, float("nan")), mask=m)
    tl.store(score_ptr + p, tl.full((ROWS, 1), float("-inf"), tl.float32), mask=m)
    tl.store(target_ptr + p, tl.where(finite, -1, -2), mask=m)


@triton.jit(do_not_specialize=matrix.SIZES)
def match_kernel(
    x_ptr, src_ptr, dst_ptr, ranges_ptr, norm_ptr, score_ptr, target_ptr,
    tokens, sources, destinations, tiles, range_count,
    x_stride_b, x_stride_s, src_stride, dst_stride, ranges_stride,
    C: tl.constexpr, SCORE: tl.constexpr, HAS_RANGES: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _, i_tile, i_b = program(1, tiles)
    p_norm = norm_ptr + i_b * tokens
    p_dst = dst_ptr + i_b * dst_stride
    p_x, x_s = x_ptr + i_b * x_stride_b * ALIGN, x_stride_s.to(tl.int64) * ALIGN
    i = i_tile.to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)[:, None]
    m_a = i < sources
    source = tl.load(src_ptr + i_b * src_stride + i, mask=m_a, other=0).to(tl.int64)
    own = tl.load(p_norm + source, mask=m_a, other=float("nan"))
    m_a = own == own
    p_a = p_x + source * x_s
    a = held_block(p_a, m_a, C, BLOCK_K)
    best = tl.full((BLOCK_A, 1), float("-inf"), tl.float32)
    at = tl.full((BLOCK_A, 1), NOWHERE, tl.int32)
    for i_range in range(0, range_count):
        begin, end = 0, destinations
        if HAS_RANGES:  # every destination that any of these sources may choose
            p_range = ranges_ptr + i_b * ranges_stride + (i * range_count + i_range) * 2
            low = tl.maximum(tl.load(p_range, mask=m_a, other=0), 0)
            high = tl.minimum(tl.load(p_range + 1, mask=m_a, other=0), destinations)
            begin = tl.min(tl.where(low < high, low, destinations))
            end = tl.max(tl.where(low < high, high, 0))
        for start in range(begin, end, BLOCK_B):
            place = start + tl.arange(0, BLOCK_B)[None, :]
            m_b = place < end
            destination = tl.load(p_dst + place, mask=m_b, other=0).to(tl.int64)
            norm = tl.load(p_norm + destination, mask=m_b, other=float("nan"))
            m_b = norm == norm
            s = products(a, p_a, m_a, p_x + destination * x_s, m_b, C, BLOCK_A, BLOCK_B, BLOCK_K)
            if SCORE == COSINE:
                s *= norm
            elif SCORE == L2:
                s = 2 * s - norm
            may = m_a & m_b
            if HAS_RANGES:
                may = may & (place >= low) & (place < high)
            s = tl.where(may, s, float("-inf"))
            top = tl.max(s, 1)[:, None]
            first = tl.min(tl.where(may & (s == top), place, NOWHERE), 1)[:, None]
            take = (top > best) | ((at == NOWHERE) & (first != NOWHERE))
            best, at = tl.where(take, top, best), tl.where(take, first, at)
    if SCORE == COSINE:
        best *= own
    elif SCORE == L2:
        best = tl.minimum(best - own, 0.0)
    m = at != NOWHERE
    p = i_b * tokens + source
    tl.store(score_ptr + p, best, mask=m)
    tl.store(target_ptr + p, tl.load(p_dst + at, mask=m, other=-1), mask=m)


def tiles(element_size: int) -> dict[str, int]:
    """Sources and destinations of a tile, and warps."""
    if element_size == 2:
        return {"BLOCK_A": 64, "BLOCK_B": 128, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_A": 32, "BLOCK_B": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 192}


def match(metric, src, dst, ranges, protect, score):
    """Score [B, N] fp32 and target [B, N] int32 from metric [B, N, C]."""
    import torch

    batch, tokens, channels = metric.shape
    best = metric.new_empty((batch, tokens), dtype=torch.float32)
    target = metric.new_empty((batch, tokens), dtype=torch.int32)
    if best.numel() == 0:
        return best, target
    src, dst, ranges = (None if t is None else t.contiguous() for t in (src, dst, ranges))
    sources, destinations = src.shape[1], dst.shape[1]
    x, align = matrix.summed(metric)
    norm = torch.empty_like(best)
    protected = protect is not None
    protect = protect.contiguous().view(torch.uint8) if protected else target
    block = matrix.blocks(channels)
    places = matrix.stride_args(align, x=x)
    with launch.on_device(x):
        count = -(-tokens // block["ROWS"])
        match_norms_kernel[(batch * count,)](
            x, protect, norm, best, target, tokens=tokens, tiles=count, **places,
            protect_stride=matrix.shared_stride(protect) if protected else 0,
            C=channels, SCORE=score, HAS_PROTECT=protected, ALIGN=align, **block, num_warps=4, **matrix.OPTIONS,
        )  # fmt: skip
        if sources == 0 or destinations == 0 or (ranges is not None and ranges.shape[2] == 0):
            return best, target
        config = tiles(x.element_size())
        count = -(-sources // config["BLOCK_A"])
        match_kernel[(batch * count,)](
            x, src, dst, dst if ranges is None else ranges, norm, best, target,
            tokens=tokens, sources=sources, destinations=destinations, tiles=count,
            range_count=1 if ranges is None else ranges.shape[2], **places,
            src_stride=matrix.shared_stride(src), dst_stride=matrix.shared_stride(dst),
            ranges_stride=0 if ranges is None else matrix.shared_stride(ranges),
            C=channels, SCORE=score, HAS_RANGES=ranges is not None, ALIGN=align,
            BLOCK_K=block_k(channels, x.element_size()), **config, **matrix.OPTIONS,
        )  # fmt: skip
    return best, target
