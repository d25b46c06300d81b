"""Sums of partial results in a fixed order: the second half of every gradient that is summed over tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from saccade._triton import launch

if TYPE_CHECKING:
    import torch

ROWS = 128
COLUMNS = 32


@triton.jit(do_not_specialize=launch.SIZES)
def sum_rows_kernel(x_ptr, y_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [rows, columns] fp32 to y [ceil(rows / ROWS), columns]."""
    i_row = tl.program_id(0).to(tl.int64)
    row = i_row * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + row * columns + column, mask=(row < rows) & (column < columns), other=0.0)
    y = tl.sum(x, 0)[None, :]
    tl.store(y_ptr + i_row * columns + column, y, mask=column < columns)


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """Sum of x [N, M] fp32 (N >= 1, contiguous) over its rows, [M]: passes of ROWS rows each, until one is left."""
    while x.shape[0] > 1:
        y = x.new_empty(-(-x.shape[0] // ROWS), x.shape[1])
        with launch.on_device(x):
            sum_rows_kernel[(y.shape[0], -(-x.shape[1] // COLUMNS))](
                x, y, x.shape[0], x.shape[1], ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4, **launch.OPTIONS
            )
        x = y
    return x[0]
