r"""Gradient of prompt_pool3d; saccade/reference/prompt_pool3d.py is the specification.

One launch finds of every window its largest weight, the sum of exponentials and dy . y; in the other every place gathers from the
windows it lies in, in ascending order: dx = sum a dy, and dp = (dx . x - sum a (dy . y)) / temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch, matrix
from saccade._triton.matrix import load_rows, store_rows
from saccade._triton.prompt_pool3d import (
    attention,
    corner,
    largest_weight,
    out_sizes,
    volume_strides,
    wide,
    window_args,
    window_place,
)
from saccade._triton.tile import program


@triton.jit(do_not_specialize=matrix.SIZES)
def prompt_pool3d_windows_kernel(
    dy_ptr, x_ptr, weight_ptr, window_ptr, tiles, temperature,
    size_t, size_h, size_w, out_t, out_h, out_w, kernel_t, kernel_h, kernel_w, stride_t, stride_h, stride_w,
    x_stride_b, x_stride_t, x_stride_y, x_stride_x, dy_stride_b, dy_stride_s,
    D: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """window [B, outputs, 3] fp32."""
    _, i_tile, i_b = program(1, tiles)
    out = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    outputs = out_t.to(tl.int64) * out_h * out_w
    m = out < outputs
    p_x = x_ptr + i_b * x_stride_b * ALIGN
    x_t, x_h, x_w = wide(x_stride_t, ALIGN), wide(x_stride_y, ALIGN), wide(x_stride_x, ALIGN)
    p_dy = dy_ptr + (i_b * dy_stride_b + out * dy_stride_s) * ALIGN
    p_weight = weight_ptr + i_b * size_t * size_h * size_w
    t, h, w = corner(out, out_h, out_w, stride_t, stride_h, stride_w)
    top = largest_weight(p_weight, m, t, h, w, size_h, size_w, kernel_t, kernel_h, kernel_w, ROWS)
    total = tl.zeros((ROWS, 1), tl.float32)
    dot = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)[None, :]
        g = load_rows(p_dy, m, column, D).to(tl.float32)
        for j in range(0, kernel_t * kernel_h * kernel_w):
            t_in, h_in, w_in = window_place(j, t, h, w, kernel_h, kernel_w)
            e = attention(p_weight, m, t_in, h_in, w_in, size_h, size_w, top, temperature)
            place = t_in * x_t + h_in * x_h + w_in * x_w
            dot += e * (g * load_rows(p_x + place, m, column, D).to(tl.float32))
            total += tl.where(start == 0, e, 0.0)
    p = window_ptr + (i_b * outputs + out) * 3
    tl.store(p, top, mask=m)
    tl.store(p + 1, total, mask=m)
    tl.store(p + 2, tl.div_rn(tl.sum(dot, 1)[:, None], total), mask=m)


@triton.jit
def windows_of(place, kernel, stride, out):
    """First window that holds a place along one axis, and how many do."""
    first = tl.maximum(place - kernel + stride, 0) // stride
    return first, tl.maximum(tl.minimum(place // stride, out - 1) - first + 1, 0)


@triton.jit(do_not_specialize=matrix.SIZES)
def prompt_pool3d_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, window_ptr, dx_ptr, dweight_ptr, tiles, temperature,
    size_t, size_h, size_w, out_t, out_h, out_w, kernel_t, kernel_h, kernel_w, stride_t, stride_h, stride_w,
    x_stride_b, x_stride_t, x_stride_y, x_stride_x, dy_stride_b, dy_stride_s, dx_stride_b, dx_stride_s,
    D: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    _, i_tile, i_b = program(1, tiles)
    i = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    tokens = size_t.to(tl.int64) * size_h * size_w
    outputs = out_t.to(tl.int64) * out_h * out_w
    m = i < tokens
    t, h, w = corner(i, size_h, size_w, 1, 1, 1)
    t_first, t_many = windows_of(t, kernel_t, stride_t, out_t)
    h_first, h_many = windows_of(h, kernel_h, stride_h, out_h)
    w_first, w_many = windows_of(w, kernel_w, stride_w, out_w)
    many = tl.where(m, t_many * h_many * w_many, 0)
    h_many, w_many = tl.maximum(h_many, 1), tl.maximum(w_many, 1)
    steps = tl.max(many)
    p_weight, p_window = weight_ptr + i_b * tokens, window_ptr + i_b * outputs * 3
    p_x = x_ptr + i_b * x_stride_b * ALIGN
    p_x += t * wide(x_stride_t, ALIGN) + h * wide(x_stride_y, ALIGN) + w * wide(x_stride_x, ALIGN)
    p_dy = dy_ptr + i_b * dy_stride_b * ALIGN
    p_dx = dx_ptr + (i_b * dx_stride_b + i * dx_stride_s) * ALIGN
    dot = tl.zeros((ROWS, BLOCK_D), tl.float32)
    mean = tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)[None, :]
        dx = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for j in range(0, steps):
            own = j < many
            o_t = t_first + j // (h_many * w_many)
            o_h, o_w = h_first + j // w_many % h_many, w_first + j % w_many
            out = ((o_t * out_h + o_h) * out_w + o_w).to(tl.int64)
            top = tl.load(p_window + out * 3, mask=own, other=0.0)
            total = tl.load(p_window + out * 3 + 1, mask=own, other=1.0)
            product = tl.load(p_window + out * 3 + 2, mask=own, other=0.0)
            a = tl.div_rn(attention(p_weight, own, t, h, w, size_h, size_w, top, temperature), total)
            g = load_rows(p_dy + out * dy_stride_s * ALIGN, own, column, D).to(tl.float32)
            dx = tl.where(own, dx + a * g, dx)
            mean += tl.where(own & (start == 0), a * product, 0.0)
        store_rows(p_dx, m, column, dx, D)
        x = load_rows(p_x, many > 0, column, D).to(tl.float32)
        dot += dx * x
    dweight = tl.div_rn(tl.sum(dot, 1)[:, None] - mean, tl.zeros((ROWS, 1), tl.float32) + temperature)
    tl.store(dweight_ptr + i_b * tokens + i, tl.where(many > 0, dweight, 0.0), mask=m)


def prompt_pool3d_bwd(dy, x, weights, kt, kh, kw, st, sh, sw, temperature):
    """dx [B, T, H, W, D] and dweights [B, T, H, W] fp32, from dy [B, To, Ho, Wo, D]."""
    import math

    import torch

    batch, *size, width = x.shape
    kernel, stride = (kt, kh, kw), (st, sh, sw)
    out = out_sizes(size, kernel, stride)
    outputs = math.prod(out)
    if batch * outputs * width == 0:
        return x.new_zeros(x.shape), x.new_zeros(x.shape[:4], dtype=torch.float32)
    dx, dweights = x.new_empty(x.shape), x.new_empty(x.shape[:4], dtype=torch.float32)
    weights = weights.float().contiguous()
    dy, align = matrix.summed(dy.contiguous().view(batch, outputs, width))
    steps = volume_strides(x)
    if x.data_ptr() % 16 or any(n % align for n in steps):  # sums must not depend on where a row lies
        x = launch.aligned(x)
        steps = volume_strides(x)
    tokens = dx.view(batch, -1, width)
    b, t, h, w = (n // align for n in steps)
    common = {
        "temperature": float(temperature), **window_args(size, out, kernel, stride),
        "x_stride_b": b, "x_stride_t": t, "x_stride_y": h, "x_stride_x": w, **matrix.stride_args(align, dy=dy),
        "D": width, "ALIGN": align, **(block := matrix.blocks(width)), "num_warps": 4, "maxnreg": 192, **matrix.OPTIONS,
    }  # fmt: skip
    window = dweights.new_empty((batch, outputs, 3))
    with launch.on_device(x):
        tiles = -(-outputs // block["ROWS"])
        prompt_pool3d_windows_kernel[(batch * tiles,)](dy, x, weights, window, tiles=tiles, **common)
        tiles = -(-tokens.shape[1] // block["ROWS"])
        prompt_pool3d_bwd_kernel[(batch * tiles,)](
            dy, x, weights, window, dx, dweights, tiles=tiles, **matrix.stride_args(align, dx=tokens), **common
        )
    return dx, dweights
