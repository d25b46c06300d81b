"""From maps of blocks to lists, on the device and without waiting for it."""

from __future__ import annotations

from typing import Any

import torch

from saccade.attention.layout import BlockLists


def four(name: str, x: Any, dtype: torch.dtype, last: tuple[int, int]) -> torch.Tensor:
    """`x` as [1|B, 1|H, *last] of `dtype`."""
    wanted = f"a {str(dtype).removeprefix('torch.')} tensor [{last[0]}, {last[1]}] or [B, H, {last[0]}, {last[1]}]"
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected {wanted}, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {wanted}, got {str(x.dtype).removeprefix('torch.')}")
    if x.ndim not in (2, 4) or tuple(x.shape[-2:]) != last:
        raise ValueError(f"{name}: expected {wanted}, got shape {list(x.shape)}")
    return x if x.ndim == 4 else x[None, None]


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
