"""Pooling by a softmax inside every window; saccade/reference/prompt_pool3d.py is the specification.

A program makes a few outputs, some columns of each, and walks over the places of their windows, which lie alike: once for the largest
weight, once for the sums.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from saccade._triton import launch, matrix
from saccade._triton.matrix import store_rows
from saccade._triton.tile import program


@triton.jit
def wide(stride, ALIGN: tl.constexpr):
    """A stride in elements, int64."""
    return stride.to(tl.int64) * ALIGN


@triton.jit
def corner(out, out_h, out_w, stride_t, stride_h, stride_w):
    """First place (t, h, w) of the window of an output, int32."""
    out = out.to(tl.int32)
    plane = out_h * out_w
    return (out // plane) * stride_t, (out % plane // out_w) * stride_h, (out % out_w) * stride_w


@triton.jit
def window_place(j, t, h, w, kernel_h, kernel_w):
    """Place number j of a window whose first is (t, h, w)."""
    return t + j // (kernel_h * kernel_w), h + j // kernel_w % kernel_h, w + j % kernel_w


@triton.jit
def largest_weight(p_weight, m, t, h, w, size_h, size_w, kernel_t, kernel_h, kernel_w, ROWS: tl.constexpr):
    """Largest prompt weight of every window, [ROWS, 1]."""
    top = tl.full((ROWS, 1), float("-inf"), tl.float32)
    for j in range(0, kernel_t * kernel_h * kernel_w):
        t_in, h_in, w_in = window_place(j, t, h, w, kernel_h, kernel_w)
        p = tl.load(p_weight + (t_in * size_h + h_in) * size_w + w_in, mask=m, other=0.0)
        top = tl.maximum(top, p, propagate_nan=tl.PropagateNan.ALL)
    return top


@triton.jit
def attention(p_weight, m, t, h, w, size_h, size_w, top, temperature):
    """exp((p - top) / temperature) at a place."""
    p = tl.load(p_weight + (t * size_h + h) * size_w + w, mask=m, other=0.0)
    return tl.exp(tl.div_rn(p - top, tl.zeros_like(p) + temperature))


@triton.jit(do_not_specialize=matrix.SIZES)
def prompt_pool3d_kernel(
    x_ptr, weight_ptr, y_ptr, tiles, blocks, temperature,
    size_t, size_h, size_w, out_t, out_h, out_w, kernel_t, kernel_h, kernel_w, stride_t, stride_h, stride_w,
    x_stride_b, x_stride_t, x_stride_y, x_stride_x, y_stride_b, y_stride_s,
    D: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x strides: batch, time, height (y), width (x)."""
    i_column, i_tile, i_b = program(blocks, tiles)
    out = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m = out < out_t.to(tl.int64) * out_h * out_w
    column = i_column * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    p_x = x_ptr + i_b * x_stride_b * ALIGN + column
    x_t, x_h, x_w = wide(x_stride_t, ALIGN), wide(x_stride_y, ALIGN), wide(x_stride_x, ALIGN)
    p_weight = weight_ptr + i_b * size_t * size_h * size_w
    t, h, w = corner(out, out_h, out_w, stride_t, stride_h, stride_w)
    top = largest_weight(p_weight, m, t, h, w, size_h, size_w, kernel_t, kernel_h, kernel_w, ROWS)
    total = tl.zeros((ROWS, 1), tl.float32)
    y = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for j in range(0, kernel_t * kernel_h * kernel_w):
        t_in, h_in, w_in = window_place(j, t, h, w, kernel_h, kernel_w)
        e = attention(p_weight, m, t_in, h_in, w_in, size_h, size_w, top, temperature)
        x = tl.load(p_x + t_in * x_t + h_in * x_h + w_in * x_w, mask=m & (column < D), other=0.0).to(tl.float32)
        total += e
        y += e * x
    y = tl.div_rn(y, tl.broadcast_to(total, y.shape))
    store_rows(y_ptr + (i_b * y_stride_b + out * y_stride_s) * ALIGN, m, column, y, D)


def volume_strides(x) -> tuple[int, ...]:
    """Strides of [B, T, H, W, D] but the last; 0 where the axis has one entry."""
    return tuple(0 if n == 1 else st for n, st in zip(x.shape[:4], x.stride()[:4], strict=True))


def window_args(size, out, kernel, stride) -> dict[str, Any]:
    """Sizes of the volume, the outputs, the window and its steps."""
    named = {"size": size, "out": out, "kernel": kernel, "stride": stride}
    return {f"{name}_{axis}": n for name, values in named.items() for axis, n in zip("thw", values, strict=True)}


def out_sizes(size, kernel, stride) -> tuple[int, ...]:
    """Outputs along every axis."""
    return tuple(max(0, (n - k) // s + 1) for n, k, s in zip(size, kernel, stride, strict=True))


def prompt_pool3d(x, weights, kt, kh, kw, st, sh, sw, temperature):
    """y [B, To, Ho, Wo, D] from x [B, T, H, W, D] and weights [B, T, H, W]."""
    import math

    batch, *size, width = x.shape
    kernel, stride = (kt, kh, kw), (st, sh, sw)
    out = out_sizes(size, kernel, stride)
    y = x.new_empty((batch, *out, width))
    if y.numel() == 0:
        return y
    weights = weights.float().contiguous()
    flat = y.view(batch, -1, width)
    steps = volume_strides(x)
    align = math.gcd(matrix.alignment(flat), *steps)
    block = matrix.blocks(width)
    tiles, blocks = -(-flat.shape[1] // block["ROWS"]), -(-width // block["BLOCK_D"])
    b, t, h, w = (n // align for n in steps)
    with launch.on_device(x):
        prompt_pool3d_kernel[(batch * tiles * blocks,)](
            x, weights, y, tiles=tiles, blocks=blocks, temperature=float(temperature),
            **window_args(size, out, kernel, stride), x_stride_b=b, x_stride_t=t, x_stride_y=h, x_stride_x=w,
            **matrix.stride_args(align, y=flat), D=width, ALIGN=align, **block, num_warps=4, maxnreg=128, **matrix.OPTIONS,
        )  # fmt: skip
    return y
