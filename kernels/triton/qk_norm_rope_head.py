"""RMS normalisation over each head, then the rotary embedding: the kernels of `qk_norm_rope` with row=False.

A program takes the heads of one group (or a chunk of them) over one block of tokens, as in apply_rope.
"""

import triton
import triton.language as tl

from saccade._triton import launch
from saccade._triton.parts import (
    added,
    load_parts,
    multiply,
    rotate_parts,
    row_sum,
    rstd,
    scaled,
    store_parts,
    summed,
    widen,
    zeros,
)
from saccade._triton.phase import group_cos_sin
from saccade._triton.tile import head_range, program, row_index


@triton.jit
def _norm_heads(
    p_x, x_stride_h, p_y, y_stride_h, w_ptr, first, last, h_row, m_row, cos, sin, eps,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Heads [first, last) of one tensor. p_x, p_y: [rows, 1], the tokens of head 0."""
    x_stride_h, y_stride_h = x_stride_h.to(tl.int64) * ALIGN, y_stride_h.to(tl.int64) * ALIGN
    if WEIGHT:
        weight = widen(load_parts(w_ptr + tl.zeros((1, 1), tl.int32), True, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST))
    h = first + h_row
    x = load_parts(p_x + h * x_stride_h, m_row & (h < last), D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)
    for _ in range(first, last, BLOCK_H):
        h_next = h + BLOCK_H
        x_next = load_parts(p_x + h_next * x_stride_h, m_row & (h_next < last), D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)
        y = widen(x)
        y = scaled(y, rstd(row_sum(y, y), D, eps)[:, None])
        if WEIGHT:
            y = multiply(y, weight)
        y = rotate_parts(y, cos, sin, INTERLEAVED)
        store_parts(p_y + h * y_stride_h, m_row & (h < last), y, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)
        x, h = x_next, h_next


@triton.jit
def _norm_heads_bwd(
    p_x, x_stride_h, p_dy, dy_stride_h, p_dx, dx_stride_h, w_ptr, partial_ptr, first, last, h_row, m_row, cos, sin, eps,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Heads [first, last) of one tensor. p_x, p_dy, p_dx: [rows, 1], the tokens of head 0."""
    x_stride_h, dy_stride_h = x_stride_h.to(tl.int64) * ALIGN, dy_stride_h.to(tl.int64) * ALIGN
    dx_stride_h = dx_stride_h.to(tl.int64) * ALIGN
    if WEIGHT:
        weight = widen(load_parts(w_ptr + tl.zeros((1, 1), tl.int32), True, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST))
        total = zeros(BLOCK_H * BLOCK_S, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)
    h = first + h_row
    for _ in range(first, last, BLOCK_H):
        m = m_row & (h < last)
        x = widen(load_parts(p_x + h * x_stride_h, m, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST))
        g = widen(load_parts(p_dy + h * dy_stride_h, m, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST))
        g = rotate_parts(g, cos, sin, INTERLEAVED)
        r = rstd(row_sum(x, x), D, eps)[:, None]
        x = scaled(x, r)
        if WEIGHT:
            total = added(total, multiply(g, x))
            g = multiply(g, weight)
        mean = (row_sum(g, x) * (-1.0 / D))[:, None]
        dx = scaled(added(g, scaled(x, mean)), r)
        store_parts(p_dx + h * dx_stride_h, m, dx, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)
        h += BLOCK_H
    if WEIGHT:
        p_partial = partial_ptr + tl.zeros((1, 1), tl.int32)
        store_parts(p_partial, True, summed(total), D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)


@triton.jit(do_not_specialize=launch.SIZES, do_not_specialize_on_alignment=launch.TABLES)
def qk_norm_rope_head_kernel(
    q_ptr, q_out_ptr, k_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, position_ptr, step_ptr, scale, eps,
    tokens, tiles, groups, chunks, q_per_group, k_per_group,
    q_stride_b, q_stride_h, q_stride_s, q_out_stride_b, q_out_stride_h, q_out_stride_s,
    k_stride_b, k_stride_h, k_stride_s, k_out_stride_b, k_out_stride_h, k_out_stride_s,
    position_stride_a, position_stride_b, position_stride_s,
    D: tl.constexpr, R: tl.constexpr, AXES: tl.constexpr, SHIFT: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_K: tl.constexpr, WEIGHT_Q: tl.constexpr, WEIGHT_K: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    i_unit, i_tile, i_b = program(groups * chunks, tiles)
    i_group, i_chunk = i_unit // chunks, i_unit % chunks
    h_row, s_row = row_index(BLOCK_H, BLOCK_S)
    s = i_tile.to(tl.int64) * BLOCK_S + s_row
    m_row = s < tokens
    h_row = h_row.to(tl.int64)
    cos, sin = group_cos_sin(
        position_ptr + i_b * position_stride_b + s * position_stride_s, position_stride_a, m_row,
        step_ptr, i_group, True, groups, scale, R, AXES, SHIFT, BEGIN, END, False, BLOCK_R,
    )  # fmt: skip
    q_first, q_last = head_range(i_chunk, chunks, q_per_group, i_group)
    _norm_heads(
        q_ptr + (i_b * q_stride_b + s * q_stride_s) * ALIGN, q_stride_h,
        q_out_ptr + (i_b * q_out_stride_b + s * q_out_stride_s) * ALIGN, q_out_stride_h,
        q_weight_ptr, q_first, q_last, h_row, m_row, cos, sin, eps,
        D, R, INTERLEAVED, WEIGHT_Q, ALIGN, BLOCK_H, BLOCK_R, BLOCK_REST,
    )  # fmt: skip
    if HAS_K:
        k_first, k_last = head_range(i_chunk, chunks, k_per_group, i_group)
        _norm_heads(
            k_ptr + (i_b * k_stride_b + s * k_stride_s) * ALIGN, k_stride_h,
            k_out_ptr + (i_b * k_out_stride_b + s * k_out_stride_s) * ALIGN, k_out_stride_h,
            k_weight_ptr, k_first, k_last, h_row, m_row, cos, sin, eps,
            D, R, INTERLEAVED, WEIGHT_K, ALIGN, BLOCK_H, BLOCK_R, BLOCK_REST,
        )  # fmt: skip


@triton.jit(do_not_specialize=launch.SIZES, do_not_specialize_on_alignment=launch.TABLES)
def qk_norm_rope_head_bwd_kernel(
    q_ptr, q_dy_ptr, q_dx_ptr, k_ptr, k_dy_ptr, k_dx_ptr, q_weight_ptr, k_weight_ptr, q_partial_ptr, k_partial_ptr,
    position_ptr, step_ptr, scale, eps,
    tokens, tiles, groups, chunks, q_per_group, k_per_group,
    q_stride_b, q_stride_h, q_stride_s, q_dy_stride_b, q_dy_stride_h, q_dy_stride_s, q_dx_stride_b, q_dx_stride_h, q_dx_stride_s,
    k_stride_b, k_stride_h, k_stride_s, k_dy_stride_b, k_dy_stride_h, k_dy_stride_s, k_dx_stride_b, k_dx_stride_h, k_dx_stride_s,
    position_stride_a, position_stride_b, position_stride_s,
    D: tl.constexpr, R: tl.constexpr, AXES: tl.constexpr, SHIFT: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_K: tl.constexpr, WEIGHT_Q: tl.constexpr, WEIGHT_K: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """dx = r (g w - x r^2 mean(g w x)) with g the inverse rotation of dy; partial [programs, D] sums g x r over rows and heads."""
    i_unit, i_tile, i_b = program(groups * chunks, tiles)
    i_group, i_chunk = i_unit // chunks, i_unit % chunks
    h_row, s_row = row_index(BLOCK_H, BLOCK_S)
    s = i_tile.to(tl.int64) * BLOCK_S + s_row
    m_row = s < tokens
    h_row = h_row.to(tl.int64)
    cos, sin = group_cos_sin(
        position_ptr + i_b * position_stride_b + s * position_stride_s, position_stride_a, m_row,
        step_ptr, i_group, True, groups, scale, R, AXES, SHIFT, BEGIN, END, True, BLOCK_R,
    )  # fmt: skip
    i_partial = tl.program_id(0).to(tl.int64) * D
    q_first, q_last = head_range(i_chunk, chunks, q_per_group, i_group)
    _norm_heads_bwd(
        q_ptr + (i_b * q_stride_b + s * q_stride_s) * ALIGN, q_stride_h,
        q_dy_ptr + (i_b * q_dy_stride_b + s * q_dy_stride_s) * ALIGN, q_dy_stride_h,
        q_dx_ptr + (i_b * q_dx_stride_b + s * q_dx_stride_s) * ALIGN, q_dx_stride_h,
        q_weight_ptr, q_partial_ptr + i_partial, q_first, q_last, h_row, m_row, cos, sin, eps,
        D, R, INTERLEAVED, WEIGHT_Q, ALIGN, BLOCK_S, BLOCK_H, BLOCK_R, BLOCK_REST,
    )  # fmt: skip
    if HAS_K:
        k_first, k_last = head_range(i_chunk, chunks, k_per_group, i_group)
        _norm_heads_bwd(
            k_ptr + (i_b * k_stride_b + s * k_stride_s) * ALIGN, k_stride_h,
            k_dy_ptr + (i_b * k_dy_stride_b + s * k_dy_stride_s) * ALIGN, k_dy_stride_h,
            k_dx_ptr + (i_b * k_dx_stride_b + s * k_dx_stride_s) * ALIGN, k_dx_stride_h,
            k_weight_ptr, k_partial_ptr + i_partial, k_first, k_last, h_row, m_row, cos, sin, eps,
            D, R, INTERLEAVED, WEIGHT_K, ALIGN, BLOCK_S, BLOCK_H, BLOCK_R, BLOCK_REST,
        )  # fmt: skip
