"""Rows [B, N, D] of the token-merging kernels: strides, alignment, and what a program of rows and columns works on.

Strides arrive divided by ALIGN elements, as in tile.py. `INTERPRET` says whether Triton interprets.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton import knobs

from saccade._triton import launch
from saccade._triton.tile import narrow

if TYPE_CHECKING:
    import torch

INTERPRET = tl.constexpr(bool(knobs.runtime.interpret))

# Arguments that change from call to call: a kernel must not be compiled anew for their values.
SIZES = (
    " ".join(launch.SIZES)
    + " sources destinations range_count r k threshold temperature blocks first_row inner_rows row_pitch"
    + " plan_stride weight_stride src_stride dst_stride ranges_stride protect_stride score_stride"
    + " y_stride_b y_stride_s residual_stride_b residual_stride_s gate_stride_b gate_stride_s"
    + " size_t size_h size_w out_t out_h out_w kernel_t kernel_h kernel_w stride_t stride_h stride_w"
    + " x_stride_t x_stride_y x_stride_x"
).split()

# Scores and sums are compared by value, so a product and a sum may be one operation.
OPTIONS = {"enable_fp_fusion": True}

BLOCK_D = 256  # columns of a tile at most: 768, 1280 and 3584 are multiples of it
TILE = 2048  # elements of a tile
ROWS = 64  # rows of it at most: every one costs addresses


def strides(x: torch.Tensor) -> tuple[int, int]:
    """Batch and row stride of x [B, N, D] in elements; 0 where the axis has one entry."""
    b, s = (0 if n == 1 else st for n, st in zip(x.shape[:2], x.stride()[:2], strict=True))
    return b, s


def alignment(*tensors: torch.Tensor) -> int:
    """Largest power of two, at most 16 bytes, that divides every stride, in elements of the first."""
    align = 16 // tensors[0].element_size()
    for x in tensors:
        align = math.gcd(align, *strides(x))
    return align


def stride_args(align: int, **tensors: torch.Tensor) -> dict[str, int]:
    """`<name>_stride_{b,s}` of every tensor, in units of `align` elements."""
    return {
        f"{name}_stride_{d}": st // align for name, x in tensors.items() for d, st in zip("bs", strides(x), strict=True)
    }


def summed(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [B, N, C] as the kernels that sum rows want it, and its alignment, which depends on C alone.

    The order of a sum follows from how wide a vector may be loaded. It must not depend on where a row lies, so what is not aligned
    for the width that C permits is copied.
    """
    align = math.gcd(16 // x.element_size(), x.shape[-1])
    regular = x.data_ptr() % 16 == 0 and all(st % align == 0 for st in strides(x))
    return (x if regular else launch.aligned(x)), align


def blocks(width: int) -> dict[str, int]:
    """ROWS and BLOCK_D of a tile for rows of `width` columns."""
    columns = min(BLOCK_D, launch.power_of_two(width))
    return {"ROWS": min(TILE // columns, ROWS), "BLOCK_D": columns}


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """Index tensors are walked with stride 1."""
    return None if x is None else x.contiguous()


def shared_stride(x: torch.Tensor) -> int:
    """Batch stride of a contiguous table: 0 where it serves all samples."""
    return 0 if x.shape[0] == 1 else x.stride(0)


@triton.jit
def load_rows(p_row, m_row, column, D: tl.constexpr):
    """Columns < D of the rows that m_row [rows, 1] names, zero elsewhere."""
    return tl.load(p_row + column, mask=m_row & (column < D), other=0.0)


@triton.jit
def store_rows(p_row, m_row, column, y, D: tl.constexpr):
    """Inverse of `load_rows`; fp32 is rounded to the element type of p_row."""
    tl.store(p_row + column, narrow(y, p_row.dtype.element_ty), mask=m_row & (column < D))


@triton.jit
def inverse_root(square):
    """1 / sqrt(square), 0 for 0: exact where the root is a power of two."""
    root = tl.div_rn(1.0 + tl.zeros_like(square), tl.sqrt_rn(square))
    return tl.where(square > 0, root, 0.0)


@triton.jit
def row_products(p_x, p_y, m_row, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums over C of x x, y y and x y, [rows, 1] fp32."""
    xx = tl.zeros((ROWS, BLOCK_C), tl.float32)
    yy = tl.zeros((ROWS, BLOCK_C), tl.float32)
    xy = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)[None, :]
        x = load_rows(p_x, m_row, column, C).to(tl.float32)
        y = load_rows(p_y, m_row, column, C).to(tl.float32)
        xx += x * x
        yy += y * y
        xy += x * y
    return tl.sum(xx, 1)[:, None], tl.sum(yy, 1)[:, None], tl.sum(xy, 1)[:, None]


@triton.jit
def row_square(p_x, m_row, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Squared norms, [rows, 1] fp32."""
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        x = load_rows(p_x, m_row, start + tl.arange(0, BLOCK_C)[None, :], C).to(tl.float32)
        total += x * x
    return tl.sum(total, 1)[:, None]
