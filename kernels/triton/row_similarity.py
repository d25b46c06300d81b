"""Cosine of matching rows; saccade/reference/row_similarity.py is the specification."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch, matrix
from saccade._triton.matrix import inverse_root, row_products
from saccade._triton.tile import program


@triton.jit(do_not_specialize=matrix.SIZES)
def row_similarity_kernel(
    x_ptr, y_ptr, out_ptr, tokens, tiles, x_stride_b, x_stride_s, y_stride_b, y_stride_s,
    C: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    _, i_tile, i_b = program(1, tiles)
    i = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m = i < tokens
    p_x = x_ptr + (i_b * x_stride_b + i * x_stride_s) * X_ALIGN
    p_y = y_ptr + (i_b * y_stride_b + i * y_stride_s) * Y_ALIGN
    xx, yy, xy = row_products(p_x, p_y, m, C, ROWS, BLOCK_D)
    out = xy * inverse_root(xx) * inverse_root(yy)
    finite = (xx < float("inf")) & (yy < float("inf"))
    tl.store(out_ptr + i_b * tokens + i, tl.where(finite, out, float("nan")), mask=m)


def row_similarity(x, y):
    """Out [B, N] fp32 from x and y [B, N, C]."""
    import torch

    batch, tokens, channels = x.shape
    out = x.new_empty((batch, tokens), dtype=torch.float32)
    if out.numel() == 0:
        return out
    (x, x_align), (y, y_align) = matrix.summed(x), matrix.summed(y)
    block = matrix.blocks(channels)
    tiles = -(-tokens // block["ROWS"])
    with launch.on_device(x):
        row_similarity_kernel[(batch * tiles,)](
            x, y, out, tokens=tokens, tiles=tiles,
            **matrix.stride_args(x_align, x=x), **matrix.stride_args(y_align, y=y),
            C=channels, X_ALIGN=x_align, Y_ALIGN=y_align, **block, num_warps=4, **matrix.OPTIONS,
        )  # fmt: skip
    return out
