"""Rotary embedding of q and k; saccade/reference/apply_rope.py is the specification.

A program turns the heads of one group (or a chunk of them) over one block of tokens. Its cosines and sines are computed once,
from the positions, and used for every head of q and k; the next head is loaded before the present one is stored.
"""

import triton
import triton.language as tl

from saccade._triton import launch
from saccade._triton.phase import cos_sin, rotate
from saccade._triton.tile import (
    head_range,
    join_pairs,
    load_columns,
    load_halves,
    narrow,
    program,
    row_index,
    split_pairs,
    store_columns,
    store_halves,
)


@triton.jit
def _half_heads(
    x_ptr, y_ptr, x_stride_h, y_stride_h, first, last, h_row, m_row, pair, c, s,
    D: tl.constexpr, R: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, INPLACE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Half pairing. x_ptr, y_ptr: [rows, 1], the tokens of head 0."""
    LO: tl.constexpr = BEGIN if INPLACE else 0
    HI: tl.constexpr = END if INPLACE else R
    h = first + h_row
    x1, x2 = load_halves(x_ptr + h * x_stride_h, m_row & (h < last), pair, LO, HI, R)
    for _ in range(first, last, BLOCK_H):
        m = m_row & (h < last)
        h_next = h + BLOCK_H
        next1, next2 = load_halves(x_ptr + h_next * x_stride_h, m_row & (h_next < last), pair, LO, HI, R)
        y1, y2 = rotate(x1.to(tl.float32), x2.to(tl.float32), c, s)
        y1, y2 = narrow(y1, x1.dtype), narrow(y2, x2.dtype)
        if not INPLACE:  # the identity copies bits
            active = (pair >= BEGIN) & (pair < END)
            y1, y2 = tl.where(active, y1, x1), tl.where(active, y2, x2)
            if D > 2 * R:
                column = tl.arange(0, BLOCK_REST)[None, :]
                rest = load_columns(x_ptr + h * x_stride_h + 2 * R, m, column, 0, D - 2 * R)
                store_columns(y_ptr + h * y_stride_h + 2 * R, m, column, rest, 0, D - 2 * R)
        store_halves(y_ptr + h * y_stride_h, m, pair, y1, y2, LO, HI, R)
        x1, x2, h = next1, next2, h_next


@triton.jit
def _interleaved_heads(
    x_ptr, y_ptr, x_stride_h, y_stride_h, first, last, h_row, m_row, pair, c, s,
    D: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, INPLACE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Interleaved pairing. x_ptr, y_ptr: [rows, 1], the tokens of head 0."""
    LO: tl.constexpr = 2 * BEGIN if INPLACE else 0
    HI: tl.constexpr = 2 * END if INPLACE else D
    column = tl.arange(0, 2 * BLOCK_R)[None, :]
    h = first + h_row
    x = load_columns(x_ptr + h * x_stride_h, m_row & (h < last), column, LO, HI)
    for _ in range(first, last, BLOCK_H):
        h_next = h + BLOCK_H
        x_next = load_columns(x_ptr + h_next * x_stride_h, m_row & (h_next < last), column, LO, HI)
        x1, x2 = split_pairs(x)
        y1, y2 = rotate(x1.to(tl.float32), x2.to(tl.float32), c, s)
        y1, y2 = narrow(y1, x1.dtype), narrow(y2, x2.dtype)
        if not INPLACE:  # the identity copies bits
            active = (pair >= BEGIN) & (pair < END)
            y1, y2 = tl.where(active, y1, x1), tl.where(active, y2, x2)
        store_columns(y_ptr + h * y_stride_h, m_row & (h < last), column, join_pairs(y1, y2), LO, HI)
        x, h = x_next, h_next


@triton.jit(do_not_specialize=launch.SIZES, do_not_specialize_on_alignment=launch.TABLES)
def apply_rope_kernel(
    q_ptr, q_out_ptr, k_ptr, k_out_ptr, position_ptr, step_ptr, scale,
    tokens, tiles, groups, chunks, q_per_group, k_per_group,
    q_stride_b, q_stride_h, q_stride_s, q_out_stride_b, q_out_stride_h, q_out_stride_s,
    k_stride_b, k_stride_h, k_stride_s, k_out_stride_b, k_out_stride_h, k_out_stride_s,
    position_stride_a, position_stride_b, position_stride_s,
    D: tl.constexpr, R: tl.constexpr, AXES: tl.constexpr, SHIFT: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, INPLACE: tl.constexpr, HAS_K: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    i_unit, i_tile, i_b = program(groups * chunks, tiles)
    i_group, i_chunk = i_unit // chunks, i_unit % chunks
    h_row, s_row = row_index(BLOCK_H, BLOCK_S)
    s = i_tile.to(tl.int64) * BLOCK_S + s_row
    m_row = s < tokens
    h_row = h_row.to(tl.int64)
    pair = tl.arange(0, BLOCK_R)[None, :]
    cos, sin = cos_sin(
        position_ptr + i_b * position_stride_b + s * position_stride_s, position_stride_a, m_row,
        step_ptr + i_group.to(tl.int64) * R + pair, groups.to(tl.int64) * R, (pair >= BEGIN) & (pair < END),
        scale, AXES, SHIFT, INVERSE,
    )  # fmt: skip
    for i in tl.static_range(2 if HAS_K else 1):
        if i == 0:
            x_ptr, y_ptr, per_group = q_ptr, q_out_ptr, q_per_group
            x_b, x_h, x_s, y_b, y_h, y_s = (
                q_stride_b,
                q_stride_h,
                q_stride_s,
                q_out_stride_b,
                q_out_stride_h,
                q_out_stride_s,
            )
        else:
            x_ptr, y_ptr, per_group = k_ptr, k_out_ptr, k_per_group
            x_b, x_h, x_s, y_b, y_h, y_s = (
                k_stride_b,
                k_stride_h,
                k_stride_s,
                k_out_stride_b,
                k_out_stride_h,
                k_out_stride_s,
            )
        first, last = head_range(i_chunk, chunks, per_group, i_group)
        p_x = x_ptr + (i_b * x_b + s * x_s) * ALIGN
        p_y = y_ptr + (i_b * y_b + s * y_s) * ALIGN
        x_h, y_h = x_h.to(tl.int64) * ALIGN, y_h.to(tl.int64) * ALIGN
        if INTERLEAVED:
            _interleaved_heads(
                p_x, p_y, x_h, y_h, first, last, h_row, m_row, pair, cos, sin, D, BEGIN, END, INPLACE, BLOCK_H, BLOCK_R
            )
        else:
            _half_heads(
                p_x,
                p_y,
                x_h,
                y_h,
                first,
                last,
                h_row,
                m_row,
                pair,
                cos,
                sin,
                D,
                R,
                BEGIN,
                END,
                INPLACE,
                BLOCK_H,
                BLOCK_R,
                BLOCK_REST,
            )


def _launch(q, q_out, k, k_out, positions, steps, shift, begin, end, interleaved, scale, inverse, inplace):
    batch, q_heads, tokens, head_dim = q.shape
    k_heads = 0 if k is None else k.shape[1]
    axes, groups, pairs = steps.shape
    width = launch.widths(head_dim, pairs, interleaved)
    config = launch.config("apply_rope", width)
    blocks = launch.token_blocks(config.rows, tokens)
    tiles = -(-tokens // blocks["BLOCK_S"])
    per_group = max(q_heads, k_heads) // groups
    chunks = launch.head_chunks(batch * tiles * groups, per_group, blocks["BLOCK_H"])
    programs = batch * tiles * groups * chunks
    if programs == 0 or per_group == 0 or (inplace and begin >= end):
        return
    k, k_out = (q, q_out) if k is None else (k, k_out)
    align = launch.alignment((q, q_out, k, k_out), 0 if interleaved else pairs)
    with launch.on_device(q):
        apply_rope_kernel[(programs,)](
            q, q_out, k, k_out, step_ptr=steps, scale=scale,
            tokens=tokens, tiles=tiles, groups=groups, chunks=chunks, q_per_group=q_heads // groups, k_per_group=k_heads // groups,
            **launch.position_args(positions), **launch.stride_args(align, q=q, q_out=q_out, k=k, k_out=k_out),
            D=head_dim, R=pairs, AXES=axes, SHIFT=shift, BEGIN=begin, END=end,
            INTERLEAVED=interleaved, INVERSE=inverse, INPLACE=inplace, HAS_K=k_heads > 0, ALIGN=align,
            **blocks, **width, **launch.options(config),
        )  # fmt: skip


def apply_rope(q, k, positions, steps, shift, begin, end, interleaved, scale, inverse):
    """q [B, Hq, S, D] and k [B, Hk, S, D] (or None) turned; the second result is empty without k."""
    q_out = launch.empty_like(q)
    k_out = q.new_empty(0) if k is None else launch.empty_like(k)
    _launch(q, q_out, k, k_out, positions, steps, shift, begin, end, interleaved, scale, inverse, inplace=False)
    return q_out, k_out


def apply_rope_(q, k, positions, steps, shift, begin, end, interleaved, scale, inverse):
    """The same in place: columns outside the pairs [begin, end) are neither read nor written."""
    _launch(q, q, k, k, positions, steps, shift, begin, end, interleaved, scale, inverse, inplace=True)
