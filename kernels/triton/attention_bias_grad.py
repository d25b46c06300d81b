"""Gradient of the bias of sparse_attention; saccade/reference/attention_bias_grad.py is the specification.

A program takes one tile of the bias, and goes through the samples and heads that share it, so their sum has one order. Where an order of
tokens differs between those, the tiles do too: then every sample and head has a launch of its own, which adds to the ones before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import attention_launch, launch
from saccade._triton.attention_configs import bias_grad_tile
from saccade._triton.attention_tile import (
    BITS,
    BOX,
    LOG2E,
    OPTIONS,
    SIZES,
    WHOLE,
    bits_show,
    box_shows,
    list_of,
    load_lse,
    load_parts,
    products,
    tokens_at,
)
from saccade._triton.tile import narrow

ENTRIES = 128  # of a list, looked at at once


@triton.jit
def place_in(p_list, start, count, block, k_blocks, ENTRIES: tl.constexpr):
    """Where `block` stands in an ascending list of distinct blocks, -1 if it does not."""
    found = tl.full((), -1, tl.int32)
    for begin in range(tl.maximum(block - (k_blocks - count), 0), tl.minimum(block + 1, count), ENTRIES):
        n = begin + tl.arange(0, ENTRIES)
        hit = tl.load(p_list + start + n, mask=n < count, other=-1) == block
        found = tl.maximum(found, tl.max(tl.where(hit, n, -1)))
    return found


@triton.jit
def places(
    starts_ptr, counts_ptr, indices_ptr, p_starts_ptr, p_counts_ptr, p_indices_ptr, i_list, block, k_blocks,
    SEEN: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The place of a block in the list of whole ones, and the entry of those seen in part, -1 where it is not."""
    start, count = list_of(starts_ptr, counts_ptr, i_list, True)
    whole = place_in(indices_ptr, start, count, block, k_blocks, ENTRIES)
    entry = tl.full((), -1, tl.int64)
    if SEEN != WHOLE:
        start, count = list_of(p_starts_ptr, p_counts_ptr, i_list, True)
        part = place_in(p_indices_ptr, start, count, block, k_blocks, ENTRIES)
        entry = tl.where(part >= 0, start + part, -1)
    return whole, entry


