"""Column sums of the attention map; saccade/reference/attention_columns.py is the specification.

A program takes a tile of keys of one head and streams the queries past it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch
from saccade._triton.attention_map import SIZES, arguments, queries_at, tile_of
from saccade._triton.attention_tile import load_parts, products


@triton.jit(do_not_specialize=SIZES)
def attention_columns_kernel(
    q_ptr, k_ptr, row_ptr, key_bias_ptr, lse_ptr, out_ptr,
    heads, group, tiles, q_len, k_len, row_count, scale, key_bias_stride,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    first = i_tile * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)
    m_k = (j < k_len)[:, None]
    p_q = q_ptr + (i_b * q_stride_b + i_h * q_stride_h) * ALIGN
    p_key = k_ptr + (i_b * k_stride_b + i_h // group * k_stride_h + j[:, None].to(tl.int64) * k_stride_s) * ALIGN
    if CHUNK == 0:
        k1, k2 = load_parts(p_key, m_k, D, D1, D2, True)
    else:
        k1, k2 = j, j
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = 0
    if CAUSAL and not HAS_ROWS:  # queries before see none of these keys
        begin = tl.maximum(first - (k_len - q_len), 0) // BLOCK_M * BLOCK_M
    for start in range(begin, row_count, BLOCK_M):
        r = start + tl.arange(0, BLOCK_M)
        query, m_q, sees = queries_at(row_ptr, r, row_count, q_len, k_len, CAUSAL, HAS_ROWS)
        p_row = p_q + query[:, None] * q_stride_s * ALIGN
        if CHUNK == 0:
            q1, q2 = load_parts(p_row, m_q[:, None], D, D1, D2, True)
        else:
            q1, q2 = k1, k2
        s = products(q1, q2, p_row, m_q[:, None], k1, k2, p_key, m_k, D, D2, CHUNK, BLOCK_M, BLOCK_N) * scale
        if HAS_KEY_BIAS:
            s += tl.load(key_bias_ptr + i_b * key_bias_stride + j, mask=j < k_len, other=0.0)[None, :]
        lse = tl.load(lse_ptr + rest.to(tl.int64) * row_count + r, mask=r < row_count, other=float("-inf"))
        visible = (j[None, :] < sees[:, None]) & (lse != float("-inf"))[:, None] & (s != float("-inf"))
        total += tl.where(visible, tl.exp(s - lse[:, None]), 0.0)
    total = tl.sum(tl.reshape(total, (BLOCK_M // 8, 8, BLOCK_N)), 1)
    tl.store(out_ptr + rest.to(tl.int64) * k_len + j, tl.sum(total, 0), mask=j < k_len)


def attention_columns(q, k, lse, rows, key_bias, causal, scale):
    """[B, H, Sk] fp32."""
    out = q.new_empty((*q.shape[:2], k.shape[2]), dtype=launch.float32())
    if out.numel():
        tiles = -(-k.shape[2] // tile_of(q).columns)
        with launch.on_device(q):
            attention_columns_kernel[(q.shape[0] * q.shape[1] * tiles,)](
                lse_ptr=lse.contiguous(),
                out_ptr=out,
                tiles=tiles,
                **arguments(q, k, rows, key_bias, causal, scale, out),
            )
    return out
