"""Attention inside the boxes of a grid behind a prefix; saccade/reference/axial_attention.py is the specification.

Several small boxes share a tile, each with the prefix, and see their own rows of it; a larger one is walked tile by tile. Prefix queries
that see all tokens take a chunk of keys a program; one more launch puts the chunks together, or takes the mean over boxes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import attention_launch, axial_tile, launch
from saccade._triton.attention_tile import (
    LN2,
    LOG2E,
    OPTIONS,
    add_products,
    load_parts,
    operand,
    products,
    store_parts,
    values,
    zero_parts,
)
from saccade._triton.axial_tile import SIZES, Block, box_at, packed_rows, shape_of, store_terms, token_at
from saccade._triton.tile import narrow

BLOCKS = {
    32: Block(64, 64, 4), 64: Block(64, 64, 4), 128: Block(64, 32, 4), 256: Block(64, 32, 8),
}  # fmt: skip
FP32_BLOCKS = {
    32: Block(32, 32, 4), 64: Block(32, 32, 4), 128: Block(32, 32, 4), 256: Block(32, 16, 4, 2, 255),
}  # fmt: skip
PART_ROWS = 32  # terms that the last kernel sums at once


def block_of(q) -> Block:
    """Tile for rows of this width and element type."""
    table = FP32_BLOCKS if q.element_size() == 4 else BLOCKS
    return table[max(32, launch.power_of_two(q.shape[3]))]


@triton.jit(do_not_specialize=SIZES)
def axial_packed_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, group_out_ptr, group_lse_ptr, heads, tokens, tiles, groups, slots, per_tile,
    prefix, size_t, size_h, size_w, box_t, box_h, box_w, scale,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s,
    D: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of whole boxes: one product of all rows with all rows, of which a box sees its own."""
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    token, exists, slot, i_g, own = packed_rows(
        i_tile, prefix, size_t, size_h, size_w, box_t, box_h, box_w, groups, slots, per_tile, ROWS
    )
    m = exists[:, None]
    p_q = q_ptr + (i_b * q_stride_b + i_h * q_stride_h + token[:, None] * q_stride_s) * ALIGN
    p_k = k_ptr + (i_b * k_stride_b + i_h * k_stride_h + token[:, None] * k_stride_s) * ALIGN
    p_v = v_ptr + (i_b * v_stride_b + i_h * v_stride_h + token[:, None] * v_stride_s) * ALIGN
    s = tl.zeros((ROWS, ROWS), tl.float32)
    bad = tl.zeros((ROWS,), tl.float32)  # NaN for rows of v that are not finite: 0 times them would spoil other boxes
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        q = values(tl.load(p_q + column, mask=m & (column < D), other=0.0))
        k = values(tl.load(p_k + column, mask=m & (column < D), other=0.0))
        s = tl.dot(q, tl.trans(k), s, input_precision="ieee")
        bad += tl.sum(tl.load(p_v + column, mask=m & (column < D), other=0.0).to(tl.float32) * 0.0, 1)
    visible = (own[:, None] == own[None, :]) & exists[None, :]
    s = tl.where(visible, s * scale, float("-inf"))
    top = tl.max(s, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    w = tl.exp2((s - shift[:, None]) * LOG2E)
    total = tl.sum(w, 1)
    empty = total == 0
    weight = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))[:, None]
    w = operand(tl.where(visible, w + bad[None, :], 0.0), v_ptr)
    lse = tl.where(empty, float("-inf"), top + tl.log2(total) * LN2)
    written = exists & (slot >= prefix)
    p_out = out_ptr + (i_b * out_stride_b + i_h * out_stride_h + token[:, None] * out_stride_s) * ALIGN
    term = ((i_b * heads + i_h) * groups + i_g) * prefix + slot
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        keep = (exists & (bad == 0))[:, None]
        v = values(tl.load(p_v + column, mask=keep & (column < D), other=0.0))
        out = tl.dot(w, v, input_precision="ieee") * weight
        out = tl.where(empty[:, None], 0.0, out)
        tl.store(p_out + column, narrow(out, out_ptr.dtype.element_ty), mask=written[:, None] & (column < D))
        if MEAN:
            terms = (exists & (slot < prefix))[:, None] & (column < D)
            tl.store(group_out_ptr + term[:, None] * D + column, out, mask=terms)
    tl.store(lse_ptr + (i_b * heads + i_h) * tokens + token, lse, mask=written)
    if MEAN:
        tl.store(group_lse_ptr + term, lse, mask=exists & (slot < prefix))


