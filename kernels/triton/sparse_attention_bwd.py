"""Gradient of sparse_attention; saccade/reference/sparse_attention.py is the specification.

Three launches: delta, then dK and dV along the lists by key block, then dQ along the lists by query block. Nothing is added by two
programs, so a sum has one order. A row that is not finite has a delta of NaN; in blocks seen in part it is read as 0, and NaN goes to
those that see it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import attention_launch, launch
from saccade._triton.attention_configs import dk_dv_tile, dq_tile
from saccade._triton.attention_flags import row_flags
from saccade._triton.attention_tile import (
    BITS,
    LOG2E,
    OPTIONS,
    SIZES,
    WHOLE,
    add_products,
    list_of,
    load_lse,
    load_parts,
    operand,
    products,
    rows_at,
    shown,
    store_parts,
    tokens_at,
    zero_parts,
)
from saccade._triton.sparse_attention_bwd_dq import attention_dq_kernel

TILE = 4096  # elements of a tile of the first kernel


@triton.jit(do_not_specialize=SIZES)
def attention_delta_kernel(
    dout_ptr, out_ptr, q_ptr, dlse_ptr, delta_ptr, heads, tiles, q_len,
    dout_stride_b, dout_stride_h, dout_stride_s, out_stride_b, out_stride_h, out_stride_s, q_stride_b, q_stride_h, q_stride_s,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr, HAS_DLSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse; NaN where a row of dout or q is not finite."""
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    i = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = (i < q_len)[:, None]
    p_dout = dout_ptr + (i_b * dout_stride_b + i_h * dout_stride_h + i[:, None] * dout_stride_s) * ALIGN
    p_out = out_ptr + (i_b * out_stride_b + i_h * out_stride_h + i[:, None] * out_stride_s) * ALIGN
    p_q = q_ptr + (i_b * q_stride_b + i_h * q_stride_h + i[:, None] * q_stride_s) * ALIGN
    g1, g2 = load_parts(p_dout, m, D, D1, D2, True)
    o1, o2 = load_parts(p_out, m, D, D1, D2, True)
    q1, q2 = load_parts(p_q, m, D, D1, D2, True)
    delta = tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1) + tl.sum((g1.to(tl.float32) + q1.to(tl.float32)) * 0.0, 1)
    if D2 > 0:
        delta += tl.sum(g2.to(tl.float32) * o2.to(tl.float32), 1) + tl.sum(
            (g2.to(tl.float32) + q2.to(tl.float32)) * 0.0, 1
        )
    p = (i_b * heads + i_h) * q_len + i
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + p, mask=i < q_len, other=0.0)
    tl.store(delta_ptr + p, delta, mask=i < q_len)


