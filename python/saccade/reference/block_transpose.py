r"""The lists of a block layout by column instead of by row: what dK and dV go along.

    row R is in list C of the result  <=>  column C is in list R of the input

The lists of the result lie one behind the other, by batch, head and column; rows ascend in each; 0 behind the last. An entry keeps its id.
Lists of the input do not overlap in storage, so the result has room for every entry.
"""

from __future__ import annotations

import torch


def block_transpose(
    starts: torch.Tensor, counts: torch.Tensor, indices: torch.Tensor, ids: torch.Tensor | None, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Starts and counts [Lb, Lh, columns], indices and ids [number of elements of `indices`] (ids empty for None), all int32.

    Args:
        starts, counts: [Lb, Lh, rows] int32: list `row` has entries start .. start + count of the flat `indices`.
        indices: int32, any shape, contiguous, column of each entry.
        ids: shaped as `indices`, int32, or None.
        columns: number of columns.
    """
    flat, rows = indices.flatten(), starts.shape[-1]
    group_count = starts.shape[0] * starts.shape[1]
    # Every entry once, by list: (list, place in the list) -> place in storage.
    length = counts.flatten().long()
    lists = torch.arange(group_count * rows, device=flat.device).repeat_interleave(length)
    first = length.cumsum(0) - length
    place = torch.arange(len(lists), device=flat.device) - first[lists] + starts.flatten().long()[lists]
    key = lists // max(rows, 1) * columns + flat[place].long()  # group and column; rows ascend already
    order = key.argsort(stable=True)
    t_counts = torch.zeros(group_count * columns, dtype=torch.int64, device=flat.device)
    t_counts.scatter_add_(0, key, torch.ones_like(key))
    t_starts = t_counts.cumsum(0) - t_counts
    t_indices = torch.zeros_like(flat)
    t_indices[: len(key)] = (lists % max(rows, 1))[order].int()
    t_ids = torch.zeros_like(flat) if ids is not None else flat.new_empty(0)
    if ids is not None:
        t_ids[: len(key)] = ids.flatten()[place[order]]
    shape = (*starts.shape[:2], columns)
    return t_starts.view(shape).int(), t_counts.view(shape).int(), t_indices, t_ids
