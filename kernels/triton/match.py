"""The best destination of every source; saccade/reference/match.py is the specification.

One launch finds the norms of all tokens, marks those that neither choose nor are chosen, and puts the destinations one behind the other.
In the next a program holds a block of sources and streams the destinations past them: products, scores, and in every column of the tile
the best so far with its place. What is best of the columns is found at the end, once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch, matrix
from saccade._triton.matrix import inverse_root, load_rows
from saccade._triton.products import block_k, held_block, products
from saccade._triton.tile import program

COSINE, DOT, L2 = (tl.constexpr(i) for i in range(3))

NOWHERE = tl.constexpr(0x7FFFFFFF)  # after every place


@triton.jit(do_not_specialize=matrix.SIZES)
def match_rows_kernel(
    x_ptr, protect_ptr, dst_ptr, norm_ptr, score_ptr, target_ptr, dst_norm_ptr, packed_ptr,
    tokens, destinations, tiles, blocks, x_stride_b, x_stride_s, dst_stride, protect_stride,
    C: tl.constexpr, PITCH: tl.constexpr, SCORE: tl.constexpr, HAS_PROTECT: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first `blocks` programs of a sample take tokens, the others destinations.

    norm [B, N], dst_norm [B, K]: what the score needs of a row, NaN where it takes no part. packed [B, K, PITCH]: the destinations.
    score and target: as if nothing matched.
    """
    _, i_tile, i_b = program(1, tiles)
    is_token = i_tile < blocks
    i = tl.where(is_token, i_tile, i_tile - blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m = i < tl.where(is_token, tokens, destinations)
    m_token, m_place = m & is_token, m & (i_tile >= blocks)
    token = tl.load(dst_ptr + i_b * dst_stride + i, mask=m_place, other=0).to(tl.int64)
    token = tl.where(is_token, i, token)
    p_x = x_ptr + (i_b * x_stride_b + token * x_stride_s) * ALIGN
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, C, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)[None, :]
        x = load_rows(p_x, m, column, C)
        tl.store(packed_ptr + (i_b * destinations + i) * PITCH + column, x, mask=m_place & (column < C))
        total += x.to(tl.float32) * x.to(tl.float32)
    square = tl.sum(total, 1)[:, None]
    finite = square < float("inf")
    norm = square
    if SCORE == COSINE:
        norm = inverse_root(square)
    elif SCORE == DOT:
        norm = tl.zeros_like(square)
    usable = finite
    if HAS_PROTECT:
        usable = usable & (tl.load(protect_ptr + i_b * protect_stride + token, mask=m, other=0) == 0)
    norm = tl.where(usable, norm, float("nan"))
    p = i_b * tokens + i
    tl.store(dst_norm_ptr + i_b * destinations + i, norm, mask=m_place)
    tl.store(norm_ptr + p, norm, mask=m_token)
    tl.store(score_ptr + p, tl.full((ROWS, 1), float("-inf"), tl.float32), mask=m_token)
    tl.store(target_ptr + p, tl.where(finite, -1, -2), mask=m_token)


