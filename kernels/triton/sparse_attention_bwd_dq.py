"""dQ of sparse_attention, by query block; see sparse_attention_bwd.py."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton.attention_tile import (
    LOG2E,
    SIZES,
    WHOLE,
    add_biases,
    add_products,
    list_of,
    load_lse,
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
def add_queries(
    dq1, dq2, q1, q2, g1, g2, lse, delta, p_q, p_dout, m_q, p_k, p_v, p_bias, p_key_bias, p_k_order, p_box, p_at, p_bits, p_bad,
    row, i, first, origin, whole, k_len, k_stride_s, v_stride_s, q_positions, k_positions, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SEEN: tl.constexpr, AXES: tl.constexpr, HAS_K_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the keys at positions origin .. origin + BLOCK_N - 1 give to the queries of this program."""
    column = tl.arange(0, BLOCK_N)
    j = origin + column
    key, exists = tokens_at(p_k_order, j, k_len, HAS_K_ORDER)
    HOLES: tl.constexpr = MASKED or HAS_K_ORDER
    keep = exists
    if MASKED and SEEN != WHOLE:
        bad = tl.load(p_bad + key, mask=exists, other=0.0)
        keep = keep & (bad == 0)
    p_key = rows_at(p_k, key, origin, column, k_stride_s, ALIGN, HAS_K_ORDER or WIDE)
    p_value = rows_at(p_v, key, origin, column, v_stride_s, ALIGN, HAS_K_ORDER or WIDE)
    k1, k2 = load_parts(p_key, keep[:, None], D, D1, D2, HOLES)
    s = products(q1, q2, p_q, m_q, k1, k2, p_key, keep[:, None], D, D2, CHUNK, BLOCK_M, BLOCK_N) * scale
    s = add_biases(s, p_bias, p_key_bias, key, m_q, exists, HOLES, HAS_BIAS, HAS_KEY_BIAS)
    if MASKED and SEEN != WHOLE:
        s += bad[None, :]
    w = tl.exp2((s - lse) * LOG2E)
    if CHUNK == 0:
        v1, v2 = load_parts(p_value, exists[:, None], D, D1, D2, HOLES)
    else:
        v1, v2 = k1, k2
    dw = products(g1, g2, p_dout, m_q, v1, v2, p_value, exists[:, None], D, D2, CHUNK, BLOCK_M, BLOCK_N)
    ds = w * (dw - delta)
    if HOLES:
        visible = exists[None, :]
        if MASKED and SEEN != WHOLE:
            part = shown(
                p_box, p_at, p_bits, i, j[None, :], row, (j % K_BLOCK)[None, :], first, q_positions, k_positions,
                SEEN, AXES, K_BLOCK, BLOCK_N,
            )  # fmt: skip
            visible = visible & (part | whole)
        ds = tl.where(visible, ds, 0.0)
    return add_products(dq1, dq2, operand(ds, p_k), k1, k2, D2)


@triton.jit(do_not_specialize=SIZES)
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, lse_ptr, delta_ptr, bad_ptr, bias_ptr, key_bias_ptr, starts_ptr, counts_ptr, indices_ptr,
    p_starts_ptr, p_counts_ptr, p_indices_ptr, p_ids_ptr, bits_ptr, box_ptr, at_ptr, q_order_ptr, k_order_ptr,
    heads, group, tiles, q_len, k_len, q_positions, k_positions, scale,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s, dq_stride_b, dq_stride_h, dq_stride_s,
    bias_stride_b, bias_stride_h, bias_stride_s, key_bias_stride,
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
    p_dout = dout_ptr + (i_b * dout_stride_b + i_h * dout_stride_h + query * dout_stride_s) * ALIGN
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
        g1, g2 = load_parts(p_dout, m_q, D, D1, D2, True)
    else:
        q1, q2, g1, g2 = row, row, row, row
    lse = load_lse(lse_ptr + (i_b * heads + i_h) * q_len + query, m_q)
    delta = tl.load(delta_ptr + (i_b * heads + i_h) * q_len + query, mask=m_q, other=0.0)
    dq1, dq2 = zero_parts(BLOCK_M, D1, D2)
    for n in range(0, plain * STEPS):
        block = tl.load(indices_ptr + start + n // STEPS)
        first = n % STEPS * BLOCK_N
        origin = block * K_BLOCK + first
        dq1, dq2 = add_queries(
            dq1, dq2, q1, q2, g1, g2, lse, delta, p_q, p_dout, m_q, p_k, p_v, p_bias, p_key_bias, p_k_order, p_box, p_at, bits_ptr, p_bad,
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
            dq1, dq2 = add_queries(
                dq1, dq2, q1, q2, g1, g2, lse, delta, p_q, p_dout, m_q, p_k, p_v, p_bias, p_key_bias, p_k_order, p_box, p_at, p_bits, p_bad,
                row, i, first, origin, whole, k_len, k_stride_s, v_stride_s, q_positions, k_positions, scale,
                D, D1, D2, CHUNK, ALIGN, WIDE, K_BLOCK, SEEN, AXES, HAS_K_ORDER, HAS_BIAS, HAS_KEY_BIAS, True, BLOCK_M, MASKED_N,
            )  # fmt: skip
    p_dq = dq_ptr + (i_b * dq_stride_b + i_h * dq_stride_h + query * dq_stride_s) * ALIGN
    store_parts(p_dq, m_q, dq1 * scale, dq2 * scale, D, D1, D2)
