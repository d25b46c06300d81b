"""The way back: every token takes the row it was merged into; saccade/reference/unmerge.py is the specification."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch, matrix
from saccade._triton.matrix import load_rows, store_rows
from saccade._triton.tile import program


@triton.jit(do_not_specialize=matrix.SIZES)
def unmerge_kernel(
    y_ptr, inverse_ptr, residual_ptr, gate_ptr, x_ptr, tokens, tiles, blocks,
    y_stride_b, y_stride_s, residual_stride_b, residual_stride_s, gate_stride_b, gate_stride_s, x_stride_b, x_stride_s,
    plan_stride,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x[token] = residual[token] + gate[token] y[inverse[token]]."""
    i_column, i_tile, i_b = program(blocks, tiles)
    i = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m = i < tokens
    row = tl.load(inverse_ptr + i_b * plan_stride * tokens + i, mask=m, other=-1)
    column = i_column * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    p_x = x_ptr + (i_b * x_stride_b + i * x_stride_s) * ALIGN
    y = load_rows(y_ptr + (i_b * y_stride_b + row.to(tl.int64) * y_stride_s) * ALIGN, row >= 0, column, D)
    if HAS_RESIDUAL or HAS_GATE:
        out = y.to(tl.float32)
        if HAS_GATE:
            p_gate = gate_ptr + (i_b * gate_stride_b + i * gate_stride_s) * ALIGN
            out *= load_rows(p_gate, m, column, D).to(tl.float32)
        if HAS_RESIDUAL:
            p_residual = residual_ptr + (i_b * residual_stride_b + i * residual_stride_s) * ALIGN
            out += load_rows(p_residual, m, column, D).to(tl.float32)
        store_rows(p_x, m, column, out, D)
    else:  # a copy keeps bits
        tl.store(p_x + column, y, mask=m & (column < D))


def unmerge(y, inverse, residual, gate):
    """Out [B, N, D] from y [B, M, D]; residual [B, N, D] and gate [1|B, 1|N, D] may be None."""
    batch, _, width = y.shape
    tokens = inverse.shape[1]
    x = y.new_empty((batch, tokens, width))
    if x.numel() == 0:
        return x
    inverse = inverse.contiguous()
    given = [t for t in (residual, gate) if t is not None]
    align = matrix.alignment(y, x, *given)
    block = matrix.blocks(width)
    tiles, blocks = -(-tokens // block["ROWS"]), -(-width // block["BLOCK_D"])
    has_residual, has_gate = residual is not None, gate is not None
    residual, gate = (x if t is None else t for t in (residual, gate))
    with launch.on_device(y):
        unmerge_kernel[(batch * tiles * blocks,)](
            y, inverse, residual, gate, x, tokens=tokens, tiles=tiles, blocks=blocks,
            **matrix.stride_args(align, y=y, residual=residual, gate=gate, x=x),
            plan_stride=int(inverse.shape[0] > 1), D=width, HAS_RESIDUAL=has_residual, HAS_GATE=has_gate,
            ALIGN=align, **block, num_warps=4, **matrix.OPTIONS,
        )  # fmt: skip
    return x
