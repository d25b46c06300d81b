"""Gradients of `qk_norm_rope` with row=True, in two kernels.

With g the inverse rotation of dy, w the weight and r = 1 / sqrt(mean(x^2) + eps) over all heads of a token,

    dx = r (g w - x r^2 mean(g w x))          dw = sum over tokens of g x r

The first kernel reads x and dy twice (the second time from the cache), writes dx, and r for the second. The second sums g x r
over a run of tokens for a few heads; its partial sums are added up by `sum_rows`.
"""

import triton
import triton.language as tl

from saccade._triton import launch
from saccade._triton.parts import (
    added,
    load_parts,
    multiply,
    parts_sum,
    rotate_parts,
    rstd,
    scaled,
    store_parts,
    summed,
    token_sum,
    widen,
    zeros,
)
from saccade._triton.phase import group_cos_sin
from saccade._triton.tile import program, row_index


@triton.jit(do_not_specialize=launch.SIZES, do_not_specialize_on_alignment=launch.TABLES)
def qk_norm_rope_row_dx_kernel(
    x_ptr, dy_ptr, dx_ptr, weight_ptr, rstd_ptr, position_ptr, step_ptr, scale, eps,
    tokens, tiles, groups,
    x_stride_b, x_stride_h, x_stride_s, dy_stride_b, dy_stride_h, dy_stride_s, dx_stride_b, dx_stride_h, dx_stride_s,
    position_stride_a, position_stride_b, position_stride_s,
    HEADS: tl.constexpr, GROUPED: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, AXES: tl.constexpr, SHIFT: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr,
    INTERLEAVED: tl.constexpr, WEIGHT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One of q and k. rstd [B, S] fp32."""
    _, i_tile, i_b = program(1, tiles)
    h_row, s_row = row_index(BLOCK_H, BLOCK_S)
    s = i_tile.to(tl.int64) * BLOCK_S + s_row
    m_row = s < tokens
    h_row = h_row.to(tl.int64)
    p_position = position_ptr + i_b * position_stride_b + s * position_stride_s
    p_x = x_ptr + (i_b * x_stride_b + s * x_stride_s) * ALIGN
    p_dy = dy_ptr + (i_b * dy_stride_b + s * dy_stride_s) * ALIGN
    p_dx = dx_ptr + (i_b * dx_stride_b + s * dx_stride_s) * ALIGN
    x_h, dy_h, dx_h = (
        x_stride_h.to(tl.int64) * ALIGN,
        dy_stride_h.to(tl.int64) * ALIGN,
        dx_stride_h.to(tl.int64) * ALIGN,
    )
    if not GROUPED:
        cos, sin = group_cos_sin(
            p_position,
            position_stride_a,
            m_row,
            step_ptr,
            i_b * 0,
            True,
            groups,
            scale,
            R,
            AXES,
            SHIFT,
            BEGIN,
            END,
            True,
            BLOCK_R,
        )
    square = zeros(BLOCK_H * BLOCK_S, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)
    cross = zeros(BLOCK_H * BLOCK_S, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)
    r = tl.zeros((BLOCK_H * BLOCK_S, 1), tl.float32)
    slope = r
    for i_pass in tl.static_range(2):  # the sums, then dx
        for first in range(0, HEADS, BLOCK_H):
            h = first + h_row
            m = m_row & (h < HEADS)
            x = widen(load_parts(p_x + h * x_h, m, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST))
            g = widen(load_parts(p_dy + h * dy_h, m, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST))
            if GROUPED:
                own_cos, own_sin = group_cos_sin(
                    p_position, position_stride_a, m_row, step_ptr, h * groups // HEADS, h < HEADS, groups, scale,
                    R, AXES, SHIFT, BEGIN, END, True, BLOCK_R,
                )  # fmt: skip
                g = rotate_parts(g, own_cos, own_sin, INTERLEAVED)
            else:
                g = rotate_parts(g, cos, sin, INTERLEAVED)
            if WEIGHT:
                g = multiply(g, widen(load_parts(weight_ptr + h * D, m, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)))
            if i_pass == 0:
                square = added(square, multiply(x, x))
                cross = added(cross, multiply(g, x))
            else:
                store_parts(
                    p_dx + h * dx_h, m, scaled(added(g, scaled(x, slope)), r), D, R, INTERLEAVED, BLOCK_R, BLOCK_REST
                )
        if i_pass == 0:
            r = rstd(token_sum(parts_sum(square), BLOCK_H, BLOCK_S), HEADS * D, eps)[:, None]
            slope = token_sum(parts_sum(cross), BLOCK_H, BLOCK_S)[:, None] * (-1.0 / (HEADS * D)) * (r * r)
    tl.store(rstd_ptr + i_b * tokens + i_tile.to(tl.int64) * BLOCK_S + s_row, r, mask=m_row & (h_row == 0))


@triton.jit(do_not_specialize=launch.SIZES, do_not_specialize_on_alignment=launch.TABLES)
def qk_norm_rope_row_dw_kernel(
    x_ptr, dy_ptr, rstd_ptr, partial_ptr, position_ptr, step_ptr, scale,
    tokens, tiles, groups, tiles_per_program,
    x_stride_b, x_stride_h, x_stride_s, dy_stride_b, dy_stride_h, dy_stride_s,
    position_stride_a, position_stride_b, position_stride_s,
    HEADS: tl.constexpr, GROUPED: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, AXES: tl.constexpr, SHIFT: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr,
    INTERLEAVED: tl.constexpr, ALIGN: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """partial [B * tiles, HEADS * D] fp32: sums over tiles_per_program blocks of tokens, UNROLL heads a program."""
    i_unit, i_tile, i_b = program((HEADS + UNROLL - 1) // UNROLL, tiles)
    _, s_row = row_index(1, ROWS)
    h0 = i_unit.to(tl.int64) * UNROLL + tl.zeros((1, 1), tl.int64)
    x_h, dy_h = x_stride_h.to(tl.int64) * ALIGN, dy_stride_h.to(tl.int64) * ALIGN
    total = ()
    for _ in tl.static_range(UNROLL):
        total = total + (zeros(ROWS, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST),)
    first = i_tile.to(tl.int64) * tiles_per_program * ROWS
    for i in range(tl.minimum(tiles_per_program, (tokens - first + ROWS - 1) // ROWS)):
        s = first + i * ROWS + s_row
        m_row = s < tokens
        p_position = position_ptr + i_b * position_stride_b + s * position_stride_s
        r = tl.load(rstd_ptr + i_b * tokens + s, mask=m_row, other=0.0)
        if not GROUPED:
            cos, sin = group_cos_sin(
                p_position,
                position_stride_a,
                m_row,
                step_ptr,
                i_b * 0,
                True,
                groups,
                scale,
                R,
                AXES,
                SHIFT,
                BEGIN,
                END,
                True,
                BLOCK_R,
            )
        new = ()
        for j in tl.static_range(UNROLL):
            h = h0 + j
            m = m_row & (h < HEADS)
            if GROUPED:
                cos, sin = group_cos_sin(
                    p_position, position_stride_a, m_row, step_ptr, h * groups // HEADS, h < HEADS, groups, scale,
                    R, AXES, SHIFT, BEGIN, END, True, BLOCK_R,
                )  # fmt: skip
            p_x = x_ptr + (i_b * x_stride_b + s * x_stride_s) * ALIGN + h * x_h
            p_dy = dy_ptr + (i_b * dy_stride_b + s * dy_stride_s) * ALIGN + h * dy_h
            x = scaled(widen(load_parts(p_x, m, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)), r)
            g = widen(load_parts(p_dy, m, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST))
            new = new + (added(total[j], multiply(x, rotate_parts(g, cos, sin, INTERLEAVED))),)
        total = new
    p_partial = partial_ptr + (i_b * tiles + i_tile) * (HEADS * D)
    for j in tl.static_range(UNROLL):
        store_parts(p_partial + (h0 + j) * D, h0 + j < HEADS, summed(total[j]), D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)