@triton.jit(do_not_specialize=matrix.SIZES)
def match_kernel(
    x_ptr, src_ptr, dst_ptr, ranges_ptr, norm_ptr, dst_norm_ptr, packed_ptr, score_ptr, target_ptr,
    tokens, sources, destinations, tiles, range_count,
    x_stride_b, x_stride_s, src_stride, dst_stride, ranges_stride,
    C: tl.constexpr, PITCH: tl.constexpr, SCORE: tl.constexpr, HAS_RANGES: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _, i_tile, i_b = program(1, tiles)
    p_norm, p_dst_norm = norm_ptr + i_b * tokens, dst_norm_ptr + i_b * destinations
    p_packed = packed_ptr + i_b * destinations * PITCH
    i = i_tile.to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)[:, None]
    m_a = i < sources
    source = tl.load(src_ptr + i_b * src_stride + i, mask=m_a, other=0).to(tl.int64)
    own = tl.load(p_norm + source, mask=m_a, other=float("nan"))
    m_a = own == own
    p_a = x_ptr + (i_b * x_stride_b + source * x_stride_s) * ALIGN
    a = held_block(p_a, m_a, C, BLOCK_K)
    best = tl.full((BLOCK_A, BLOCK_B), float("-inf"), tl.float32)
    at = tl.full((BLOCK_A, BLOCK_B), NOWHERE, tl.int32)
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
            norm = tl.load(p_dst_norm + place, mask=m_b, other=float("nan"))
            p_b = p_packed + place.to(tl.int64) * PITCH
            s = products(a, p_a, m_a, p_b, m_b, C, BLOCK_A, BLOCK_B, BLOCK_K)
            if SCORE == COSINE:
                s *= norm
            elif SCORE == L2:
                s = 2 * s - norm
            may = m_a & (norm == norm)  # what a row that is not finite gives, stays in its own column
            if HAS_RANGES:
                may = may & (place >= low) & (place < high)
            take = may & ((s > best) | (at == NOWHERE))  # places come in ascending order
            best, at = tl.where(take, s, best), tl.where(take, place, at)
    top = tl.max(best, 1)[:, None]
    at = tl.min(tl.where(best == top, at, NOWHERE), 1)[:, None]
    best = top
    if SCORE == COSINE:
        best *= own
    elif SCORE == L2:
        best = tl.minimum(best - own, 0.0)
    m = at != NOWHERE
    p = i_b * tokens + source
    tl.store(score_ptr + p, best, mask=m)
    tl.store(target_ptr + p, tl.load(dst_ptr + i_b * dst_stride + at, mask=m, other=-1), mask=m)


def tiles(channels: int, element_size: int) -> dict[str, int]:
    """Rows, columns and inner block of a tile of products, and how many warps share it."""
    inner = block_k(channels, element_size)
    if element_size == 2:
        warps = {"num_warps": 4, "maxnreg": 255} if channels <= inner else {"num_warps": 8}
        return {"BLOCK_A": 64, "BLOCK_B": 64, "BLOCK_K": inner, "num_stages": 3, **warps}
    return {"BLOCK_A": 32, "BLOCK_B": 64, "BLOCK_K": inner, "num_warps": 8, "num_stages": 2, "maxnreg": 168}


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
    pitch = -(-channels // (16 // x.element_size())) * (16 // x.element_size())
    norm, dst_norm = torch.empty_like(best), best.new_empty((batch, destinations))
    packed = x.new_empty((batch, destinations, pitch))
    protected = protect is not None
    protect = protect.contiguous().view(torch.uint8) if protected else target
    block = matrix.blocks(channels)
    common = {
        "tokens": tokens, "destinations": destinations, **matrix.stride_args(align, x=x),
        "dst_stride": matrix.shared_stride(dst), "C": channels, "PITCH": pitch, "SCORE": score, "ALIGN": align,
    }  # fmt: skip
    with launch.on_device(x):
        blocks = -(-tokens // block["ROWS"])
        count = blocks + -(-destinations // block["ROWS"])
        match_rows_kernel[(batch * count,)](
            x, protect, dst, norm, best, target, dst_norm, packed, tiles=count, blocks=blocks, **common,
            protect_stride=matrix.shared_stride(protect) if protected else 0,
            HAS_PROTECT=protected, **block, num_warps=4, **matrix.OPTIONS,
        )  # fmt: skip
        if sources == 0 or destinations == 0 or (ranges is not None and ranges.shape[2] == 0):
            return best, target
        config = tiles(channels, x.element_size())
        count = -(-sources // config["BLOCK_A"])
        match_kernel[(batch * count,)](
            x, src, dst, dst if ranges is None else ranges, norm, dst_norm, packed, best, target,
            sources=sources, tiles=count, range_count=1 if ranges is None else ranges.shape[2], **common,
            src_stride=matrix.shared_stride(src),
            ranges_stride=0 if ranges is None else matrix.shared_stride(ranges), HAS_RANGES=ranges is not None,
            **config, **matrix.OPTIONS,
        )  # fmt: skip
    return best, target