@triton.jit
def see(
    acc1, acc2, top, total, q1, q2, p_q, m_q, p_k, p_v, token, exists, k_stride_s, v_stride_s, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys, all of which every query sees where they exist."""
    p_key = p_k + token[:, None] * (k_stride_s * ALIGN)
    p_value = p_v + token[:, None] * (v_stride_s * ALIGN)
    if CHUNK == 0:
        k1, k2 = load_parts(p_key, exists[:, None], D, D1, D2, True)
    else:
        k1, k2 = q1, q2
    s = products(q1, q2, p_q, m_q, k1, k2, p_key, exists[:, None], D, D2, CHUNK, BLOCK_M, BLOCK_N) * scale
    s = tl.where(exists[None, :], s, float("-inf"))
    best = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(best == float("-inf"), 0.0, best)
    w = tl.exp2((s - shift[:, None]) * LOG2E)
    shrink = tl.exp2((top - shift) * LOG2E)
    total = total * shrink + tl.sum(w, 1)
    acc1 = acc1 * shrink[:, None]
    if D2 > 0:
        acc2 = acc2 * shrink[:, None]
    v1, v2 = load_parts(p_value, exists[:, None], D, D1, D2, True)
    acc1, acc2 = add_products(acc1, acc2, operand(w, p_v), v1, v2, D2)
    return acc1, acc2, best, total


@triton.jit
def finish(acc1, acc2, top, total, D2: tl.constexpr):
    """Sums of weighted values to their quotient, and the logarithm of the weights' sum."""
    empty = total == 0
    weight = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))[:, None]
    acc1 = tl.where(empty[:, None], 0.0, acc1 * weight)
    if D2 > 0:
        acc2 = tl.where(empty[:, None], 0.0, acc2 * weight)
    return acc1, acc2, tl.where(empty, float("-inf"), top + tl.log2(total) * LN2)