@triton.jit
def add_keys(
    dk1, dk2, dv1, dv2, dkey_bias, k1, k2, v1, v2, p_key, p_value, m_k, p_q, p_dout, p_lse, p_delta, p_bias, key_bias,
    p_q_order, p_box, p_at, p_bits, key, j, column, key_first, first, origin,
    q_len, q_stride_s, dout_stride_s, bias_stride_s, q_positions, k_positions, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BIAS_ALIGN: tl.constexpr,
    K_BLOCK: tl.constexpr, SEEN: tl.constexpr, AXES: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the queries at positions origin .. origin + BLOCK_M - 1 give to the keys of this program; tiles are [keys, queries]."""
    row = tl.arange(0, BLOCK_M)
    i = origin + row
    query, exists = tokens_at(p_q_order, i, q_len, HAS_Q_ORDER)
    delta = tl.load(p_delta + query, mask=exists, other=0.0)
    lse = load_lse(p_lse + query, exists)
    keep = exists
    if MASKED:
        good = tl.abs(delta) < float("inf")
        keep = keep & good
    p_query = rows_at(p_q, query, origin, row, q_stride_s, ALIGN, HAS_Q_ORDER or WIDE)
    p_grad = rows_at(p_dout, query, origin, row, dout_stride_s, ALIGN, HAS_Q_ORDER or WIDE)
    q1, q2 = load_parts(p_query, keep[:, None], D, D1, D2, True)
    s = products(k1, k2, p_key, m_k, q1, q2, p_query, keep[:, None], D, D2, CHUNK, BLOCK_N, BLOCK_M) * scale
    if HAS_BIAS:
        p = p_bias + (query * bias_stride_s * BIAS_ALIGN)[None, :] + key
        s += tl.load(p, mask=m_k & exists[None, :], other=0.0).to(tl.float32)
    if HAS_KEY_BIAS:
        s += key_bias
    w = tl.exp2((s - lse[None, :]) * LOG2E)
    if MASKED:
        visible = shown(
            p_box, p_at, p_bits, i[None, :], j, (first + row)[None, :], column, key_first, q_positions, k_positions,
            SEEN, AXES, K_BLOCK, BLOCK_N,
        )  # fmt: skip
        visible = visible & exists[None, :]
        w = tl.where(visible, w + tl.where(good | (lse == float("inf")), 0.0, float("nan"))[None, :], 0.0)
    g1, g2 = load_parts(p_grad, keep[:, None], D, D1, D2, True)
    dv1, dv2 = add_products(dv1, dv2, operand(w, p_dout), g1, g2, D2)
    dw = products(v1, v2, p_value, m_k, g1, g2, p_grad, keep[:, None], D, D2, CHUNK, BLOCK_N, BLOCK_M)
    ds = w * (dw - delta[None, :])
    if MASKED:
        ds = tl.where(visible, ds, 0.0)
    dk1, dk2 = add_products(dk1, dk2, operand(ds, p_q), q1, q2, D2)
    if HAS_KEY_BIAS:
        dkey_bias += tl.sum(ds, 1)[:, None]
    return dk1, dk2, dv1, dv2, dkey_bias


@triton.jit(do_not_specialize=SIZES)
def attention_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, dkey_bias_ptr, bias_ptr, key_bias_ptr,
    starts_ptr, counts_ptr, indices_ptr, p_starts_ptr, p_counts_ptr, p_indices_ptr, p_ids_ptr, bits_ptr, box_ptr, at_ptr,
    q_order_ptr, k_order_ptr,
    kv_heads, group, tiles, q_len, k_len, q_positions, k_positions, scale,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s, dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    bias_stride_b, bias_stride_h, bias_stride_s, key_bias_stride, list_stride_b, list_stride_h,
    box_stride_b, box_stride_h, at_stride_b, at_stride_h,
    q_order_stride_b, q_order_stride_h, k_order_stride_b, k_order_stride_h,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BIAS_ALIGN: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, SEEN: tl.constexpr, AXES: tl.constexpr,
    HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one key head; the lists are those by key block. The heads of a group come one after the other."""
    STEPS: tl.constexpr = Q_BLOCK // BLOCK_M
    MASKED_STEPS: tl.constexpr = Q_BLOCK // MASKED_M
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_kh, i_b = (rest % kv_heads).to(tl.int64), (rest // kv_heads).to(tl.int64)
    i_block = i_tile // (K_BLOCK // BLOCK_N)
    key_first = i_tile % (K_BLOCK // BLOCK_N) * BLOCK_N
    column = key_first + tl.arange(0, BLOCK_N)[:, None]  # within the block
    j = i_block * K_BLOCK + column
    key, m_k = tokens_at(k_order_ptr + i_b * k_order_stride_b + i_kh * k_order_stride_h, j, k_len, HAS_K_ORDER)
    p_key = k_ptr + (i_b * k_stride_b + i_kh * k_stride_h + key * k_stride_s) * ALIGN
    p_value = v_ptr + (i_b * v_stride_b + i_kh * v_stride_h + key * v_stride_s) * ALIGN
    key_bias = tl.zeros((BLOCK_N, 1), tl.float32)
    if HAS_KEY_BIAS:
        key_bias = tl.load(key_bias_ptr + i_b * key_bias_stride + key, mask=m_k, other=0.0)
    if CHUNK == 0:
        k1, k2 = load_parts(p_key, m_k, D, D1, D2, True)
        v1, v2 = load_parts(p_value, m_k, D, D1, D2, True)
    else:
        k1, k2, v1, v2 = column, column, column, column
    dk1, dk2 = zero_parts(BLOCK_N, D1, D2)
    dv1, dv2 = zero_parts(BLOCK_N, D1, D2)
    for i_h in range(i_kh * group, (i_kh + 1) * group):
        p_q = q_ptr + (i_b * q_stride_b + i_h * q_stride_h) * ALIGN
        p_dout = dout_ptr + (i_b * dout_stride_b + i_h * dout_stride_h) * ALIGN
        i_row = (i_b * kv_heads * group + i_h) * q_len
        p_lse, p_delta = lse_ptr + i_row, delta_ptr + i_row
        p_bias = bias_ptr + (i_b * bias_stride_b + i_h * bias_stride_h) * BIAS_ALIGN
        p_q_order = q_order_ptr + i_b * q_order_stride_b + i_h * q_order_stride_h
        p_box, p_at = box_ptr + i_b * box_stride_b + i_h * box_stride_h, at_ptr + i_b * at_stride_b + i_h * at_stride_h
        dkey_bias = tl.zeros((BLOCK_N, 1), tl.float32)
        i_list = i_b * list_stride_b + i_h * list_stride_h + i_block
        start, count = list_of(starts_ptr, counts_ptr, i_list, True)
        for n in range(0, count * STEPS):
            first = n % STEPS * BLOCK_M
            origin = tl.load(indices_ptr + start + n // STEPS) * Q_BLOCK + first
            dk1, dk2, dv1, dv2, dkey_bias = add_keys(
                dk1, dk2, dv1, dv2, dkey_bias, k1, k2, v1, v2, p_key, p_value, m_k, p_q, p_dout, p_lse, p_delta, p_bias, key_bias,
                p_q_order, p_box, p_at, bits_ptr, key, j, column, key_first, first, origin,
                q_len, q_stride_s, dout_stride_s, bias_stride_s, q_positions, k_positions, scale,
                D, D1, D2, CHUNK, ALIGN, WIDE, BIAS_ALIGN, K_BLOCK, SEEN, AXES, HAS_Q_ORDER, HAS_BIAS, HAS_KEY_BIAS,
                False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if SEEN != WHOLE:
            start, count = list_of(p_starts_ptr, p_counts_ptr, i_list, True)
            for n in range(0, count * MASKED_STEPS):
                entry = start + n // MASKED_STEPS
                first = n % MASKED_STEPS * MASKED_M
                origin = tl.load(p_indices_ptr + entry) * Q_BLOCK + first
                p_bits = bits_ptr
                if SEEN == BITS:
                    p_bits += tl.load(p_ids_ptr + entry).to(tl.int64) * (Q_BLOCK * (K_BLOCK // 32))
                dk1, dk2, dv1, dv2, dkey_bias = add_keys(
                    dk1, dk2, dv1, dv2, dkey_bias, k1, k2, v1, v2, p_key, p_value, m_k, p_q, p_dout, p_lse, p_delta, p_bias, key_bias,
                    p_q_order, p_box, p_at, p_bits, key, j, column, key_first, first, origin,
                    q_len, q_stride_s, dout_stride_s, bias_stride_s, q_positions, k_positions, scale,
                    D, D1, D2, CHUNK, ALIGN, WIDE, BIAS_ALIGN, K_BLOCK, SEEN, AXES, HAS_Q_ORDER, HAS_BIAS, HAS_KEY_BIAS,
                    True, MASKED_M, BLOCK_N,
                )  # fmt: skip
        if HAS_KEY_BIAS:
            tl.store(dkey_bias_ptr + (i_b * kv_heads * group + i_h) * k_len + key, dkey_bias, mask=m_k)
    p_dk = dk_ptr + (i_b * dk_stride_b + i_kh * dk_stride_h + key * dk_stride_s) * ALIGN
    p_dv = dv_ptr + (i_b * dv_stride_b + i_kh * dv_stride_h + key * dv_stride_s) * ALIGN
    store_parts(p_dk, m_k, dk1 * scale, dk2 * scale, D, D1, D2)
    store_parts(p_dv, m_k, dv1, dv2, D, D1, D2)


def sparse_attention_bwd(
    dout, dlse, q, k, v, out, lse, starts, counts, indices, p_starts, p_counts, p_indices, p_ids, bits, box, at, q_order, k_order,
    t_starts, t_counts, t_indices, tp_starts, tp_counts, tp_indices, tp_ids, bias, key_bias, q_block, k_block, scale,
):  # fmt: skip
    """dq, dk, dv, dkey_bias [B, H, Sk] fp32 (empty without key_bias), delta [B, H, Sq] fp32."""
    batch, heads, q_len = q.shape[:3]
    kv_heads, k_len = k.shape[1:3]
    group = heads // max(kv_heads, 1)
    dq, dk, dv = (launch.empty_like(x) for x in (q, k, v))
    delta = lse.new_empty(q.shape[:3])
    tables = bits, box, at, q_order, k_order
    layout = attention_launch.layout_of(starts, counts, indices, p_starts, p_counts, p_indices, p_ids, *tables)
    by_key = attention_launch.layout_of(
        t_starts, t_counts, t_indices, tp_starts, tp_counts, tp_indices, tp_ids, *tables
    )
    dkey_bias = lse.new_empty((0,) if key_bias is None else (batch, heads, k_len))
    if k_order is not None:  # tokens that are at no position
        dk.zero_(), dv.zero_(), dkey_bias.zero_()
    lse, dlse = lse.contiguous(), delta if dlse is None else dlse.contiguous()
    align = attention_launch.alignment(dout, q, k, v, out, dq, dk, dv)
    common = {
        "q_len": q_len, "k_len": k_len, "group": group, "scale": scale, "ALIGN": align, "WIDE": attention_launch.wide(q, k, v, dout),
        **launch.stride_args(align, q=q, k=k, v=v, dout=dout), **attention_launch.bias_args(bias, key_bias, q, lse),
        **attention_launch.multiplied_parts(q, backward=True),
    }  # fmt: skip
    with launch.on_device(q):
        if q.numel():
            rows = min(64, TILE // launch.power_of_two(q.shape[3]))
            tiles = -(-q_len // rows)
            attention_delta_kernel[(batch * heads * tiles,)](
                dout, out, q, dlse, delta, heads=heads, tiles=tiles, q_len=q_len,
                **launch.stride_args(align, dout=dout, out=out, q=q), **attention_launch.head_parts(q.shape[3]), ALIGN=align,
                HAS_DLSE=dlse is not delta, ROWS=rows, num_warps=4, **OPTIONS,
            )  # fmt: skip
        if k.numel():
            tile = dk_dv_tile(q, bias is not None)
            tiles = layout.k_blocks(k_len, k_block) * (k_block // tile.columns)
            attention_dk_dv_kernel[(batch * kv_heads * tiles,)](
                q, k, v, dout, dk, dv, lse, delta, dkey_bias if key_bias is not None else delta, kv_heads=kv_heads, tiles=tiles,
                **launch.stride_args(align, dk=dk, dv=dv), **attention_launch.layout_args(by_key, layout.q_blocks, k_len, q_block, k_block),
                **common, BLOCK_M=tile.rows, BLOCK_N=tile.columns, MASKED_M=tile.masked_rows, **tile.options(), **OPTIONS,
            )  # fmt: skip
        if q.numel():
            tile = dq_tile(q, bias is not None)
            tiles = layout.q_blocks * (q_block // tile.rows)
            bad = delta if layout.seen == attention_launch.NONE else row_flags(k, align)
            attention_dq_kernel[(batch * heads * tiles,)](
                q, k, v, dout, dq, lse, delta, bad, heads=heads, tiles=tiles, **launch.stride_args(align, dq=dq),
                **attention_launch.layout_args(layout, layout.q_blocks, k_len, q_block, k_block), **common,
                BLOCK_M=tile.rows, BLOCK_N=tile.columns, MASKED_N=tile.masked_columns, **tile.options(), **OPTIONS,
            )  # fmt: skip
    return dq, dk, dv, dkey_bias, delta
