"""Gradient of axial_attention; saccade/reference/axial_attention.py is the specification.

Rows of the prefix are queries and keys in every box: their gradients are terms, one a box, that the last kernel sums. A prefix query that
sees all tokens has in every box the keys of that box, and those of the prefix in box 0. Nothing is added by two programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import attention_launch, axial_tile, launch
from saccade._triton.attention_configs import architecture
from saccade._triton.attention_tile import (
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

ROWS = 64  # of a program of the first kernel
TERM_ROWS = 32  # terms that the last kernel sums at once
BLOCKS = {
    32: Block(32, 64, 4), 64: Block(32, 64, 4), 128: Block(32, 64, 8), 256: Block(16, 64, 8, 1, 255),
}  # fmt: skip
# In place of those before sm_90, where registers are what they lack; of 128 those of heads that are padded to it.
EARLIER = {64: Block(32, 32, 4), 128: Block(16, 32, 8, 1), 256: Block(16, 32, 8, 1)}
FP32_BLOCKS = {**{n: Block(16, 32, 8) for n in (32, 64, 128)}, 256: Block(16, 16, 8)}
DQ_BLOCKS = {
    32: Block(64, 64, 4), 64: Block(64, 64, 4), 128: Block(64, 32, 8), 256: Block(64, 16, 8, 1, 255),
}  # fmt: skip
FP32_DQ_BLOCKS = {n: Block(32, 16, 4, 2, 255) for n in (32, 64, 128, 256)}


def _block(q, narrow_table, fp32_table) -> Block:
    return (fp32_table if q.element_size() == 4 else narrow_table)[max(32, launch.power_of_two(q.shape[3]))]


@triton.jit(do_not_specialize=SIZES)
def axial_delta_kernel(
    dout_ptr, out_ptr, delta_ptr, heads, tiles, rows, prefix, share,
    dout_stride_b, dout_stride_h, dout_stride_s, out_stride_b, out_stride_h, out_stride_s,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta [B, H, rows] = rowsum(dout * out) * share; TERMS: rows are terms of prefix queries, `prefix` of them for every box."""
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    i = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = (i < rows)[:, None]
    i_dout = i
    if TERMS:
        i_dout = i % prefix
        p_out = out_ptr + ((i_b * heads + i_h) * rows + i[:, None]) * D
    else:
        p_out = out_ptr + (i_b * out_stride_b + i_h * out_stride_h + i[:, None] * out_stride_s) * ALIGN
    p_dout = dout_ptr + (i_b * dout_stride_b + i_h * dout_stride_h + i_dout[:, None] * dout_stride_s) * ALIGN
    g1, g2 = load_parts(p_dout, m, D, D1, D2, True)
    o1, o2 = load_parts(p_out, m, D, D1, D2, True)
    delta = tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    if D2 > 0:
        delta += tl.sum(g2.to(tl.float32) * o2.to(tl.float32), 1)
    tl.store(delta_ptr + (i_b * heads + i_h) * rows + i, delta * share, mask=i < rows)


@triton.jit
def of_queries(p_lse, p_delta, p_group_lse, p_group_delta, i, token, i_term, exists, prefix, share, MEAN: tl.constexpr):
    """lse (+inf for a query that sees nothing or is not there), delta and the share of dout of rows i of a box."""
    alone = exists
    if MEAN:
        alone = exists & (i >= prefix)
    lse = tl.load(p_lse + token, mask=alone, other=float("inf"))
    delta = tl.load(p_delta + token, mask=alone, other=0.0)
    factor = tl.full(i.shape, 1.0, tl.float32)
    if MEAN:
        term = exists & (i < prefix)
        lse = tl.where(term, tl.load(p_group_lse + i_term, mask=term, other=0.0), lse)
        delta = tl.where(term, tl.load(p_group_delta + i_term, mask=term, other=0.0), delta)
        factor = tl.where(i < prefix, share, 1.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), delta, factor


