"""Gradient of merge; saccade/reference/merge.py is the specification. Every token reads the row that it went into.

For a maximum the row decides which of its members attained it: a program takes one row, and passes over its members twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch, matrix
from saccade._triton.matrix import load_rows, store_rows
from saccade._triton.merge import MAX, MEAN, REPLACE
from saccade._triton.tile import program

MEMBERS = 8  # of a row, taken at once


@triton.jit(do_not_specialize=matrix.SIZES)
def merge_bwd_kernel(
    dy_ptr, weight_ptr, total_ptr, inverse_ptr, head_ptr, dx_ptr,
    tokens, rows, tiles, blocks, dy_stride_b, dy_stride_s, dx_stride_b, dx_stride_s, weight_stride, plan_stride,
    D: tl.constexpr, MODE: tl.constexpr, HAS_WEIGHT: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All modes but MAX: dx[token] = scale dy[row of the token]."""
    i_column, i_tile, i_b = program(blocks, tiles)
    i_plan = i_b * plan_stride
    i = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_token = i < tokens
    row = tl.load(inverse_ptr + i_plan * tokens + i, mask=m_token, other=-1)
    m = row >= 0
    if MODE == REPLACE:
        m = m & (tl.load(head_ptr + i_plan * rows + row, mask=m, other=-1) == i)
    column = i_column * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    p_dy = dy_ptr + (i_b * dy_stride_b + row.to(tl.int64) * dy_stride_s) * ALIGN
    g = load_rows(p_dy, m, column, D)
    p_dx = dx_ptr + (i_b * dx_stride_b + i * dx_stride_s) * ALIGN
    if MODE == MEAN:
        total = tl.load(total_ptr + i_b * rows + row, mask=m, other=1.0)
        total = tl.where(total == 0, 1.0, total)
        w = tl.zeros((ROWS, 1), tl.float32) + 1.0
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + i_b * weight_stride + i, mask=m, other=0.0)
        g = g.to(tl.float32) * tl.div_rn(w, total)
        store_rows(p_dx, m_token, column, tl.where(m, g, 0.0), D)
    else:
        tl.store(p_dx + column, g, mask=m_token & (column < D))


@triton.jit(do_not_specialize=matrix.SIZES)
def merge_bwd_max_kernel(
    dy_ptr, x_ptr, ptr_ptr, members_ptr, dx_ptr,
    tokens, rows, blocks, dy_stride_b, dy_stride_s, x_stride_b, x_stride_s, dx_stride_b, dx_stride_s, plan_stride,
    D: tl.constexpr, ALIGN: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of the members of one row: dy where a member is the first to attain the maximum of its column, else 0."""
    i_column, i_row, i_b = program(blocks, rows)
    i_plan = i_b * plan_stride
    p_ptr = ptr_ptr + i_plan * (rows.to(tl.int64) + 1) + i_row
    p_members = members_ptr + i_plan * tokens
    begin, end = tl.load(p_ptr), tl.load(p_ptr + 1)
    lane = tl.arange(0, MEMBERS)[:, None]
    column = i_column * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    p_x, x_s = x_ptr + i_b * x_stride_b * ALIGN, x_stride_s.to(tl.int64) * ALIGN
    p_dx, dx_s = dx_ptr + i_b * dx_stride_b * ALIGN, dx_stride_s.to(tl.int64) * ALIGN
    g = load_rows(dy_ptr + (i_b * dy_stride_b + i_row.to(tl.int64) * dy_stride_s) * ALIGN, end > begin, column, D)
    top = tl.full((1, BLOCK_D), float("-inf"), tl.float32)
    place = tl.full((1, BLOCK_D), -1, tl.int32)  # of the first member that attains it; NaN is more than every number
    for j in range(begin, end, MEMBERS):
        m = j + lane < end
        token = tl.load(p_members + j + lane, mask=m, other=0).to(tl.int64)
        x = load_rows(p_x + token * x_s, m, column, D).to(tl.float32)
        x = tl.where(m, x, float("-inf"))
        nan = tl.max((x != x).to(tl.int32), 0)[None, :] != 0
        best = tl.where(nan, float("nan"), tl.max(tl.where(x == x, x, float("-inf")), 0)[None, :])
        here = tl.min(tl.where(m & ((x == best) | (nan & (x != x))), j + lane, 0x7FFFFFFF), 0)[None, :]
        take = (top == top) & (nan | (best > top) | (place == -1))
        top, place = tl.where(take, best, top), tl.where(take, here, place)
    for j in range(begin, end, MEMBERS):
        m = j + lane < end
        token = tl.load(p_members + j + lane, mask=m, other=0).to(tl.int64)
        zero = tl.zeros((MEMBERS, BLOCK_D), g.dtype)
        dx = tl.where(j + lane == place, tl.broadcast_to(g, zero.shape), zero)
        tl.store(p_dx + token * dx_s + column, dx, mask=m & (column < D))


def merge_bwd(dy, x, weight, total, inverse, ptr, members, head, mode):
    """dx [B, N, D] from dy [B, M, D]; x is needed for MAX alone, total as merge wrote it."""
    batch, rows, width = dy.shape
    tokens = inverse.shape[1]
    largest = mode == MAX.value
    dx = dy.new_zeros((batch, tokens, width)) if largest else dy.new_empty((batch, tokens, width))
    if dx.numel() == 0 or (rows == 0 and largest):
        return dx
    inverse, ptr, members, head, total = (t.contiguous() for t in (inverse, ptr, members, head, total))
    block = matrix.blocks(width)
    blocks, shared = -(-width // block["BLOCK_D"]), int(inverse.shape[0] > 1)
    with launch.on_device(dy):
        if largest:
            align = matrix.alignment(dy, x, dx)
            merge_bwd_max_kernel[(batch * rows * blocks,)](
                dy, x, ptr, members, dx, tokens=tokens, rows=rows, blocks=blocks,
                **matrix.stride_args(align, dy=dy, x=x, dx=dx), plan_stride=shared,
                D=width, ALIGN=align, MEMBERS=MEMBERS, BLOCK_D=block["BLOCK_D"], num_warps=4, **matrix.OPTIONS,
            )  # fmt: skip
            return dx
        weighted = weight is not None and mode == MEAN.value
        weight = weight.float().contiguous() if weighted else total
        align = matrix.alignment(dy, dx)
        tiles = -(-tokens // block["ROWS"])
        merge_bwd_kernel[(batch * tiles * blocks,)](
            dy, weight, total, inverse, head, dx, tokens=tokens, rows=rows, tiles=tiles, blocks=blocks,
            **matrix.stride_args(align, dy=dy, dx=dx),
            weight_stride=matrix.shared_stride(weight) if weighted else 0, plan_stride=shared,
            D=width, MODE=mode, HAS_WEIGHT=weighted, ALIGN=align, **block, num_warps=4, **matrix.OPTIONS,
        )  # fmt: skip
    return dx
