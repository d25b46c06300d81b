"""RMS normalisation over all heads of a token, then the rotary embedding: the forward kernel of `qk_norm_rope` with row=True.

A program takes all heads of a few tokens: BLOCK_H heads times BLOCK_S tokens a tile. With HOLD the tiles stay in registers between
the sum of squares and the rotation, so that memory is read once; longer rows are read twice. With one group the angles are
computed once; with several, q and k of as many heads go through the second pass together (JOINT) and share theirs.
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
    token_sum,
    widen,
    zeros,
)
from saccade._triton.phase import group_cos_sin
from saccade._triton.tile import program, row_index


@triton.jit
def _rstd(
    p_x, x_stride_h, h_row, m_row, eps,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, HOLD: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(mean square + eps) of every row's token, [rows, 1], and the tiles if they are to be held."""
    total = zeros(BLOCK_H * BLOCK_S, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)
    held = ()
    if HOLD:
        for i in tl.static_range(0, HEADS, BLOCK_H):
            x = load_parts(
                p_x + (i + h_row) * x_stride_h, m_row & (i + h_row < HEADS), D, R, INTERLEAVED, BLOCK_R, BLOCK_REST
            )
            held = held + (x,)
        for i in tl.static_range(len(held)):
            x = widen(held[i])
            total = added(total, multiply(x, x))
    else:
        for i in range(0, HEADS, BLOCK_H):
            h = i + h_row
            x = widen(load_parts(p_x + h * x_stride_h, m_row & (h < HEADS), D, R, INTERLEAVED, BLOCK_R, BLOCK_REST))
            total = added(total, multiply(x, x))
    square = token_sum(parts_sum(total), BLOCK_H, BLOCK_S)
    return rstd(square, HEADS * D, eps)[:, None], held


