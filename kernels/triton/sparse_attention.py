"""Attention over the blocks that a layout lists; saccade/reference/sparse_attention.py is the specification.

A program takes a tile of queries of one head. First it walks the blocks seen whole, then, with a mask, the ragged last one and those
seen in part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import attention_launch, launch
from saccade._triton.attention_configs import forward_tile
from saccade._triton.attention_flags import row_flags
from saccade._triton.attention_tile import (
    LN2,
    LOG2E,
    OPTIONS,
    SIZES,
    WHOLE,
    add_biases,
    add_products,
    list_of,
    load_parts,
    masked_block,
    operand,
    plain_blocks,
    products,
    rows_at,
    shown,
    store_parts,
    tokens_at,
    zero_parts,
)


@triton.jit
def attend(
    acc1, acc2, top, total, q1, q2, p_q, m_q, p_k, p_v, p_bias, p_key_bias, p_k_order, p_box, p_at, p_bits, p_bad,
    row, i, first, origin, whole, k_len, k_stride_s, v_stride_s, q_positions, k_positions, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SEEN: tl.constexpr, AXES: tl.constexpr, HAS_K_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys at positions j, of which `first` is the first within its block. MASKED: those seen in part, or that may end."""
    j = origin + tl.arange(0, BLOCK_N)
    key, exists = tokens_at(p_k_order, j, k_len, HAS_K_ORDER)
    HOLES: tl.constexpr = MASKED or HAS_K_ORDER
    p_key = rows_at(p_k, key, origin, tl.arange(0, BLOCK_N), k_stride_s, ALIGN, HAS_K_ORDER or WIDE)
    if CHUNK == 0:
        k1, k2 = load_parts(p_key, exists[:, None], D, D1, D2, HOLES)
    else:
        k1, k2 = q1, q2
    s = products(q1, q2, p_q, m_q, k1, k2, p_key, exists[:, None], D, D2, CHUNK, BLOCK_M, BLOCK_N) * scale
    visible = exists[None, :]
    if MASKED and SEEN != WHOLE:
        part = shown(
            p_box, p_at, p_bits, i, j[None, :], row, (j % K_BLOCK)[None, :], first, q_positions, k_positions, SEEN, AXES, K_BLOCK, BLOCK_N
        )  # fmt: skip
        visible = visible & (part | whole)
    s = add_biases(s, p_bias, p_key_bias, key, m_q, exists, HOLES, HAS_BIAS, HAS_KEY_BIAS)
    if HOLES:
        s = tl.where(visible, s, float("-inf"))
    best = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(best == float("-inf"), 0.0, best)
    p = tl.exp2(s * LOG2E - (shift * LOG2E)[:, None])
    shrink = tl.exp2((top - shift) * LOG2E)
    total = total * shrink + tl.sum(p, 1)
    keep = exists
    if MASKED and SEEN != WHOLE:  # what is not finite must not reach the rows that do not see it
        bad = tl.load(p_bad + key, mask=exists, other=0.0)
        keep = keep & (bad == 0)
        p = tl.where(visible, p + bad[None, :], 0.0)
    p_value = rows_at(p_v, key, origin, tl.arange(0, BLOCK_N), v_stride_s, ALIGN, HAS_K_ORDER or WIDE)
    v1, v2 = load_parts(p_value, keep[:, None], D, D1, D2, HOLES)
    acc1 = acc1 * shrink[:, None]
    if D2 > 0:
        acc2 = acc2 * shrink[:, None]
    acc1, acc2 = add_products(acc1, acc2, operand(p, p_v), v1, v2, D2)
    return acc1, acc2, best, total