@triton.jit
def pair_grad(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, key_bias_ptr, p_ids_ptr, bits_ptr, box_ptr, at_ptr,
    bias, i_b, i_h, i_kh, heads, query, m_q, key, m_k, row, i, column, j, first, whole, entry, q_len, q_positions, k_positions, scale,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s, key_bias_stride, box_stride_b, box_stride_h, at_stride_b, at_stride_h,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, SEEN: tl.constexpr, AXES: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS of one sample and head."""
    p_q = q_ptr + (i_b * q_stride_b + i_h * q_stride_h + query * q_stride_s) * ALIGN
    p_k = k_ptr + (i_b * k_stride_b + i_kh * k_stride_h + key * k_stride_s) * ALIGN
    p_v = v_ptr + (i_b * v_stride_b + i_kh * v_stride_h + key * v_stride_s) * ALIGN
    p_dout = dout_ptr + (i_b * dout_stride_b + i_h * dout_stride_h + query * dout_stride_s) * ALIGN
    if CHUNK == 0:
        q1, q2 = load_parts(p_q, m_q, D, D1, D2, True)
        k1, k2 = load_parts(p_k, m_k, D, D1, D2, True)
    else:
        q1, q2, k1, k2 = row, row, row, row
    s = products(q1, q2, p_q, m_q, k1, k2, p_k, m_k, D, D2, CHUNK, BLOCK_M, BLOCK_N) * scale + bias
    if HAS_KEY_BIAS:
        s += tl.load(key_bias_ptr + i_b * key_bias_stride + tl.trans(key), mask=tl.trans(m_k), other=0.0)
    i_row = (i_b * heads + i_h) * q_len + query
    lse = load_lse(lse_ptr + i_row, m_q)
    delta = tl.load(delta_ptr + i_row, mask=m_q, other=0.0)
    w = tl.exp2((s - lse) * LOG2E)
    if CHUNK == 0:
        g1, g2 = load_parts(p_dout, m_q, D, D1, D2, True)
        v1, v2 = load_parts(p_v, m_k, D, D1, D2, True)
    else:
        g1, g2, v1, v2 = row, row, row, row
    dw = products(g1, g2, p_dout, m_q, v1, v2, p_v, m_k, D, D2, CHUNK, BLOCK_M, BLOCK_N)
    ds = w * (dw - delta)
    if SEEN == BOX:
        p_box, p_at = box_ptr + i_b * box_stride_b + i_h * box_stride_h, at_ptr + i_b * at_stride_b + i_h * at_stride_h
        ds = tl.where(whole | box_shows(p_box, p_at, i, j, q_positions, k_positions, AXES), ds, 0.0)
    elif SEEN == BITS:
        i_bits = tl.load(p_ids_ptr + entry, mask=entry >= 0, other=0).to(tl.int64)
        p_bits = bits_ptr + i_bits * (Q_BLOCK * (K_BLOCK // 32))
        ds = tl.where(whole | bits_show(p_bits, row, column, first, K_BLOCK, BLOCK_N), ds, 0.0)
    return ds


@triton.jit(do_not_specialize=SIZES)
def attention_bias_grad_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dbias_ptr, lse_ptr, delta_ptr, bias_ptr, key_bias_ptr,
    starts_ptr, counts_ptr, indices_ptr, p_starts_ptr, p_counts_ptr, p_indices_ptr, p_ids_ptr, bits_ptr, box_ptr, at_ptr,
    q_order_ptr, k_order_ptr,
    heads, group, bias_heads, shared_heads, samples, first_b, first_h, tiles, k_tiles, q_len, k_len, q_positions, k_positions, scale,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s, bias_stride_b, bias_stride_h, bias_stride_s, key_bias_stride,
    list_stride_b, list_stride_h, box_stride_b, box_stride_h, at_stride_b, at_stride_h,
    q_order_stride_b, q_order_stride_h, k_order_stride_b, k_order_stride_h,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, SEEN: tl.constexpr, AXES: tl.constexpr,
    HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
    VARIES: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """VARIES: samples or heads have lists of their own. ADD: to what dbias holds."""
    i_k_tile, rest = tl.program_id(0) % k_tiles, tl.program_id(0) // k_tiles
    i_q_tile, rest = rest % tiles, rest // tiles
    i_bh, i_bb = (rest % bias_heads).to(tl.int64), (rest // bias_heads).to(tl.int64)
    q_block, k_block = i_q_tile // (Q_BLOCK // BLOCK_M), i_k_tile // (K_BLOCK // BLOCK_N)
    first = i_k_tile % (K_BLOCK // BLOCK_N) * BLOCK_N
    row = i_q_tile % (Q_BLOCK // BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = first + tl.arange(0, BLOCK_N)[None, :]
    i, j = q_block * Q_BLOCK + row, k_block * K_BLOCK + column
    own_b, own_h = first_b + i_bb, first_h + i_bh
    p_q_order = q_order_ptr + own_b * q_order_stride_b + own_h * q_order_stride_h
    p_k_order = k_order_ptr + own_b * k_order_stride_b + own_h // group * k_order_stride_h
    query, m_q = tokens_at(p_q_order, i, q_len, HAS_Q_ORDER)
    key, m_k = tokens_at(p_k_order, k_block * K_BLOCK + first + tl.arange(0, BLOCK_N)[:, None], k_len, HAS_K_ORDER)
    m_pair = m_q & tl.trans(m_k)
    p_bias = (
        bias_ptr + (i_bb * bias_stride_b + i_bh * bias_stride_h + query * bias_stride_s) * BIAS_ALIGN + tl.trans(key)
    )
    bias = tl.load(p_bias, mask=m_pair, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    count = samples * shared_heads
    k_blocks = k_positions // K_BLOCK
    if not VARIES:
        whole, entry = places(
            starts_ptr, counts_ptr, indices_ptr, p_starts_ptr, p_counts_ptr, p_indices_ptr,
            q_block, k_block, k_blocks, SEEN, ENTRIES,
        )  # fmt: skip
        count = tl.where((whole >= 0) | (entry >= 0), count, 0)
    for n in range(0, count):
        i_b, i_h = own_b + n // shared_heads, own_h + n % shared_heads
        if VARIES:
            i_list = i_b * list_stride_b + i_h * list_stride_h + q_block
            whole, entry = places(
                starts_ptr, counts_ptr, indices_ptr, p_starts_ptr, p_counts_ptr, p_indices_ptr,
                i_list, k_block, k_blocks, SEEN, ENTRIES,
            )  # fmt: skip
            if (whole >= 0) | (entry >= 0):
                total += pair_grad(
                    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, key_bias_ptr, p_ids_ptr, bits_ptr, box_ptr, at_ptr,
                    bias, i_b, i_h, i_h // group, heads, query, m_q, key, m_k, row, i, column, j, first, whole >= 0, entry,
                    q_len, q_positions, k_positions, scale, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
                    v_stride_b, v_stride_h, v_stride_s, dout_stride_b, dout_stride_h, dout_stride_s, key_bias_stride,
                    box_stride_b, box_stride_h, at_stride_b, at_stride_h, D, D1, D2, CHUNK, ALIGN, Q_BLOCK, K_BLOCK, SEEN, AXES,
                    HAS_KEY_BIAS, BLOCK_M, BLOCK_N,
                )  # fmt: skip
        else:
            total += pair_grad(
                q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, key_bias_ptr, p_ids_ptr, bits_ptr, box_ptr, at_ptr,
                bias, i_b, i_h, i_h // group, heads, query, m_q, key, m_k, row, i, column, j, first, whole >= 0, entry,
                q_len, q_positions, k_positions, scale, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
                v_stride_b, v_stride_h, v_stride_s, dout_stride_b, dout_stride_h, dout_stride_s, key_bias_stride,
                box_stride_b, box_stride_h, at_stride_b, at_stride_h, D, D1, D2, CHUNK, ALIGN, Q_BLOCK, K_BLOCK, SEEN, AXES,
                HAS_KEY_BIAS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    p = dbias_ptr + ((i_bb * bias_heads + i_bh) * q_len + query) * k_len + tl.trans(key)
    if ADD:
        total += tl.load(p, mask=m_pair, other=0.0).to(tl.float32)
    tl.store(p, narrow(total, dbias_ptr.dtype.element_ty), mask=m_pair)


def attention_bias_grad(
    dout, q, k, v, lse, delta, starts, counts, indices, p_starts, p_counts, p_indices, p_ids, bits, box, at, q_order, k_order,
    bias, key_bias, q_block, k_block, scale,
):  # fmt: skip
    """dbias, contiguous, shaped as bias and of its dtype."""
    batch, heads, q_len = q.shape[:3]
    k_len, bias_heads = k.shape[2], bias.shape[1]
    samples, shared_heads = batch // max(bias.shape[0], 1), heads // max(bias_heads, 1)
    orders = [t for t in (q_order, k_order) if t is not None]
    apart = [any(t.shape[axis] > 1 for t in orders) and n > 1 for axis, n in ((0, samples), (1, shared_heads))]
    fresh = bias.new_zeros if any(apart) or k_order is not None else bias.new_empty
    dbias = fresh(bias.shape, dtype=launch.float32() if any(apart) else bias.dtype)
    if dbias.numel() == 0 or q.numel() == 0:
        return dbias.zero_().to(bias.dtype)
    layout = attention_launch.layout_of(
        starts, counts, indices, p_starts, p_counts, p_indices, p_ids, bits, box, at, q_order, k_order
    )
    tile = bias_grad_tile(q)
    tiles = layout.q_blocks * (q_block // tile.rows)
    k_tiles = layout.k_blocks(k_len, k_block) * (k_block // tile.columns)
    align = attention_launch.alignment(dout, q, k, v)
    steps = [(b, h) for b in range(samples if apart[0] else 1) for h in range(shared_heads if apart[1] else 1)]
    with launch.on_device(q):
        for first_b, first_h in steps:
            attention_bias_grad_kernel[(bias.shape[0] * bias_heads * tiles * k_tiles,)](
                q, k, v, dout, dbias, lse.contiguous(), delta.contiguous(), heads=heads, group=heads // k.shape[1], bias_heads=bias_heads,
                shared_heads=1 if apart[1] else shared_heads, samples=1 if apart[0] else samples, first_b=first_b, first_h=first_h,
                tiles=tiles, k_tiles=k_tiles, q_len=q_len, k_len=k_len, scale=scale,
                **launch.stride_args(align, q=q, k=k, v=v, dout=dout),
                **attention_launch.layout_args(layout, layout.q_blocks, k_len, q_block, k_block),
                **attention_launch.bias_args(bias, key_bias, q, lse), **attention_launch.multiplied_parts(q, backward=True), ALIGN=align,
                VARIES=layout.counts.shape[:2] != (1, 1), ADD=any(apart), BLOCK_M=tile.rows, BLOCK_N=tile.columns, ENTRIES=ENTRIES,
                **tile.options(), **OPTIONS,
            )  # fmt: skip
    return dbias.to(bias.dtype)
