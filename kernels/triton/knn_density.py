"""Mean distance to the nearest rows; saccade/reference/knn_density.py is the specification.

Distances of a block of rows to all others are written out, as many rows as the workspace holds, and a program per row then finds its k
smallest by counting, as merge_plan finds the best scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch, matrix
from saccade._triton.keep_top import block, warps
from saccade._triton.match import tiles
from saccade._triton.matrix import row_square
from saccade._triton.products import held_block, products
from saccade._triton.select import NEAREST, block_at, is_chosen, load_keys, select_cut
from saccade._triton.tile import program

WORKSPACE = 1 << 24  # distances held at a time
PITCH = tl.constexpr(16)  # elements that rows of distances are padded to


@triton.jit(do_not_specialize=matrix.SIZES)
def knn_density_squares_kernel(
    x_ptr, square_ptr, tokens, tiles, x_stride_b, x_stride_s,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    _, i_tile, i_b = program(1, tiles)
    i = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m = i < tokens
    square = row_square(x_ptr + (i_b * x_stride_b + i * x_stride_s) * ALIGN, m, C, ROWS, BLOCK_D)
    tl.store(square_ptr + i_b * tokens + i, square, mask=m)


@triton.jit(do_not_specialize=matrix.SIZES)
def knn_density_distances_kernel(
    x_ptr, square_ptr, distance_ptr, first_row, inner_rows, tokens, tiles, blocks, row_pitch, x_stride_b, x_stride_s,
    C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """distance [B, inner_rows, row_pitch * PITCH] of the rows from first_row on; +inf to a row that is not finite."""
    i_column, i_tile, i_b = program(blocks, tiles)
    local = i_tile.to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)[:, None]
    i = first_row + local
    j = i_column.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    m_i, m_j = (local < inner_rows) & (i < tokens), j < tokens
    p_square = square_ptr + i_b * tokens
    own = tl.load(p_square + i, mask=m_i, other=float("inf"))
    other = tl.load(p_square + j, mask=m_j, other=float("inf"))
    p_x, x_s = x_ptr + i_b * x_stride_b * ALIGN, x_stride_s.to(tl.int64) * ALIGN
    p_a, m_a, m_b = p_x + i * x_s, own < float("inf"), other < float("inf")
    a = held_block(p_a, m_a, C, BLOCK_K)
    dot = products(a, p_a, m_a, p_x + j * x_s, m_b, C, BLOCK_A, BLOCK_B, BLOCK_K)
    distance = tl.maximum(own + other - 2 * dot, 0.0)
    distance = tl.where(m_a & m_b, tl.where(i == j, 0.0, distance), float("inf"))
    p = distance_ptr + (i_b * inner_rows + local) * row_pitch * PITCH + j
    tl.store(p, distance, mask=m_i & m_j)


@triton.jit(do_not_specialize=matrix.SIZES)
def knn_density_mean_kernel(
    square_ptr, distance_ptr, out_ptr, first_row, inner_rows, tokens, row_pitch, k,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean of the k smallest distances of a row, in the order of their places, over C."""
    local, _, i_b = program(inner_rows, 1)
    i = i_b * tokens + first_row + local
    p_distance = distance_ptr + (i_b * inner_rows + local) * row_pitch * PITCH
    cut, last, number = select_cut(p_distance, p_distance, tokens, k, 0.0, NEAREST, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    i_column = tl.arange(0, BLOCK)
    for start in range(0, tokens, BLOCK):
        m = i_column < block_at(tokens, start, BLOCK)
        key = load_keys(p_distance + start, p_distance + start, i_column, m, 0.0, NEAREST)
        m = m & is_chosen(key, i_column, cut, block_at(last, start, BLOCK))
        total += tl.load(p_distance + start + i_column, mask=m, other=0.0)
    mean = tl.div_rn(tl.sum(total), tl.maximum(number, 1).to(tl.float32))
    mean = tl.div_rn(mean, tl.full((), C, tl.float32))
    finite = tl.load(square_ptr + i) < float("inf")
    tl.store(out_ptr + i, tl.where(finite, mean, float("inf")))


def knn_density(x, k):
    """Out [B, N] fp32 from x [B, N, C]."""
    import torch

    batch, tokens, channels = x.shape
    out = x.new_empty((batch, tokens), dtype=torch.float32)
    if out.numel() == 0:
        return out
    x, align = matrix.summed(x)
    square = torch.empty_like(out)
    rows, config = matrix.blocks(channels), tiles(channels, x.element_size())
    pitch = -(-tokens // PITCH.value)
    block_a, block_b = config["BLOCK_A"], config["BLOCK_B"]
    inner = max(1, WORKSPACE // (batch * pitch * PITCH.value * block_a)) * block_a
    inner = min(inner, tokens)
    distance = out.new_empty(batch * inner * pitch * PITCH.value)
    places = matrix.stride_args(align, x=x)
    with launch.on_device(x):
        count = -(-tokens // rows["ROWS"])
        knn_density_squares_kernel[(batch * count,)](
            x, square, tokens=tokens, tiles=count, **places,
            C=channels, ALIGN=align, **rows, num_warps=4, **matrix.OPTIONS,
        )  # fmt: skip
        for first in range(0, tokens, inner):
            part = {"first_row": first, "inner_rows": min(inner, tokens - first), "tokens": tokens, "row_pitch": pitch}
            count, blocks = -(-part["inner_rows"] // block_a), -(-tokens // block_b)
            knn_density_distances_kernel[(batch * count * blocks,)](
                x, square, distance, **part, tiles=count, blocks=blocks, **places,
                C=channels, ALIGN=align, **config, **matrix.OPTIONS,
            )  # fmt: skip
            knn_density_mean_kernel[(batch * part["inner_rows"],)](
                square, distance, out, **part, k=k, C=channels, BLOCK=block(tokens), num_warps=warps(tokens), maxnreg=128, **matrix.OPTIONS,
            )  # fmt: skip
    return out
