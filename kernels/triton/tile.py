"""Tiles of the rotary kernels: which heads and tokens a program holds, and how its pairs are loaded and stored.

A tile has BLOCK_H * BLOCK_S rows, token fastest; row r is head `r // BLOCK_S` and token `r % BLOCK_S` of the block.
Half pairing keeps the columns of a head in two tiles [rows, BLOCK_R] and those beyond the rotary ones in a third.
Interleaved pairing loads whole rows [rows, 2 * BLOCK_R] once and splits them in registers.

Strides arrive divided by ALIGN elements: the multiplication tells the compiler that addresses are aligned.
"""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def program(units, tiles):
    """(unit, tile, batch) of this program; units are fastest, so that neighbours read the same tokens."""
    pid = tl.program_id(0)
    rest = pid // units
    return pid % units, rest % tiles, (rest // tiles).to(tl.int64)


@triton.jit
def row_index(BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr):
    """Head and token of every row of a tile, relative to the block, [rows, 1] int32."""
    row = tl.arange(0, BLOCK_H * BLOCK_S)[:, None]
    return row // BLOCK_S, row % BLOCK_S


@triton.jit
def head_range(i_chunk, chunks, per_group, i_group):
    """Heads [first, last) that chunk `i_chunk` of `chunks` of a group works on."""
    first = i_group * per_group
    return first + per_group * i_chunk // chunks, first + per_group * (i_chunk + 1) // chunks


@triton.jit
def load_halves(p_row, m_row, pair, FIRST: tl.constexpr, LAST: tl.constexpr, PAIRS: tl.constexpr):
    """Columns (i, i + PAIRS) of pairs FIRST <= i < LAST, zero elsewhere."""
    m = m_row & (pair >= FIRST) & (pair < LAST)
    return tl.load(p_row + pair, mask=m, other=0.0), tl.load(p_row + PAIRS + pair, mask=m, other=0.0)


@triton.jit
def store_halves(p_row, m_row, pair, y1, y2, FIRST: tl.constexpr, LAST: tl.constexpr, PAIRS: tl.constexpr):
    """Inverse of `load_halves`."""
    m = m_row & (pair >= FIRST) & (pair < LAST)
    tl.store(p_row + pair, y1, mask=m)
    tl.store(p_row + PAIRS + pair, y2, mask=m)


@triton.jit
def load_columns(p_row, m_row, column, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Columns FIRST <= j < LAST, zero elsewhere."""
    return tl.load(p_row + column, mask=m_row & (column >= FIRST) & (column < LAST), other=0.0)


@triton.jit
def store_columns(p_row, m_row, column, y, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Inverse of `load_columns`."""
    tl.store(p_row + column, y, mask=m_row & (column >= FIRST) & (column < LAST))


@triton.jit
def split_pairs(x):
    """[rows, 2n] to the even and the odd columns, [rows, n] each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def join_pairs(x1, x2):
    """Inverse of `split_pairs`."""
    return tl.reshape(tl.join(x1, x2), (x1.shape[0], 2 * x1.shape[1]))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even. The interpreter cuts bfloat16 off, so there it is rounded beforehand."""
    if INTERPRET and dtype == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        u = (u + (0x7FFF + ((u >> 16) & 1))) & 0xFFFF0000
        x = tl.where(tl.abs(x) < float("inf"), u.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