@triton.jit
def _write(
    x, p_y, y_stride_h, w_ptr, h, m, r, cos, sin,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Normalise, weigh, turn and store one tile. h: heads of the rows, [rows, 1] int64."""
    y = scaled(widen(x), r)
    if WEIGHT:
        y = multiply(y, widen(load_parts(w_ptr + h * D, m, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)))
    y = rotate_parts(y, cos, sin, INTERLEAVED)
    store_parts(p_y + h * y_stride_h, m, y, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)


@triton.jit
def _norm_row(
    p_x, x_stride_h, p_y, y_stride_h, w_ptr, h_row, m_row, p_position, position_stride_a, step_ptr, groups, scale, eps, cos, sin,
    HEADS: tl.constexpr, GROUPED: tl.constexpr, D: tl.constexpr, R: tl.constexpr, AXES: tl.constexpr, SHIFT: tl.constexpr,
    BEGIN: tl.constexpr, END: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHT: tl.constexpr, HOLD: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One tensor. cos, sin: those of the only group, if not GROUPED."""
    r, held = _rstd(
        p_x, x_stride_h, h_row, m_row, eps, HEADS, D, R, INTERLEAVED, HOLD, BLOCK_S, BLOCK_H, BLOCK_R, BLOCK_REST
    )
    if HOLD:
        for i in tl.static_range(len(held)):
            h = i * BLOCK_H + h_row
            m = m_row & (h < HEADS)
            if GROUPED:
                cos, sin = group_cos_sin(
                    p_position, position_stride_a, m_row, step_ptr, h * groups // HEADS, h < HEADS, groups, scale,
                    R, AXES, SHIFT, BEGIN, END, False, BLOCK_R,
                )  # fmt: skip
            _write(held[i], p_y, y_stride_h, w_ptr, h, m, r, cos, sin, D, R, INTERLEAVED, WEIGHT, BLOCK_R, BLOCK_REST)
    else:
        for i in range(0, HEADS, BLOCK_H):
            h = i + h_row
            m = m_row & (h < HEADS)
            x = load_parts(p_x + h * x_stride_h, m, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)
            if GROUPED:
                own_cos, own_sin = group_cos_sin(
                    p_position, position_stride_a, m_row, step_ptr, h * groups // HEADS, h < HEADS, groups, scale,
                    R, AXES, SHIFT, BEGIN, END, False, BLOCK_R,
                )  # fmt: skip
                _write(
                    x, p_y, y_stride_h, w_ptr, h, m, r, own_cos, own_sin, D, R, INTERLEAVED, WEIGHT, BLOCK_R, BLOCK_REST
                )
            else:
                _write(x, p_y, y_stride_h, w_ptr, h, m, r, cos, sin, D, R, INTERLEAVED, WEIGHT, BLOCK_R, BLOCK_REST)


@triton.jit(do_not_specialize=launch.SIZES, do_not_specialize_on_alignment=launch.TABLES)
def qk_norm_rope_row_kernel(
    q_ptr, q_out_ptr, k_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, position_ptr, step_ptr, scale, eps,
    tokens, tiles, groups,
    q_stride_b, q_stride_h, q_stride_s, q_out_stride_b, q_out_stride_h, q_out_stride_s,
    k_stride_b, k_stride_h, k_stride_s, k_out_stride_b, k_out_stride_h, k_out_stride_s,
    position_stride_a, position_stride_b, position_stride_s,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, GROUPED: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, AXES: tl.constexpr, SHIFT: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr,
    INTERLEAVED: tl.constexpr, WEIGHT_Q: tl.constexpr, WEIGHT_K: tl.constexpr, ALIGN: tl.constexpr,
    HOLD_Q: tl.constexpr, HOLD_K: tl.constexpr, JOINT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    _, i_tile, i_b = program(1, tiles)
    h_row, s_row = row_index(BLOCK_H, BLOCK_S)
    s = i_tile.to(tl.int64) * BLOCK_S + s_row
    m_row = s < tokens
    h_row = h_row.to(tl.int64)
    p_position = position_ptr + i_b * position_stride_b + s * position_stride_s
    p_q = q_ptr + (i_b * q_stride_b + s * q_stride_s) * ALIGN
    p_q_out = q_out_ptr + (i_b * q_out_stride_b + s * q_out_stride_s) * ALIGN
    p_k = k_ptr + (i_b * k_stride_b + s * k_stride_s) * ALIGN
    p_k_out = k_out_ptr + (i_b * k_out_stride_b + s * k_out_stride_s) * ALIGN
    q_h, q_out_h = q_stride_h.to(tl.int64) * ALIGN, q_out_stride_h.to(tl.int64) * ALIGN
    k_h, k_out_h = k_stride_h.to(tl.int64) * ALIGN, k_out_stride_h.to(tl.int64) * ALIGN
    if JOINT:
        q_r, q_held = _rstd(
            p_q, q_h, h_row, m_row, eps, Q_HEADS, D, R, INTERLEAVED, True, BLOCK_S, BLOCK_H, BLOCK_R, BLOCK_REST
        )
        k_r, k_held = _rstd(
            p_k, k_h, h_row, m_row, eps, K_HEADS, D, R, INTERLEAVED, True, BLOCK_S, BLOCK_H, BLOCK_R, BLOCK_REST
        )
        for i in tl.static_range(len(q_held)):
            h = i * BLOCK_H + h_row
            m = m_row & (h < Q_HEADS)
            cos, sin = group_cos_sin(
                p_position, position_stride_a, m_row, step_ptr, h * groups // Q_HEADS, h < Q_HEADS, groups, scale,
                R, AXES, SHIFT, BEGIN, END, False, BLOCK_R,
            )  # fmt: skip
            _write(
                q_held[i],
                p_q_out,
                q_out_h,
                q_weight_ptr,
                h,
                m,
                q_r,
                cos,
                sin,
                D,
                R,
                INTERLEAVED,
                WEIGHT_Q,
                BLOCK_R,
                BLOCK_REST,
            )
            _write(
                k_held[i],
                p_k_out,
                k_out_h,
                k_weight_ptr,
                h,
                m,
                k_r,
                cos,
                sin,
                D,
                R,
                INTERLEAVED,
                WEIGHT_K,
                BLOCK_R,
                BLOCK_REST,
            )
    else:
        cos, sin = s, s  # not used when GROUPED
        if not GROUPED:
            cos, sin = group_cos_sin(
                p_position, position_stride_a, m_row, step_ptr, i_tile * 0, True, groups, scale,
                R, AXES, SHIFT, BEGIN, END, False, BLOCK_R,
            )  # fmt: skip
        _norm_row(
            p_q, q_h, p_q_out, q_out_h, q_weight_ptr, h_row, m_row, p_position, position_stride_a, step_ptr, groups,
            scale, eps, cos, sin,
            Q_HEADS, GROUPED, D, R, AXES, SHIFT, BEGIN, END, INTERLEAVED, WEIGHT_Q, HOLD_Q, BLOCK_S, BLOCK_H, BLOCK_R, BLOCK_REST,
        )  # fmt: skip
        if K_HEADS > 0:
            _norm_row(
                p_k, k_h, p_k_out, k_out_h, k_weight_ptr, h_row, m_row, p_position, position_stride_a, step_ptr, groups,
                scale, eps, cos, sin,
                K_HEADS, GROUPED, D, R, AXES, SHIFT, BEGIN, END, INTERLEAVED, WEIGHT_K, HOLD_K, BLOCK_S, BLOCK_H, BLOCK_R, BLOCK_REST,
            )  # fmt: skip