@triton.jit(do_not_specialize=SIZES)
def axial_packed_bwd_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, group_lse_ptr, group_delta_ptr,
    dq_term_ptr, dk_term_ptr, dv_term_ptr, heads, tokens, tiles, groups, slots, per_tile,
    prefix, size_t, size_h, size_w, box_t, box_h, box_w, scale, share,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s, dq_stride_b, dq_stride_h, dq_stride_s, dk_stride_b, dk_stride_h, dk_stride_s,
    dv_stride_b, dv_stride_h, dv_stride_s,
    D: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of whole boxes, as axial_packed_kernel has it. Rows that are not finite are read as 0, and NaN goes to what they see."""
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    token, exists, slot, i_g, own = packed_rows(
        i_tile, prefix, size_t, size_h, size_w, box_t, box_h, box_w, groups, slots, per_tile, ROWS
    )
    m = exists[:, None]
    at = token[:, None]
    p_q = q_ptr + (i_b * q_stride_b + i_h * q_stride_h + at * q_stride_s) * ALIGN
    p_k = k_ptr + (i_b * k_stride_b + i_h * k_stride_h + at * k_stride_s) * ALIGN
    p_v = v_ptr + (i_b * v_stride_b + i_h * v_stride_h + at * v_stride_s) * ALIGN
    p_dout = dout_ptr + (i_b * dout_stride_b + i_h * dout_stride_h + at * dout_stride_s) * ALIGN
    p_dq = dq_ptr + (i_b * dq_stride_b + i_h * dq_stride_h + at * dq_stride_s) * ALIGN
    p_dk = dk_ptr + (i_b * dk_stride_b + i_h * dk_stride_h + at * dk_stride_s) * ALIGN
    p_dv = dv_ptr + (i_b * dv_stride_b + i_h * dv_stride_h + at * dv_stride_s) * ALIGN
    s = tl.zeros((ROWS, ROWS), tl.float32)
    dw = tl.zeros((ROWS, ROWS), tl.float32)
    bad_query = tl.zeros((ROWS,), tl.float32)
    bad_key = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        q = values(tl.load(p_q + column, mask=m & (column < D), other=0.0))
        k = values(tl.load(p_k + column, mask=m & (column < D), other=0.0))
        s = tl.dot(q, tl.trans(k), s, input_precision="ieee")
        g = values(tl.load(p_dout + column, mask=m & (column < D), other=0.0))
        v = values(tl.load(p_v + column, mask=m & (column < D), other=0.0))
        dw = tl.dot(g, tl.trans(v), dw, input_precision="ieee")
        bad_query += tl.sum(q.to(tl.float32) * 0.0 + g.to(tl.float32) * 0.0, 1)
        bad_key += tl.sum(k.to(tl.float32) * 0.0 + v.to(tl.float32) * 0.0, 1)
    i_row = i_b * heads + i_h
    term = (i_row * groups + i_g) * prefix + slot
    p_lse, p_delta = lse_ptr + i_row * tokens, delta_ptr + i_row * tokens
    lse, delta, factor = of_queries(
        p_lse, p_delta, group_lse_ptr, group_delta_ptr, slot, token, term, exists, prefix, share, MEAN
    )
    visible = (own[:, None] == own[None, :]) & exists[None, :] & m
    if not MEAN:
        visible = visible & ((slot >= prefix)[:, None] | (slot >= prefix)[None, :] | (i_g == 0)[:, None])
    w = tl.exp2((s * scale - lse[:, None]) * LOG2E) + bad_query[:, None] + bad_key[None, :]
    w = tl.where(visible, w, 0.0)
    dw = dw * factor[:, None]
    # All keys of a query are here, but for prefix queries that see all tokens.
    own_delta = tl.sum(tl.where(visible, w * dw, 0.0), 1)
    if MEAN:
        delta = own_delta
    else:
        delta = tl.where(slot >= prefix, own_delta, delta)
    ds = tl.where(visible, w * (dw - delta[:, None]), 0.0)
    ds = operand(ds, q_ptr)
    w = operand(w * factor[:, None], q_ptr)
    written, terms = (exists & (slot >= prefix))[:, None], (exists & (slot < prefix))[:, None]
    keep_query, keep_key = (exists & (bad_query == 0))[:, None], (exists & (bad_key == 0))[:, None]
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = column < D
        p_term = term[:, None] * D + column
        k = values(tl.load(p_k + column, mask=keep_key & inside, other=0.0))
        dq = tl.dot(ds, k, input_precision="ieee") * scale
        tl.store(p_dq + column, narrow(dq, dq_ptr.dtype.element_ty), mask=written & inside)
        tl.store(dq_term_ptr + p_term, dq, mask=terms & inside)
        q = values(tl.load(p_q + column, mask=keep_query & inside, other=0.0))
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * scale
        tl.store(p_dk + column, narrow(dk, dk_ptr.dtype.element_ty), mask=written & inside)
        tl.store(dk_term_ptr + p_term, dk, mask=terms & inside)
        g = values(tl.load(p_dout + column, mask=keep_query & inside, other=0.0))
        dv = tl.dot(tl.trans(w), g, input_precision="ieee")
        tl.store(p_dv + column, narrow(dv, dv_ptr.dtype.element_ty), mask=written & inside)
        tl.store(dv_term_ptr + p_term, dv, mask=terms & inside)


@triton.jit(do_not_specialize=SIZES)
def axial_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, group_lse_ptr, group_delta_ptr,
    dk_term_ptr, dv_term_ptr, heads, tokens, tiles, groups,
    prefix, size_t, size_h, size_w, box_t, box_h, box_w, scale, share,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s, dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of keys of one box; tiles of scores are [keys, queries]."""
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_g, rest = rest % groups, rest // groups
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    t, y, x, box_t, box_h, box_w = box_at(i_g, size_t, size_h, size_w, box_t, box_h, box_w)
    rows = prefix + box_t * box_h * box_w
    j = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key = token_at(j, prefix, t, y, x, box_h, box_w, size_h, size_w)
    m_k = (j < rows)[:, None]
    at = key[:, None]
    p_key = k_ptr + (i_b * k_stride_b + i_h * k_stride_h + at * k_stride_s) * ALIGN
    p_value = v_ptr + (i_b * v_stride_b + i_h * v_stride_h + at * v_stride_s) * ALIGN
    p_q = q_ptr + (i_b * q_stride_b + i_h * q_stride_h) * ALIGN
    p_dout = dout_ptr + (i_b * dout_stride_b + i_h * dout_stride_h) * ALIGN
    i_row = i_b * heads + i_h
    i_first = (i_row * groups + i_g) * prefix
    if CHUNK == 0:
        k1, k2 = load_parts(p_key, m_k, D, D1, D2, True)
        v1, v2 = load_parts(p_value, m_k, D, D1, D2, True)
    else:
        k1, k2, v1, v2 = j, j, j, j
    dk1, dk2 = zero_parts(BLOCK_N, D1, D2)
    dv1, dv2 = zero_parts(BLOCK_N, D1, D2)
    for start in range(0, rows, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        query = token_at(i, prefix, t, y, x, box_h, box_w, size_h, size_w)
        exists = i < rows
        lse, delta, factor = of_queries(
            lse_ptr + i_row * tokens, delta_ptr + i_row * tokens, group_lse_ptr, group_delta_ptr, i, query, i_first + i,
            exists, prefix, share, MEAN,
        )  # fmt: skip
        p_query, p_grad = p_q + query[:, None] * (q_stride_s * ALIGN), p_dout + query[:, None] * (dout_stride_s * ALIGN)
        q1, q2 = load_parts(p_query, exists[:, None], D, D1, D2, True)
        s = products(k1, k2, p_key, m_k, q1, q2, p_query, exists[:, None], D, D2, CHUNK, BLOCK_N, BLOCK_M) * scale
        w = tl.exp2((s - lse[None, :]) * LOG2E)
        visible = exists[None, :]
        if not MEAN:
            visible = visible & ((i >= prefix)[None, :] | (j >= prefix)[:, None] | (i_g == 0))
        w = tl.where(visible, w, 0.0)
        g1, g2 = load_parts(p_grad, exists[:, None], D, D1, D2, True)
        dv1, dv2 = add_products(dv1, dv2, operand(w * factor[None, :], q_ptr), g1, g2, D2)
        dw = products(v1, v2, p_value, m_k, g1, g2, p_grad, exists[:, None], D, D2, CHUNK, BLOCK_N, BLOCK_M)
        ds = tl.where(visible, w * (dw * factor[None, :] - delta[None, :]), 0.0)
        dk1, dk2 = add_products(dk1, dk2, operand(ds, q_ptr), q1, q2, D2)
    written, terms = ((j < rows) & (j >= prefix))[:, None], (j < prefix)[:, None]
    dk1, dk2 = dk1 * scale, dk2 * scale
    store_parts(
        dk_ptr + (i_b * dk_stride_b + i_h * dk_stride_h + at * dk_stride_s) * ALIGN, written, dk1, dk2, D, D1, D2
    )
    store_parts(
        dv_ptr + (i_b * dv_stride_b + i_h * dv_stride_h + at * dv_stride_s) * ALIGN, written, dv1, dv2, D, D1, D2
    )
    store_terms(dk_term_ptr + (i_first + j)[:, None] * D, terms, dk1, dk2, D, D1, D2)
    store_terms(dv_term_ptr + (i_first + j)[:, None] * D, terms, dv1, dv2, D, D1, D2)


@triton.jit(do_not_specialize=SIZES)
def axial_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, lse_ptr, delta_ptr, group_lse_ptr, group_delta_ptr, dq_term_ptr,
    heads, tokens, tiles, groups, prefix, size_t, size_h, size_w, box_t, box_h, box_w, scale, share,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s, dq_stride_b, dq_stride_h, dq_stride_s,
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
    query = token_at(i, prefix, t, y, x, box_h, box_w, size_h, size_w)
    exists = i < rows
    m_q = exists[:, None]
    p_query = q_ptr + (i_b * q_stride_b + i_h * q_stride_h + query[:, None] * q_stride_s) * ALIGN
    p_grad = dout_ptr + (i_b * dout_stride_b + i_h * dout_stride_h + query[:, None] * dout_stride_s) * ALIGN
    p_k = k_ptr + (i_b * k_stride_b + i_h * k_stride_h) * ALIGN
    p_v = v_ptr + (i_b * v_stride_b + i_h * v_stride_h) * ALIGN
    i_row = i_b * heads + i_h
    i_term = (i_row * groups + i_g) * prefix + i
    lse, delta, factor = of_queries(
        lse_ptr + i_row * tokens, delta_ptr + i_row * tokens, group_lse_ptr, group_delta_ptr, i, query, i_term, exists, prefix,
        share, MEAN,
    )  # fmt: skip
    if CHUNK == 0:
        q1, q2 = load_parts(p_query, m_q, D, D1, D2, True)
        g1, g2 = load_parts(p_grad, m_q, D, D1, D2, True)
    else:
        q1, q2, g1, g2 = i, i, i, i
    dq1, dq2 = zero_parts(BLOCK_M, D1, D2)
    for start in range(0, rows, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        key = token_at(j, prefix, t, y, x, box_h, box_w, size_h, size_w)
        m_k = (j < rows)[:, None]
        p_key, p_value = p_k + key[:, None] * (k_stride_s * ALIGN), p_v + key[:, None] * (v_stride_s * ALIGN)
        k1, k2 = load_parts(p_key, m_k, D, D1, D2, True)
        s = products(q1, q2, p_query, m_q, k1, k2, p_key, m_k, D, D2, CHUNK, BLOCK_M, BLOCK_N) * scale
        w = tl.exp2((s - lse[:, None]) * LOG2E)
        if CHUNK == 0:
            v1, v2 = load_parts(p_value, m_k, D, D1, D2, True)
        else:
            v1, v2 = k1, k2
        dw = products(g1, g2, p_grad, m_q, v1, v2, p_value, m_k, D, D2, CHUNK, BLOCK_M, BLOCK_N)
        visible = (j < rows)[None, :] & m_q
        if not MEAN:
            visible = visible & ((i >= prefix)[:, None] | (j >= prefix)[None, :] | (i_g == 0))
        ds = tl.where(visible, w * (dw * factor[:, None] - delta[:, None]), 0.0)
        dq1, dq2 = add_products(dq1, dq2, operand(ds, q_ptr), k1, k2, D2)
    written, terms = (exists & (i >= prefix))[:, None], (i < prefix)[:, None]
    dq1, dq2 = dq1 * scale, dq2 * scale
    p_dq = dq_ptr + (i_b * dq_stride_b + i_h * dq_stride_h + query[:, None] * dq_stride_s) * ALIGN
    store_parts(p_dq, written, dq1, dq2, D, D1, D2)
    store_terms(dq_term_ptr + i_term[:, None] * D, terms, dq1, dq2, D, D1, D2)


@triton.jit(do_not_specialize=SIZES)
def axial_sum_kernel(
    x_ptr, term_ptr, heads, parts, prefix, x_stride_b, x_stride_h, x_stride_s,
    D: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of the prefix: the sum of its terms."""
    i_p, rest = tl.program_id(0) % prefix, tl.program_id(0) // prefix
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, parts, ROWS):
        term = ((i_b * heads + i_h) * parts + start + row) * prefix + i_p
        m = (start + row < parts)[:, None] & (column < D)
        total += tl.load(term_ptr + term[:, None] * D + column, mask=m, other=0.0)
    p_x = x_ptr + (i_b * x_stride_b + i_h * x_stride_h + i_p * x_stride_s) * ALIGN
    tl.store(p_x + column, narrow(tl.sum(total, 0)[None, :], x_ptr.dtype.element_ty), mask=column < D)


def _delta(dout, out, align, rows, prefix, share):
    """[B, H, rows] fp32; `out` may be terms [B, H, G, P, D]."""
    batch, heads = dout.shape[:2]
    terms = out.ndim == 5
    delta = dout.new_empty((batch, heads, rows), dtype=launch.float32())
    rows_of = ROWS if dout.shape[3] * dout.element_size() <= 256 else ROWS // 4
    tiles = -(-rows // rows_of)
    if delta.numel():
        axial_delta_kernel[(batch * heads * tiles,)](
            dout, out, delta, heads=heads, tiles=tiles, rows=rows, prefix=prefix, share=share,
            **launch.stride_args(align, dout=dout, out=dout if terms else out), **attention_launch.head_parts(dout.shape[3]),
            ALIGN=align, TERMS=terms, ROWS=rows_of, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return delta


def axial_attention_bwd(
    dout, q, k, v, out, lse, group_out, group_lse, prefix, t, h, w, bt, bh, bw, mean, scale
):  # fmt: skip
    """dq, dk, dv [B, H, S, D] of q's dtype."""
    batch, heads, tokens, head_dim = q.shape
    shape, warps = shape_of(q, prefix, (t, h, w), (bt, bh, bw)), 8
    if q.element_size() == 2 and head_dim > 64 and architecture(q) < 90:  # registers
        shape, warps = shape._replace(rows=32), 4
    dq, dk, dv = (launch.empty_like(x) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk, dv
    if mean and shape.groups == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    groups = max(shape.groups, 1)  # without boxes the prefix sees itself
    align = attention_launch.alignment(dout, q, k, v, out, dq, dk, dv)
    share = 1.0 / groups
    common = {
        "heads": heads, "tokens": tokens, "scale": scale, "share": share, "ALIGN": align, "MEAN": mean, **shape.sizes,
        **launch.stride_args(align, q=q, k=k, v=v, dout=dout),
    }  # fmt: skip
    with launch.on_device(q):
        delta, group_delta = lse, lse  # not read where there is no need
        if not shape.packed or (prefix and not mean):
            delta = _delta(dout, out, align, tokens, prefix, 1.0)
        if mean:
            group_delta = group_lse if shape.packed else _delta(dout, group_out, align, groups * prefix, prefix, share)
        tables = lse, delta, group_lse if mean else lse, group_delta
        terms = [axial_tile.empty_parts(q, groups, prefix) if prefix else lse for _ in range(3)]
        if shape.packed:
            axial_packed_bwd_kernel[(batch * heads * shape.tiles["tiles"],)](
                q, k, v, dout, dq, dk, dv, *tables, *terms, **common, **shape.tiles, **launch.stride_args(align, dq=dq, dk=dk, dv=dv),
                D=head_dim, COLUMNS=axial_tile.packed_columns(q, 64), num_warps=warps, num_stages=1, **OPTIONS,
            )  # fmt: skip
        else:
            block = _block(q, BLOCKS, FP32_BLOCKS)
            if q.element_size() == 2 and architecture(q) < 90 and head_dim != 128:
                block = EARLIER.get(launch.power_of_two(head_dim), block)
            tiles = axial_tile.row_count(shape, 0, block.keys)
            axial_dk_dv_kernel[(batch * heads * groups * tiles,)](
                q, k, v, dout, dk, dv, *tables, *terms[1:], tiles=tiles, groups=groups, **common,
                **launch.stride_args(align, dk=dk, dv=dv), **axial_tile.parts(q, 128), BLOCK_M=block.queries, BLOCK_N=block.keys,
                **block.options(), **OPTIONS,
            )  # fmt: skip
            block = _block(q, DQ_BLOCKS, FP32_DQ_BLOCKS)
            tiles = axial_tile.row_count(shape, 0, block.queries)
            axial_dq_kernel[(batch * heads * groups * tiles,)](
                q, k, v, dout, dq, *tables, terms[0], tiles=tiles, groups=groups, **common, **launch.stride_args(align, dq=dq),
                **axial_tile.parts(q, 128), BLOCK_M=block.queries, BLOCK_N=block.keys, **block.options(), **OPTIONS,
            )  # fmt: skip
        for x, term in zip((dq, dk, dv) if prefix else (), terms, strict=False):
            axial_sum_kernel[(batch * heads * prefix,)](
                x, term, heads=heads, parts=groups, prefix=prefix, **launch.stride_args(align, x=x), D=head_dim, ALIGN=align,
                ROWS=TERM_ROWS, BLOCK_D=launch.power_of_two(head_dim), num_warps=4, **OPTIONS,
            )  # fmt: skip
    return dq, dk, dv
