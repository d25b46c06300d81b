"""Whole heads as tuples of tiles, for the kernels that need every column.

Half pairing: (first columns, second columns) of the pairs, and the columns beyond the rotary ones where there are any.
Interleaved pairing: one tile with all columns. Rows are those of `tile.row_index`.
"""

import triton
import triton.language as tl

from saccade._triton.phase import rotate
from saccade._triton.tile import (
    INTERPRET,
    join_pairs,
    load_columns,
    load_halves,
    narrow,
    split_pairs,
    store_columns,
    store_halves,
)


@triton.jit
def load_parts(
    p_row,
    m_row,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """p_row: pointers [rows, 1] to column 0. Columns that a head lacks are zero."""
    if INTERLEAVED:
        x = (load_columns(p_row, m_row, tl.arange(0, 2 * BLOCK_R)[None, :], 0, D),)
    else:
        x1, x2 = load_halves(p_row, m_row, tl.arange(0, BLOCK_R)[None, :], 0, R, R)
        x = (x1, x2)
        if D > 2 * R:
            x = x + (load_columns(p_row + 2 * R, m_row, tl.arange(0, BLOCK_REST)[None, :], 0, D - 2 * R),)
    return x


@triton.jit
def store_parts(
    p_row, m_row, y,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Inverse of `load_parts`, rounding to the dtype of the memory."""
    dtype: tl.constexpr = p_row.dtype.scalar.element_ty
    if INTERLEAVED:
        store_columns(p_row, m_row, tl.arange(0, 2 * BLOCK_R)[None, :], narrow(y[0], dtype), 0, D)
    else:
        store_halves(p_row, m_row, tl.arange(0, BLOCK_R)[None, :], narrow(y[0], dtype), narrow(y[1], dtype), 0, R, R)
        if D > 2 * R:
            column = tl.arange(0, BLOCK_REST)[None, :]
            store_columns(p_row + 2 * R, m_row, column, narrow(y[2], dtype), 0, D - 2 * R)


@triton.jit
def widen(x):
    """fp32 copies of the parts."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (x[i].to(tl.float32),)
    return y


@triton.jit
def multiply(x, y):
    """Products of two tuples of parts."""
    z = ()
    for i in tl.static_range(len(x)):
        z = z + (x[i] * y[i],)
    return z


@triton.jit
def scaled(x, factor):
    """Parts times one [rows, 1] factor."""
    z = ()
    for i in tl.static_range(len(x)):
        z = z + (x[i] * factor,)
    return z


@triton.jit
def added(x, y):
    """Sums of two tuples of parts."""
    z = ()
    for i in tl.static_range(len(x)):
        z = z + (x[i] + y[i],)
    return z


@triton.jit
def row_sum(x, y):
    """Sum of x * y over the columns, [rows]."""
    return parts_sum(multiply(x, y))


@triton.jit
def parts_sum(x):
    """Sum over the columns of all parts, [rows]."""
    if len(x) == 1:
        total = tl.sum(x[0], 1)
    else:
        total = tl.sum(x[0] + x[1], 1)
    if len(x) == 3:
        total += tl.sum(x[2], 1)
    return total


@triton.jit
def rstd(total, COUNT: tl.constexpr, eps):
    """1 / sqrt(total / COUNT + eps), to about half a unit in the last place (the hardware's rsqrt alone has one)."""
    if COUNT & (COUNT - 1) == 0:
        v = total * (1.0 / COUNT) + eps
    else:
        v = tl.div_rn(total, tl.full(total.shape, COUNT, tl.float32)) + eps
    r = tl.rsqrt(v)
    if not INTERPRET:  # the interpreter has no fused multiply-add, and needs none
        better = tl.fma(0.5 * r, tl.fma(-(v * r), r, 1.0), r)
        r = tl.where(better == better, better, r)  # infinite v
    return r


@triton.jit
def token_sum(row, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr):
    """Sum of [rows] over the heads, for every row of the token, [rows]."""
    if BLOCK_H > 1:
        total = tl.sum(tl.reshape(row, (BLOCK_H, BLOCK_S)), 0)
        row = tl.reshape(tl.broadcast_to(total[None, :], (BLOCK_H, BLOCK_S)), (BLOCK_H * BLOCK_S,))
    return row


@triton.jit
def rotate_parts(x, c, s, INTERLEAVED: tl.constexpr):
    """Turn fp32 parts; c and s are [rows, BLOCK_R]."""
    if INTERLEAVED:
        x1, x2 = split_pairs(x[0])
        y1, y2 = rotate(x1, x2, c, s)
        y = (join_pairs(y1, y2),)
    else:
        y1, y2 = rotate(x[0], x[1], c, s)
        y = (y1, y2)
        if len(x) == 3:
            y = y + (x[2],)
    return y


@triton.jit
def zeros(
    ROWS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """fp32 parts of zeros."""
    if INTERLEAVED:
        y = (tl.zeros((ROWS, 2 * BLOCK_R), tl.float32),)
    else:
        x = tl.zeros((ROWS, BLOCK_R), tl.float32)
        y = (x, x)
        if D > 2 * R:
            y = y + (tl.zeros((ROWS, BLOCK_REST), tl.float32),)
    return y


@triton.jit
def summed(x):
    """Sums over the rows, [1, columns]."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (tl.sum(x[i], 0)[None, :],)
    return y