@triton.jit(do_not_specialize=SIZES)
def axial_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, group_out_ptr, group_lse_ptr, heads, tokens, tiles, groups,
    prefix, size_t, size_h, size_w, box_t, box_h, box_w, scale,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one box."""
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_g, rest = rest % groups, rest // groups
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    t, y, x, box_t, box_h, box_w = box_at(i_g, size_t, size_h, size_w, box_t, box_h, box_w)
    rows = prefix + box_t * box_h * box_w
    i = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if not MEAN:
        i += prefix
    query = token_at(i, prefix, t, y, x, box_h, box_w, size_h, size_w)
    m_q = (i < rows)[:, None]
    p_q = q_ptr + (i_b * q_stride_b + i_h * q_stride_h + query[:, None] * q_stride_s) * ALIGN
    p_k = k_ptr + (i_b * k_stride_b + i_h * k_stride_h) * ALIGN
    p_v = v_ptr + (i_b * v_stride_b + i_h * v_stride_h) * ALIGN
    if CHUNK == 0:
        q1, q2 = load_parts(p_q, m_q, D, D1, D2, True)
    else:
        q1, q2 = i, i
    acc1, acc2 = zero_parts(BLOCK_M, D1, D2)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, rows, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        key = token_at(j, prefix, t, y, x, box_h, box_w, size_h, size_w)
        acc1, acc2, top, total = see(
            acc1, acc2, top, total, q1, q2, p_q, m_q, p_k, p_v, key, j < rows, k_stride_s, v_stride_s, scale,
            D, D1, D2, CHUNK, ALIGN, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    acc1, acc2, lse = finish(acc1, acc2, top, total, D2)
    written = (i < rows) & (i >= prefix)
    p_out = out_ptr + (i_b * out_stride_b + i_h * out_stride_h + query[:, None] * out_stride_s) * ALIGN
    store_parts(p_out, written[:, None], acc1, acc2, D, D1, D2)
    tl.store(lse_ptr + (i_b * heads + i_h) * tokens + query, lse, mask=written)
    if MEAN:
        term = ((i_b * heads + i_h) * groups + i_g) * prefix + i
        store_terms(group_out_ptr + term[:, None] * D, (i < prefix)[:, None], acc1, acc2, D, D1, D2)
        tl.store(group_lse_ptr + term, lse, mask=i < prefix)


@triton.jit(do_not_specialize=SIZES)
def axial_prefix_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, heads, tokens, tiles, chunk, chunks, prefix, scale,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Prefix queries and a chunk of all tokens: their result for these alone, and its lse."""
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_chunk, rest = rest % chunks, rest // chunks
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    i = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = (i < prefix)[:, None]
    p_q = q_ptr + (i_b * q_stride_b + i_h * q_stride_h + i.to(tl.int64)[:, None] * q_stride_s) * ALIGN
    p_k = k_ptr + (i_b * k_stride_b + i_h * k_stride_h) * ALIGN
    p_v = v_ptr + (i_b * v_stride_b + i_h * v_stride_h) * ALIGN
    if CHUNK == 0:
        q1, q2 = load_parts(p_q, m_q, D, D1, D2, True)
    else:
        q1, q2 = i, i
    acc1, acc2 = zero_parts(BLOCK_M, D1, D2)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(i_chunk * chunk, tl.minimum((i_chunk + 1) * chunk, tokens), BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        acc1, acc2, top, total = see(
            acc1, acc2, top, total, q1, q2, p_q, m_q, p_k, p_v, j.to(tl.int64), j < tokens, k_stride_s, v_stride_s, scale,
            D, D1, D2, CHUNK, ALIGN, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    acc1, acc2, lse = finish(acc1, acc2, top, total, D2)
    term = ((i_b * heads + i_h) * chunks + i_chunk) * prefix + i
    store_terms(part_ptr + term[:, None] * D, m_q, acc1, acc2, D, D1, D2)
    tl.store(part_lse_ptr + term, lse, mask=i < prefix)


@triton.jit(do_not_specialize=SIZES)
def axial_prefix_end_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, heads, tokens, parts, prefix, out_stride_b, out_stride_h, out_stride_s,
    D: tl.constexpr, ALIGN: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One prefix query: its terms together, weighted by exp(lse), or their mean."""
    i_p, rest = tl.program_id(0) % prefix, tl.program_id(0) // prefix
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    row = tl.arange(0, ROWS)
    first = (i_b * heads + i_h) * parts
    column = tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    lse = 0.0
    shift = 0.0
    if not MEAN:
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        for start in range(0, parts, ROWS):
            term = (first + start + row) * prefix + i_p
            most = tl.maximum(most, tl.load(part_lse_ptr + term, mask=start + row < parts, other=float("-inf")))
        top = tl.max(most, 0)
        shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, parts, ROWS):
        term = (first + start + row) * prefix + i_p
        m = start + row < parts
        x = tl.load(part_ptr + term[:, None] * D + column, mask=m[:, None] & (column < D), other=0.0)
        if MEAN:
            acc += x
        else:
            weight = tl.exp2((tl.load(part_lse_ptr + term, mask=m, other=float("-inf")) - shift) * LOG2E)
            acc += x * weight[:, None]
            total += weight
    out = tl.sum(acc, 0)[None, :]
    if MEAN:
        out = out / tl.maximum(parts, 1).to(tl.float32)
    else:
        whole = tl.sum(total, 0)
        out = tl.where(whole == 0, 0.0, out / tl.where(whole == 0, 1.0, whole))
        lse = tl.where(whole == 0, float("-inf"), shift + tl.log2(whole) * LN2)
    p_out = out_ptr + (i_b * out_stride_b + i_h * out_stride_h + i_p * out_stride_s) * ALIGN
    tl.store(p_out + column, narrow(out, out_ptr.dtype.element_ty), mask=column < D)
    tl.store(lse_ptr + (i_b * heads + i_h) * tokens + i_p, lse)


def axial_attention(q, k, v, prefix, t, h, w, bt, bh, bw, mean, scale):
    """out [B, H, S, D]; lse [B, H, S], group_out [B, H, G, P, D] and group_lse [B, H, G, P] fp32, the last two empty without `mean`."""
    batch, heads, tokens, head_dim = q.shape
    shape = shape_of(q, prefix, (t, h, w), (bt, bh, bw))
    out, lse = launch.empty_like(q), q.new_empty(q.shape[:3], dtype=launch.float32())
    group_out = axial_tile.empty_parts(q, shape.groups, prefix) if mean else lse.new_empty(0)
    group_lse = lse.new_empty(group_out.shape[:-1] if mean else (0,))
    if q.numel() == 0:
        return out, lse, group_out, group_lse
    align = attention_launch.alignment(q, k, v, out)
    given = {"heads": heads, "tokens": tokens, "prefix": prefix, "ALIGN": align}
    of_boxes = {
        **given, **shape.sizes, "scale": scale, "MEAN": mean, **launch.stride_args(align, q=q, k=k, v=v, out=out),
    }  # fmt: skip
    block = block_of(q)
    # A pointer that is not read needs no memory behind it, but must be one.
    terms = (group_out, group_lse) if mean else (lse, lse)
    with launch.on_device(q):
        if shape.packed:
            axial_packed_kernel[(batch * heads * shape.tiles["tiles"],)](
                q, k, v, out, lse, *terms, **of_boxes, **shape.tiles, D=head_dim, COLUMNS=axial_tile.packed_columns(q),
                num_warps=4, **OPTIONS,
            )  # fmt: skip
        elif shape.groups:
            tiles = axial_tile.row_count(shape, 0 if mean else prefix, block.queries)
            axial_kernel[(batch * heads * shape.groups * tiles,)](
                q, k, v, out, lse, *terms, tiles=tiles, groups=shape.groups, **of_boxes, **axial_tile.parts(q),
                BLOCK_M=block.queries, BLOCK_N=block.keys, **block.options(), **OPTIONS,
            )  # fmt: skip
        if prefix == 0:
            return out, lse, group_out, group_lse
        part, part_lse, parts = group_out, group_lse, shape.groups
        if not mean:
            parts, tiles = -(-tokens // axial_tile.CHUNK_KEYS), -(-prefix // block.queries)
            part = axial_tile.empty_parts(q, parts, prefix)
            part_lse = lse.new_empty(part.shape[:-1])
            axial_prefix_kernel[(batch * heads * parts * tiles,)](
                q, k, v, part, part_lse, tiles=tiles, chunk=axial_tile.CHUNK_KEYS, chunks=parts, scale=scale, **given,
                **launch.stride_args(align, q=q, k=k, v=v), **axial_tile.parts(q), BLOCK_M=block.queries,
                BLOCK_N=block.keys, **block.options(), **OPTIONS,
            )  # fmt: skip
        axial_prefix_end_kernel[(batch * heads * prefix,)](
            out, lse, part if parts else lse, part_lse if parts else lse, parts=parts, **given,
            **launch.stride_args(align, out=out), D=head_dim, MEAN=mean, ROWS=PART_ROWS,
            BLOCK_D=launch.power_of_two(head_dim), num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out, lse, group_out, group_lse
