"""lse and entropy of rows of the attention map; saccade/reference/attention_rows.py is the specification.

A program takes a tile of queries of one head and streams the keys past it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch
from saccade._triton.attention_map import SIZES, arguments, queries_at, tile_of
from saccade._triton.attention_tile import load_parts, products


@triton.jit(do_not_specialize=SIZES)
def attention_rows_kernel(
    q_ptr, k_ptr, row_ptr, key_bias_ptr, lse_ptr, entropy_ptr,
    heads, group, tiles, q_len, k_len, row_count, scale, key_bias_stride,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    r = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query, m_q, sees = queries_at(row_ptr, r, row_count, q_len, k_len, CAUSAL, HAS_ROWS)
    p_q = q_ptr + (i_b * q_stride_b + i_h * q_stride_h + query[:, None] * q_stride_s) * ALIGN
    p_k = k_ptr + (i_b * k_stride_b + i_h // group * k_stride_h) * ALIGN
    if CHUNK == 0:
        q1, q2 = load_parts(p_q, m_q[:, None], D, D1, D2, True)
    else:
        q1, q2 = r, r
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, tl.max(sees, 0), BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        m_k = (j < k_len)[:, None]
        p_key = p_k + j[:, None].to(tl.int64) * k_stride_s * ALIGN
        if CHUNK == 0:
            k1, k2 = load_parts(p_key, m_k, D, D1, D2, True)
        else:
            k1, k2 = q1, q2
        s = products(q1, q2, p_q, m_q[:, None], k1, k2, p_key, m_k, D, D2, CHUNK, BLOCK_M, BLOCK_N) * scale
        if HAS_KEY_BIAS:
            s += tl.load(key_bias_ptr + i_b * key_bias_stride + j, mask=j < k_len, other=0.0)[None, :]
        s = tl.where(j[None, :] < sees[:, None], s, float("-inf"))
        best = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(best == float("-inf"), 0.0, best)
        x = s - shift[:, None]
        e = tl.exp(x)
        fall = tl.where(top == float("-inf"), 0.0, top - shift)
        shrink = tl.where(top == float("-inf"), 0.0, tl.exp(fall))
        moment = shrink * (moment + total * fall) + tl.sum(tl.where(e == 0.0, 0.0, e * x), 1)
        total = total * shrink + tl.sum(e, 1)
        top = best
    nothing = total == 0.0
    log_total = tl.log(tl.where(nothing, 1.0, total))
    p = rest.to(tl.int64) * row_count + r
    lse = tl.where(nothing, float("-inf"), tl.where(top == float("-inf"), 0.0, top) + log_total)
    tl.store(lse_ptr + p, lse, mask=r < row_count)
    entropy = tl.where(nothing, 0.0, log_total - moment / tl.where(nothing, 1.0, total))
    tl.store(entropy_ptr + p, entropy, mask=r < row_count)


def attention_rows(q, k, rows, key_bias, causal, scale):
    """lse and entropy [B, H, R] fp32."""
    count = q.shape[2] if rows is None else rows.shape[0]
    lse, entropy = (q.new_empty((*q.shape[:2], count), dtype=launch.float32()) for _ in range(2))
    if lse.numel():
        tiles = -(-count // tile_of(q).rows)
        with launch.on_device(q):
            attention_rows_kernel[(q.shape[0] * q.shape[1] * tiles,)](
                lse_ptr=lse, entropy_ptr=entropy, tiles=tiles, **arguments(q, k, rows, key_bias, causal, scale, lse)
            )
    return lse, entropy
