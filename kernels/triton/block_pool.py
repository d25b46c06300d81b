"""Mean of the tokens of each block; saccade/reference/block_pool.py is the specification. A program takes one block of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import attention_launch, launch
from saccade._triton.attention_tile import SIZES, tokens_at, values

ROWS = 16  # summed side by side


@triton.jit(do_not_specialize=[*SIZES, "order_stride_b", "order_stride_h", "blocks"])
def block_pool_kernel(
    x_ptr, order_ptr, out_ptr, heads, blocks, q_len, x_stride_b, x_stride_h, x_stride_s, order_stride_b, order_stride_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, HAS_ORDER: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i_block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_h, i_b = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    p_x = x_ptr + (i_b * x_stride_b + i_h * x_stride_h) * ALIGN
    p_order = order_ptr + i_b * order_stride_b + i_h * order_stride_h
    column = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    count = tl.zeros((ROWS,), tl.int32)
    for start in range(0, BLOCK, ROWS):
        token, exists = tokens_at(p_order, i_block * BLOCK + start + tl.arange(0, ROWS), q_len, HAS_ORDER)
        p_row = p_x + token[:, None] * x_stride_s * ALIGN
        total += values(tl.load(p_row + column, mask=exists[:, None] & (column < D), other=0.0)).to(tl.float32)
        count += exists.to(tl.int32)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(count), 1).to(tl.float32)
    i = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + (rest.to(tl.int64) * blocks + i_block) * D + i, mean, mask=i < D)


def block_pool(x, order, block):
    """[B, H, n, D] fp32 from x [B, H, S, D] and order [1|B, 1|H, n * block] or None."""
    batch, heads, tokens, width = x.shape
    blocks = -(-tokens // block) if order is None else order.shape[2] // block
    out = x.new_empty((batch, heads, blocks, width), dtype=launch.float32())
    if out.numel() == 0:
        return out
    order = None if order is None else order.contiguous()
    align = attention_launch.alignment(x)
    with launch.on_device(x):
        block_pool_kernel[(batch * heads * blocks,)](
            x, out if order is None else order, out, heads=heads, blocks=blocks, q_len=tokens,
            **launch.stride_args(align, x=x), **attention_launch.shared_strides("order", order),
            D=width, BLOCK_D=launch.power_of_two(width), BLOCK=block, HAS_ORDER=order is not None, ALIGN=align,
            ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return out
