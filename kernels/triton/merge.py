"""Merging of tokens along a plan; saccade/reference/merge.py is the specification.

A program makes a few rows of y, some columns of each, and adds one member of every row at a time, in ascending order. A row of
more than LONG members, such as the one that a still background falls into, is taken by itself: CHUNK members at a time, each in a sum
of its own, and these are added pairwise. Which way a row goes depends on its own length alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch, matrix
from saccade._triton.matrix import load_rows, store_rows
from saccade._triton.tile import program

MEAN, SUM, MAX, REPLACE = (tl.constexpr(i) for i in range(4))

LONG = 64
CHUNK = 16


@triton.jit
def _halve(x, y, MODE: tl.constexpr):
    """x and y combined: their sum, or the larger, x of equals; NaN counts as more than every number."""
    if MODE == MAX:
        return tl.where((y > x) | ((y != y) & (x == x)), y, x)
    else:
        return x + y


@triton.jit
def _combine(x, LANES: tl.constexpr, D: tl.constexpr, MODE: tl.constexpr):
    """[LANES, D] to [1, D] by halves, so in one order whichever thread holds what."""
    n: tl.constexpr = LANES // 2
    x, y = tl.split(tl.permute(tl.reshape(x, (2, n, D)), (1, 2, 0)))
    x = _halve(x, y, MODE)
    if n > 1:
        x = _combine(x, n, D, MODE)
    return x


@triton.jit
def _add(
    acc, total, x_ptr, weight_ptr, x_stride_s, token, m, column,
    D: tl.constexpr, MODE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """One member of every row: acc [rows, columns], total [rows, 1]; token, m [rows, 1]."""
    w = tl.load(weight_ptr + token, mask=m, other=0.0) if HAS_WEIGHT else m.to(tl.float32)
    total += w
    if MODE != REPLACE:
        x = load_rows(x_ptr + token * x_stride_s, m, column, D).to(tl.float32)
        if MODE == MEAN and HAS_WEIGHT:
            x *= w
        acc = tl.where(m, _halve(acc, x, MODE), acc)
    return acc, total


@triton.jit
def _finish(acc, total, MODE: tl.constexpr):
    if MODE == MEAN:
        acc = tl.div_rn(acc, tl.broadcast_to(tl.where(total == 0, 1.0, total), acc.shape))
    return acc


@triton.jit(do_not_specialize=matrix.SIZES)
def merge_kernel(
    x_ptr, weight_ptr, ptr_ptr, members_ptr, head_ptr, y_ptr, total_ptr, log_total_ptr,
    tokens, rows, tiles, blocks, x_stride_b, x_stride_s, y_stride_b, y_stride_s, weight_stride, plan_stride,
    D: tl.constexpr, MODE: tl.constexpr, HAS_WEIGHT: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, LONG: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """plan_stride is 1 where every sample has a plan of its own, and 0 where one serves all."""
    i_column, i_tile, i_b = program(blocks, tiles)
    i_plan = i_b * plan_stride
    p_ptr = ptr_ptr + i_plan * (rows.to(tl.int64) + 1)
    p_members, p_head = members_ptr + i_plan * tokens, head_ptr + i_plan * rows
    p_x, p_weight = x_ptr + i_b * x_stride_b * ALIGN, weight_ptr + i_b * weight_stride
    p_y, p_total = y_ptr + i_b * y_stride_b * ALIGN, total_ptr + i_b * rows
    p_log = log_total_ptr + i_b * rows
    x_s, y_s = x_stride_s.to(tl.int64) * ALIGN, y_stride_s.to(tl.int64) * ALIGN
    column = i_column * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]

    first = i_tile.to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)[:, None]
    m_row = row < rows
    begin = tl.load(p_ptr + row, mask=m_row, other=0)
    count = tl.load(p_ptr + row + 1, mask=m_row, other=0) - begin
    short = count <= LONG
    steps = tl.max(tl.where(short, count, 0))
    if MODE == REPLACE:  # only the weights are summed, if any, and once
        steps = tl.where(i_column == 0, steps, 0) if HAS_WEIGHT else 0
    start_value: tl.constexpr = float("-inf") if MODE == MAX else 0.0
    acc = tl.full((ROWS, BLOCK_D), start_value, tl.float32)
    total = tl.zeros((ROWS, 1), tl.float32)
    for j in range(0, steps):
        m = short & (j < count)
        token = tl.load(p_members + begin + j, mask=m, other=0).to(tl.int64)
        acc, total = _add(acc, total, p_x, p_weight, x_s, token, m, column, D, MODE, HAS_WEIGHT)
    if not HAS_WEIGHT:
        total = count.to(tl.float32)
    if MODE == REPLACE:
        head = tl.load(p_head + row, mask=m_row, other=-1)
        x = load_rows(p_x + head.to(tl.int64) * x_s, head >= 0, column, D)
        tl.store(p_y + row * y_s + column, x, mask=m_row & (column < D))
    else:
        acc = tl.where(count > 0, _finish(acc, total, MODE), 0.0)
        store_rows(p_y + row * y_s, m_row & short, column, acc, D)
    if i_column == 0:
        own = m_row & short
        tl.store(p_total + row, total, mask=own)
        tl.store(p_log + row, tl.log(total), mask=own)

    if tl.max(count) > LONG:
        lane = tl.arange(0, CHUNK)[:, None]
        for i in range(0, ROWS):
            here = first + i
            start = tl.load(p_ptr + here, mask=here < rows, other=0)
            length = tl.load(p_ptr + here + 1, mask=here < rows, other=0) - start
            if length > LONG:
                many = tl.full((CHUNK, BLOCK_D), start_value, tl.float32)
                weights = tl.zeros((CHUNK, 1), tl.float32)
                for j in range(0, length, CHUNK):
                    m = j + lane < length
                    token = tl.load(p_members + start + j + lane, mask=m, other=0).to(tl.int64)
                    many, weights = _add(many, weights, p_x, p_weight, x_s, token, m, column, D, MODE, HAS_WEIGHT)
                one = tl.zeros((1, 1), tl.int64) + here
                whole = _combine(weights, CHUNK, 1, SUM) if HAS_WEIGHT else tl.zeros((1, 1), tl.float32) + length
                if MODE != REPLACE:
                    y = _finish(_combine(many, CHUNK, BLOCK_D, MODE), whole, MODE)
                    store_rows(p_y + one * y_s, True, column, y, D)
                if i_column == 0:
                    tl.store(p_total + one, whole)
                    tl.store(p_log + one, tl.log(whole))


def merge(x, weight, ptr, members, head, mode):
    """y [B, M, D] in the dtype of x, total and log(total) [B, M] fp32, from x [B, N, D]."""
    import torch

    batch, tokens, width = x.shape
    rows = head.shape[1]
    y = x.new_empty((batch, rows, width))
    total, log_total = (x.new_empty((batch, rows), dtype=torch.float32) for _ in range(2))
    block = matrix.blocks(width)
    tiles, blocks = -(-rows // block["ROWS"]), max(1, -(-width // block["BLOCK_D"]))
    if batch * rows == 0:
        return y, total, log_total
    weighted = weight is not None
    weight = weight.float().contiguous() if weighted else total
    ptr, members, head = (t.contiguous() for t in (ptr, members, head))
    align = matrix.alignment(x, y)
    with launch.on_device(x):
        merge_kernel[(batch * tiles * blocks,)](
            x, weight, ptr, members, head, y, total, log_total,
            tokens=tokens, rows=rows, tiles=tiles, blocks=blocks, **matrix.stride_args(align, x=x, y=y),
            weight_stride=matrix.shared_stride(weight) if weighted else 0, plan_stride=int(ptr.shape[0] > 1),
            D=width, MODE=mode, HAS_WEIGHT=weighted, ALIGN=align, LONG=LONG, CHUNK=CHUNK,
            **block, num_warps=4, maxnreg=128, **matrix.OPTIONS,
        )  # fmt: skip
    return y, total, log_total
