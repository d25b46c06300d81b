"""From maps of blocks to lists, on the device and without waiting for it."""

from __future__ import annotations

from typing import Any

import torch

from saccade._tensors import names
from saccade.attention.layout import BlockLists


def four(name: str, x: Any, dtype: torch.dtype, last: tuple[int, int]) -> torch.Tensor:
    """`x` as [1|B, 1|H, *last] of `dtype`."""
    wanted = f"a {names(dtype)} tensor [{last[0]}, {last[1]}] or [B, H, {last[0]}, {last[1]}]"
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected {wanted}, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {wanted}, got {names(x.dtype)}")
    if x.ndim not in (2, 4) or tuple(x.shape[-2:]) != last:
        raise ValueError(f"{name}: expected {wanted}, got shape {list(x.shape)}")
    return x if x.ndim == 4 else x[None, None]


def by_query_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`x` [.., 1|Hk, ..], which tells key heads apart, told apart by query heads: each key head serves a group of them."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)


def padded_starts(counts: torch.Tensor, width: int) -> torch.Tensor:
    """Where the lists begin in padded storage [..., width]."""
    rows = torch.arange(counts.numel(), dtype=torch.int32, device=counts.device)
    return (rows * width).reshape(counts.shape)


def compact(chosen: torch.Tensor, ids: torch.Tensor | None = None) -> BlockLists:
    """Padded lists of the True entries of [Lb, Lh, rows, columns], ascending; 0 behind the last. `ids` is shaped alike."""
    columns = chosen.shape[-1]
    counts = chosen.sum(-1, dtype=torch.int32)
    # A stable sort brings the chosen columns to the front, in their order.
    order = torch.sort((~chosen).to(torch.uint8), dim=-1, stable=True).indices
    behind = torch.arange(columns, device=chosen.device) >= counts[..., None]
    indices = order.masked_fill(behind, 0).to(torch.int32).contiguous()
    if ids is not None:
        ids = ids.gather(-1, order).masked_fill(behind, 0).to(torch.int32).contiguous()
    return BlockLists(padded_starts(counts, columns), counts, indices, ids)


def numbered(chosen: torch.Tensor) -> torch.Tensor:
    """int32, shaped as the bool `chosen`: the True entries numbered from 0, in order; what stands at the others means nothing."""
    return (chosen.flatten().cumsum(0) - 1).reshape(chosen.shape).to(torch.int32)


def trim(lists: BlockLists) -> BlockLists:
    """Padded lists as narrow as their longest: reads its length from the device."""
    width = int(lists.counts.max()) if lists.counts.numel() else 0
    starts = padded_starts(lists.counts, width)
    indices, ids = (None if x is None else x[..., :width].contiguous() for x in (lists.indices, lists.ids))
    assert indices is not None
    return BlockLists(starts, lists.counts, indices, ids)