@triton.jit(do_not_specialize=SIZES)
def sparse_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bad_ptr, bias_ptr, key_bias_ptr, starts_ptr, counts_ptr, indices_ptr,
    p_starts_ptr, p_counts_ptr, p_indices_ptr, p_ids_ptr, bits_ptr, box_ptr, at_ptr, q_order_ptr, k_order_ptr,
    heads, group, tiles, q_len, k_len, q_positions, k_positions, scale,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s, bias_stride_b, bias_stride_h, bias_stride_s, key_bias_stride,
    list_stride_b, list_stride_h, box_stride_b, box_stride_h, at_stride_b, at_stride_h,
    q_order_stride_b, q_order_stride_h, k_order_stride_b, k_order_stride_h,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BIAS_ALIGN: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, SEEN: tl.constexpr, AXES: tl.constexpr,
    HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_N: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = K_BLOCK // BLOCK_N
    MASKED_STEPS: tl.constexpr = K_BLOCK // MASKED_N
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    i_kh = i_h // group
    row = (i_tile % (Q_BLOCK // BLOCK_M)) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # within the block
    i = i_tile // (Q_BLOCK // BLOCK_M) * Q_BLOCK + row
    query, m_q = tokens_at(q_order_ptr + i_b * q_order_stride_b + i_h * q_order_stride_h, i, q_len, HAS_Q_ORDER)
    p_q = q_ptr + (i_b * q_stride_b + i_h * q_stride_h + query * q_stride_s) * ALIGN
    p_k = k_ptr + (i_b * k_stride_b + i_kh * k_stride_h) * ALIGN
    p_v = v_ptr + (i_b * v_stride_b + i_kh * v_stride_h) * ALIGN
    p_bias = bias_ptr + (i_b * bias_stride_b + i_h * bias_stride_h + query * bias_stride_s) * BIAS_ALIGN
    p_key_bias = key_bias_ptr + i_b * key_bias_stride
    p_k_order = k_order_ptr + i_b * k_order_stride_b + i_kh * k_order_stride_h
    p_box, p_at = box_ptr + i_b * box_stride_b + i_h * box_stride_h, at_ptr + i_b * at_stride_b + i_h * at_stride_h

    p_bad = bad_ptr + (i_b * (heads // group) + i_kh) * k_len
    i_list = i_b * list_stride_b + i_h * list_stride_h + i_tile // (Q_BLOCK // BLOCK_M)
    start, count = list_of(starts_ptr, counts_ptr, i_list, True)
    p_start, p_count = list_of(p_starts_ptr, p_counts_ptr, i_list, SEEN != WHOLE)
    plain = plain_blocks(indices_ptr, start, count, k_len, K_BLOCK, HAS_K_ORDER)

    if CHUNK == 0:
        q1, q2 = load_parts(p_q, m_q, D, D1, D2, True)
    else:
        q1, q2 = row, row
    acc1, acc2 = zero_parts(BLOCK_M, D1, D2)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(0, plain * STEPS):
        block = tl.load(indices_ptr + start + n // STEPS)
        first = n % STEPS * BLOCK_N
        origin = block * K_BLOCK + first
        acc1, acc2, top, total = attend(
            acc1, acc2, top, total, q1, q2, p_q, m_q, p_k, p_v, p_bias, p_key_bias, p_k_order, p_box, p_at, bits_ptr, p_bad,
            row, i, first, origin, True, k_len, k_stride_s, v_stride_s, q_positions, k_positions, scale,
            D, D1, D2, CHUNK, ALIGN, WIDE, K_BLOCK, SEEN, AXES, HAS_K_ORDER, HAS_BIAS, HAS_KEY_BIAS, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if SEEN != WHOLE or not HAS_K_ORDER:
        for n in range(plain * MASKED_STEPS, (count + p_count) * MASKED_STEPS):
            block, whole, p_bits = masked_block(
                indices_ptr, p_indices_ptr, p_ids_ptr, bits_ptr, start, p_start, count, n // MASKED_STEPS, SEEN, Q_BLOCK, K_BLOCK
            )  # fmt: skip
            first = n % MASKED_STEPS * MASKED_N
            origin = block * K_BLOCK + first
            acc1, acc2, top, total = attend(
                acc1, acc2, top, total, q1, q2, p_q, m_q, p_k, p_v, p_bias, p_key_bias, p_k_order, p_box, p_at, p_bits, p_bad,
                row, i, first, origin, whole, k_len, k_stride_s, v_stride_s, q_positions, k_positions, scale,
                D, D1, D2, CHUNK, ALIGN, WIDE, K_BLOCK, SEEN, AXES, HAS_K_ORDER, HAS_BIAS, HAS_KEY_BIAS, True, BLOCK_M, MASKED_N,
            )  # fmt: skip

    empty = (total == 0)[:, None]  # NaN is not 0
    weight = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total[:, None]))
    acc1 = tl.where(empty, 0.0, acc1 * weight)
    if D2 > 0:
        acc2 = tl.where(empty, 0.0, acc2 * weight)
    p_out = out_ptr + (i_b * out_stride_b + i_h * out_stride_h + query * out_stride_s) * ALIGN
    store_parts(p_out, m_q, acc1, acc2, D, D1, D2)
    lse = tl.where(empty, float("-inf"), top[:, None] + tl.log2(total[:, None]) * LN2)
    tl.store(lse_ptr + (i_b * heads + i_h) * q_len + query, lse, mask=m_q)


def sparse_attention(
    q, k, v, starts, counts, indices, p_starts, p_counts, p_indices, p_ids, bits, box, at, q_order, k_order,
    bias, key_bias, q_block, k_block, scale,
):  # fmt: skip
    """out [B, H, Sq, D] and lse [B, H, Sq] fp32."""
    batch, heads, q_len = q.shape[:3]
    out, lse = launch.empty_like(q), q.new_empty(q.shape[:3], dtype=launch.float32())
    if lse.numel() == 0:
        return out, lse
    layout = attention_launch.layout_of(
        starts, counts, indices, p_starts, p_counts, p_indices, p_ids, bits, box, at, q_order, k_order
    )
    tile = forward_tile(q, q_block, bias is not None, k_order is not None)
    tiles = layout.q_blocks * (q_block // tile.rows)
    align = attention_launch.alignment(q, k, v, out)
    with launch.on_device(q):
        bad = lse if layout.seen == attention_launch.NONE else row_flags(v, align)
        sparse_attention_kernel[(batch * heads * tiles,)](
            q, k, v, out, lse, bad, heads=heads, group=heads // max(k.shape[1], 1), tiles=tiles, q_len=q_len, k_len=k.shape[2],
            scale=scale, **launch.stride_args(align, q=q, k=k, v=v, out=out),
            **attention_launch.layout_args(layout, layout.q_blocks, k.shape[2], q_block, k_block),
            **attention_launch.bias_args(bias, key_bias, q, lse), **attention_launch.multiplied_parts(q),
            ALIGN=align, WIDE=attention_launch.wide(k, v), BLOCK_M=tile.rows, BLOCK_N=tile.columns,
            MASKED_N=tile.masked_columns, **tile.options(), **OPTIONS,
        )  # fmt: skip
    return out, lse
