"""Which rows hold something that is not finite: in a block seen in part they must not reach the rows that do not see them."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import attention_launch, launch
from saccade._triton.attention_tile import OPTIONS, SIZES, load_parts

ROWS = 64


@triton.jit(do_not_specialize=SIZES)
def row_flags_kernel(
    x_ptr, flag_ptr, heads, tiles, k_len, x_stride_b, x_stride_h, x_stride_s,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    i = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    p_row = x_ptr + (i_b * x_stride_b + i_h * x_stride_h + i[:, None] * x_stride_s) * ALIGN
    x1, x2 = load_parts(p_row, (i < k_len)[:, None], D, D1, D2, True)
    flag = tl.sum(x1.to(tl.float32) * 0.0, 1)  # NaN for what is not finite
    if D2 > 0:
        flag += tl.sum(x2.to(tl.float32) * 0.0, 1)
    tl.store(flag_ptr + (i_b * heads + i_h) * k_len + i, flag, mask=i < k_len)


def row_flags(x, align):
    """[B, H, S] fp32 from x [B, H, S, D]: NaN where a row is not finite, else 0."""
    batch, heads, rows, head_dim = x.shape
    flags = x.new_empty(x.shape[:3], dtype=launch.float32())
    tiles = -(-rows // ROWS)
    if flags.numel():
        row_flags_kernel[(batch * heads * tiles,)](
            x, flags, heads=heads, tiles=tiles, k_len=rows, **launch.stride_args(align, x=x),
            **attention_launch.head_parts(head_dim), ALIGN=align, ROWS=ROWS, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return flags
