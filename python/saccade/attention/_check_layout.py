"""Checks of a layout that comes from outside: they read its tensors, once, when it is built."""

from __future__ import annotations

import torch

from saccade._tensors import names
from saccade.attention.layout import BlockLayout, BlockLists

Tensor = torch.Tensor


def check_whole(layout: BlockLayout) -> None:
    """Everything the kernels rely on; ValueError or TypeError that names the part."""
    positions = layout.q_len if layout.q_order is None else layout.q_order.shape[-1]
    _check_lists("full", layout.full, -(-positions // layout.q_block), layout.k_blocks)
    if layout.partial is not None:
        _check_lists("partial", layout.partial, layout.q_blocks, layout.k_blocks)
        if layout.partial.counts.shape != layout.full.counts.shape:
            raise ValueError(
                f"partial: expected lists {list(layout.full.counts.shape)} as full has them, got {list(layout.partial.counts.shape)}"
            )
        if int((layout.block_map() > 2).sum()):
            raise ValueError("partial: a block stands in the full list too")
        _check_predicate(layout)
    elif not (layout.box is None and layout.at is None and layout.bits is None):
        raise ValueError("box, at, bits: expected None where there are no partial blocks")
    _check_order("q_order", layout.q_order, layout.q_len, layout.q_blocks * layout.q_block, every=True)
    _check_order("k_order", layout.k_order, layout.k_len, layout.k_blocks * layout.k_block, every=False)


def _int32(name: str, x: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected an int32 tensor, got {type(x).__name__}")
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {names(x.dtype)}")
    if not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor")


def _check_lists(name: str, lists: BlockLists, rows: int, columns: int) -> None:
    starts, counts, indices, ids = lists
    for part, x in zip(lists._fields, lists, strict=True):
        if part != "ids" or x is not None:
            _int32(f"{name}.{part}", x)
    if counts.ndim != 3 or counts.shape[2] != rows or starts.shape != counts.shape:
        raise ValueError(
            f"{name}: expected starts and counts [1|B, 1|H, {rows}], got {list(starts.shape)} and {list(counts.shape)}"
        )
    if ids is not None and ids.shape != indices.shape:
        raise ValueError(f"{name}.ids: expected the shape of indices, {list(indices.shape)}, got {list(ids.shape)}")
    flat, first, size = indices.flatten(), starts.flatten().long(), counts.flatten().long()
    if bool(((size < 0) | (size > columns)).any()):
        raise ValueError(f"{name}.counts: expected 0 to {columns}, got {int(size.min())} to {int(size.max())}")
    if bool(((first < 0) | (first + size > flat.numel()))[size > 0].any()):
        raise ValueError(f"{name}.starts: a list ends behind the {flat.numel()} entries of indices")
    row = torch.repeat_interleave(torch.arange(len(size), device=flat.device), size)
    place = torch.arange(len(row), device=flat.device) - (size.cumsum(0) - size)[row] + first[row]
    entry = flat[place]
    if len(entry) and bool(((entry < 0) | (entry >= columns)).any()):
        raise ValueError(
            f"{name}.indices: expected blocks 0 to {columns - 1}, got {int(entry.min())} to {int(entry.max())}"
        )
    wrong = (row[1:] == row[:-1]) & (entry[1:] <= entry[:-1])
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}.indices: expected each list ascending, without repetition, got block {int(entry[at])} before "
            f"{int(entry[at + 1])} in list {int(row[at])}"
        )


def _check_predicate(layout: BlockLayout) -> None:
    q, k, partial = layout.q_blocks * layout.q_block, layout.k_blocks * layout.k_block, layout.partial
    assert partial is not None
    if layout.bits is not None:
        if layout.box is not None or layout.at is not None:
            raise ValueError("bits: expected None beside box and at")
        _int32("bits", layout.bits)
        wanted = [layout.q_block, layout.k_block // 32]
        if layout.bits.ndim != 3 or list(layout.bits.shape[1:]) != wanted:
            raise ValueError(f"bits: expected [n, {wanted[0]}, {wanted[1]}], got {list(layout.bits.shape)}")
        if partial.ids is None:
            raise ValueError("partial.ids: expected the row of bits of every entry, got None")
        ids = partial.ids
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < max(layout.bits.shape[0], 1):
            raise ValueError(
                f"partial.ids: expected 0 to {layout.bits.shape[0] - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        return
    if layout.box is None or layout.at is None:
        raise ValueError("box, at: expected both, or bits, where there are partial blocks")
    _int32("box", layout.box)
    _int32("at", layout.at)
    axes = layout.at.shape[2] if layout.at.ndim == 4 else 0
    if layout.at.ndim != 4 or not 1 <= axes <= 4 or layout.at.shape[3] != k:
        raise ValueError(f"at: expected [1|B, 1|H, 1 to 4 axes, {k}], got {list(layout.at.shape)}")
    if layout.box.ndim != 5 or list(layout.box.shape[2:]) != [2, axes, q]:
        raise ValueError(f"box: expected [1|B, 1|H, 2, {axes}, {q}], got {list(layout.box.shape)}")


def _check_order(name: str, order: Tensor | None, length: int, positions: int, *, every: bool) -> None:
    if order is None:
        return
    _int32(name, order)
    if order.ndim != 3 or order.shape[2] != positions:
        raise ValueError(f"{name}: expected [1|B, 1|H, {positions}], whole blocks, got {list(order.shape)}")
    if bool(((order < -1) | (order >= length)).any()):
        raise ValueError(
            f"{name}: expected tokens 0 to {length - 1}, or -1, got {int(order.min())} to {int(order.max())}"
        )
    times = torch.zeros(*order.shape[:2], length + 1, dtype=torch.int64, device=order.device)
    times.scatter_add_(2, order.long().masked_fill(order < 0, length), torch.ones_like(order, dtype=torch.int64))
    times = times[..., :length]
    if bool((times > 1).any()):
        raise ValueError(f"{name}: token {int((times > 1).nonzero()[0, 2])} stands at two positions")
    if every and bool((times < 1).any()):
        raise ValueError(f"{name}: token {int((times < 1).nonzero()[0, 2])} stands at no position")
