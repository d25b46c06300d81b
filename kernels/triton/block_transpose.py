"""The lists of a layout by column; saccade/reference/block_transpose.py is the specification.

Every entry writes its place, plus one, into a table [groups, rows, columns]; columns of it are then counted and read downwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch

SIZES = ["rows", "columns", "entries", "tiles"]
ROWS, COLUMNS, ENTRIES = 64, 64, 128


@triton.jit(do_not_specialize=SIZES)
def transpose_place_kernel(start_ptr, count_ptr, index_ptr, table_ptr, columns, entries, ENTRIES: tl.constexpr):
    """A program takes one list."""
    i_list = tl.program_id(0).to(tl.int64)
    start, count = tl.load(start_ptr + i_list).to(tl.int64), tl.load(count_ptr + i_list)
    for first in range(0, count, ENTRIES):
        n = first + tl.arange(0, ENTRIES)
        place = start + n
        m = (n < count) & (place >= 0) & (place < entries)
        column = tl.load(index_ptr + place, mask=m, other=0)
        m = m & (column >= 0) & (column < columns)
        tl.store(table_ptr + i_list * columns + column, (place + 1).to(tl.int32), mask=m)


@triton.jit(do_not_specialize=SIZES)
def transpose_count_kernel(table_ptr, count_ptr, rows, columns, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program takes some columns of one group."""
    i_group = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        m = (row < rows) & (column < columns)[None, :]
        held = tl.load(table_ptr + (i_group * rows + row) * columns + column[None, :], mask=m, other=0)
        total += tl.sum((held != 0).to(tl.int32), 0)
    tl.store(count_ptr + i_group * columns + column, total, mask=column < columns)


@triton.jit(do_not_specialize=SIZES)
def transpose_fill_kernel(
    table_ptr, start_ptr, id_ptr, index_ptr, out_id_ptr, rows, columns, entries, tiles,
    HAS_IDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_group = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(start_ptr + i_group * columns + column, mask=column < columns, other=0)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        m = (row < rows) & (column < columns)[None, :]
        held = tl.load(table_ptr + (i_group * rows + row) * columns + column[None, :], mask=m, other=0)
        listed = (held != 0).to(tl.int32)
        to = begin[None, :] + tl.cumsum(listed, 0) - 1
        m = m & (held != 0) & (to < entries)  # lists that overlap have no room
        tl.store(index_ptr + to, tl.zeros_like(to) + row, mask=m)
        if HAS_IDS:
            tl.store(out_id_ptr + to, tl.load(id_ptr + held - 1, mask=m, other=0), mask=m)
        begin += tl.sum(listed, 0)


def block_transpose(starts, counts, indices, ids, columns):
    """starts and counts [Lb, Lh, columns], indices and ids [number of entries], int32."""
    import torch

    lead, rows, entries = starts.shape[:2], starts.shape[2], indices.numel()
    groups = lead[0] * lead[1]
    t_counts = starts.new_zeros((*lead, columns))
    t_indices, t_ids = starts.new_zeros(entries), starts.new_zeros(0 if ids is None else entries)
    if groups * rows * columns == 0:
        return torch.zeros_like(t_counts), t_counts, t_indices, t_ids
    table = starts.new_zeros((groups, rows, columns))
    tiles = -(-columns // COLUMNS)
    given, sizes = indices.contiguous(), {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4}
    with launch.on_device(starts):
        transpose_place_kernel[(groups * rows,)](
            starts.contiguous(), counts.contiguous(), given, table, columns, entries, ENTRIES=ENTRIES, num_warps=1
        )
        transpose_count_kernel[(groups * tiles,)](table, t_counts, rows, columns, tiles, **sizes)
        flat = t_counts.flatten()
        t_starts = (flat.cumsum(0) - flat).to(torch.int32).view(t_counts.shape)
        transpose_fill_kernel[(groups * tiles,)](
            table, t_starts, given if ids is None else ids.contiguous(), t_indices, t_ids, rows, columns, entries, tiles,
            HAS_IDS=ids is not None, **sizes,
        )  # fmt: skip
    return t_starts, t_counts, t_indices, t_ids
