"""Gradient of learned frequencies; saccade/reference/rope_freq_grad.py is the specification.

A program sums x[c1] dx[c2] - x[c2] dx[c1] over the heads of one group, of q and k, for one block of tokens, multiplies by the
positions of every axis, and writes its sum over the block; `sum_rows` adds those up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch
from saccade._triton.sum_rows import sum_rows
from saccade._triton.tile import load_columns, load_halves, program, row_index, split_pairs


@triton.jit
def _cross(
    total, p_x, x_stride_h, p_dx, dx_stride_h, first, last, m_row,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add heads [first, last) of one tensor to total [rows, BLOCK_R]."""
    x_stride_h, dx_stride_h = x_stride_h.to(tl.int64) * ALIGN, dx_stride_h.to(tl.int64) * ALIGN
    for i in range(first, last):
        h = tl.zeros((1, 1), tl.int64) + i
        if INTERLEAVED:
            column = tl.arange(0, 2 * BLOCK_R)[None, :]
            x1, x2 = split_pairs(load_columns(p_x + h * x_stride_h, m_row, column, 0, 2 * R))
            d1, d2 = split_pairs(load_columns(p_dx + h * dx_stride_h, m_row, column, 0, 2 * R))
        else:
            pair = tl.arange(0, BLOCK_R)[None, :]
            x1, x2 = load_halves(p_x + h * x_stride_h, m_row, pair, 0, R, R)
            d1, d2 = load_halves(p_dx + h * dx_stride_h, m_row, pair, 0, R, R)
        total += x1.to(tl.float32) * d2.to(tl.float32) - x2.to(tl.float32) * d1.to(tl.float32)
    return total


@triton.jit(do_not_specialize=launch.SIZES, do_not_specialize_on_alignment=launch.TABLES)
def rope_freq_grad_kernel(
    q_ptr, q_dx_ptr, k_ptr, k_dx_ptr, position_ptr, partial_ptr,
    tokens, tiles, groups, q_per_group, k_per_group,
    q_stride_b, q_stride_h, q_stride_s, q_dx_stride_b, q_dx_stride_h, q_dx_stride_s,
    k_stride_b, k_stride_h, k_stride_s, k_dx_stride_b, k_dx_stride_h, k_dx_stride_s,
    position_stride_a, position_stride_b, position_stride_s,
    R: tl.constexpr, AXES: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_K: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial [B * tiles, AXES, groups, R] fp32."""
    i_group, i_tile, i_b = program(groups, tiles)
    _, s_row = row_index(1, ROWS)
    s = i_tile.to(tl.int64) * ROWS + s_row
    m_row = s < tokens
    p_q = q_ptr + (i_b * q_stride_b + s * q_stride_s) * ALIGN
    p_q_dx = q_dx_ptr + (i_b * q_dx_stride_b + s * q_dx_stride_s) * ALIGN
    total = tl.zeros((ROWS, BLOCK_R), tl.float32)
    first = i_group * q_per_group
    total = _cross(
        total, p_q, q_stride_h, p_q_dx, q_dx_stride_h, first, first + q_per_group, m_row, R, INTERLEAVED, ALIGN, BLOCK_R
    )
    if HAS_K:
        p_k = k_ptr + (i_b * k_stride_b + s * k_stride_s) * ALIGN
        p_k_dx = k_dx_ptr + (i_b * k_dx_stride_b + s * k_dx_stride_s) * ALIGN
        first = i_group * k_per_group
        total = _cross(
            total,
            p_k,
            k_stride_h,
            p_k_dx,
            k_dx_stride_h,
            first,
            first + k_per_group,
            m_row,
            R,
            INTERLEAVED,
            ALIGN,
            BLOCK_R,
        )
    pair = tl.arange(0, BLOCK_R)
    p_position = position_ptr + i_b * position_stride_b + s * position_stride_s
    p_partial = partial_ptr + ((i_b * tiles + i_tile) * AXES * groups + i_group) * R + pair
    for axis in tl.static_range(AXES):
        position = tl.load(p_position + axis * position_stride_a.to(tl.int64), mask=m_row, other=0).to(tl.float32)
        tl.store(p_partial + axis * groups.to(tl.int64) * R, tl.sum(total * position, 0), mask=pair < R)


def rope_freq_grad(q, k, dq, dk, positions, groups, pairs, interleaved):
    """Gradient of the frequencies, fp32 [A, G, R], from q, k and the gradients dq, dk that the inverse rotation gave."""
    batch, q_heads, tokens, _ = q.shape
    k_heads = 0 if k is None else k.shape[1]
    axes = positions.shape[0]
    config = launch.CONFIGS["rope_freq_grad"][launch.power_of_two(pairs)]
    tiles = -(-tokens // config.rows)
    if batch * tiles == 0 or max(q_heads, k_heads) == 0:
        return q.new_zeros((axes, groups, pairs), dtype=launch.float32())
    k, dk = (q, dq) if k is None else (k, dk)
    align = launch.alignment((q, dq, k, dk), 0 if interleaved else pairs)
    partial = q.new_empty((batch * tiles, axes * groups * pairs), dtype=launch.float32())
    with launch.on_device(q):
        rope_freq_grad_kernel[(batch * tiles * groups,)](
            q, dq, k, dk, partial_ptr=partial,
            tokens=tokens, tiles=tiles, groups=groups, q_per_group=q_heads // groups, k_per_group=k_heads // groups,
            **launch.position_args(positions), **launch.stride_args(align, q=q, q_dx=dq, k=k, k_dx=dk),
            R=pairs, AXES=axes, INTERLEAVED=interleaved, HAS_K=k_heads > 0, ALIGN=align,
            ROWS=config.rows, BLOCK_R=launch.power_of_two(pairs), **launch.options(config),
        )  # fmt: skip
    return sum_rows(partial).view(axes, groups, pairs)
