"""Between layouts and boolean masks of all tokens."""

from __future__ import annotations

from typing import Any

import torch

from saccade._tensors import names
from saccade.attention._compact import by_query_head, compact, numbered
from saccade.attention.layout import SEEN_BY_ALL, BlockLayout, _sizes

WORD = 32


def as_words(value: torch.Tensor) -> torch.Tensor:
    """Whole numbers 0 to 2^32 - 1 as int32 of the same bits: the last one is the sign."""
    return (value - ((value >> 31) << 32)).to(torch.int32)


def pack_bits(blocks: torch.Tensor) -> torch.Tensor:
    """bool [n, rows, columns] to int32 [n, rows, columns / 32]; bit j of word w is column w * 32 + j."""
    n, rows, columns = blocks.shape
    words = blocks.reshape(n, rows, columns // WORD, WORD).long()
    return as_words((words << torch.arange(WORD, device=blocks.device)).sum(-1))


def unpack_bits(bits: torch.Tensor) -> torch.Tensor:
    """int32 [n, rows, words] to bool [n, rows, words * 32]."""
    bit = (bits[..., None] >> torch.arange(WORD, dtype=torch.int32, device=bits.device)) & 1
    return bit.bool().flatten(-2)


def from_mask(mask: Any, q_block: int, k_block: int) -> BlockLayout:
    """See `BlockLayout.from_mask`."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        what = type(mask).__name__ if not isinstance(mask, torch.Tensor) else names(mask.dtype)
        raise TypeError(f"mask: expected a bool tensor [Sq, Sk] or [B, H, Sq, Sk], got {what}")
    if mask.ndim not in (2, 4):
        raise ValueError(f"mask: expected [Sq, Sk] or [B, H, Sq, Sk], got shape {list(mask.shape)}")
    mask = mask if mask.ndim == 4 else mask[None, None]
    q_len, k_len, q_block, k_block = _sizes(mask.shape[2], mask.shape[3], q_block, k_block)
    rows, columns = -(-q_len // q_block), -(-k_len // k_block)
    pad = (0, columns * k_block - k_len, 0, rows * q_block - q_len)
    # Keys and queries that do not exist count as seen for "whole", and as not seen for "at all".
    blocks = tuple(
        torch.nn.functional.pad(mask, pad, value=value)
        .reshape(*mask.shape[:2], rows, q_block, columns, k_block)
        .transpose(3, 4)
        for value in (True, False)
    )
    whole, seen = blocks[0].flatten(-2).all(-1), blocks[1].flatten(-2).any(-1)
    part = seen & ~whole
    full = compact(whole & seen)
    if not bool(part.any()):
        return BlockLayout(q_len, k_len, q_block, k_block, full)
    bits = pack_bits(blocks[1][part])
    return BlockLayout(q_len, k_len, q_block, k_block, full, compact(part, numbered(part)), bits=bits)


def to_mask(layout: BlockLayout) -> torch.Tensor:
    """See `BlockLayout.to_mask`."""
    kind = layout.block_map()
    whole = _by_position(kind == 2, layout)
    mask = whole
    if layout.partial is not None:
        part = _by_position(kind == 1, layout)
        shown = _by_bits(layout) if layout.bits is not None else _by_box(layout)
        mask = whole | (part & shown)
    for axis, order, length in ((2, layout.q_order, layout.q_len), (3, layout.k_order, layout.k_len)):
        mask = _to_tokens(mask, axis, order, length)
    return mask


def _by_position(blocks: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    return blocks.repeat_interleave(layout.q_block, 2).repeat_interleave(layout.k_block, 3)


def _by_box(layout: BlockLayout) -> torch.Tensor:
    assert layout.box is not None and layout.at is not None
    low, high = layout.box[:, :, 0, :, :, None], layout.box[:, :, 1, :, :, None]  # [.., A, P, 1]
    at = layout.at[:, :, :, None, :]
    inside = ((low <= at) & (at < high)).all(2)
    return inside | (layout.at[:, :, 0] == SEEN_BY_ALL)[:, :, None, :]


def _by_bits(layout: BlockLayout) -> torch.Tensor:
    assert layout.bits is not None and layout.partial is not None and layout.partial.ids is not None
    partial, ids, columns = layout.partial, layout.partial.ids.flatten(), layout.k_blocks
    shape = partial.counts.shape
    out = torch.zeros(*shape, columns, layout.q_block, layout.k_block, dtype=torch.bool, device=layout.device)
    n = torch.arange(columns, device=layout.device)
    used = n < partial.counts[..., None]
    place = (partial.starts[..., None].long() + n)[used]
    b, h, row, _ = used.nonzero(as_tuple=True)
    out[b, h, row, partial.indices.flatten()[place].long()] = unpack_bits(layout.bits[ids[place].long()])
    return out.transpose(3, 4).flatten(2, 3).flatten(3, 4)


def _to_tokens(mask: torch.Tensor, axis: int, order: torch.Tensor | None, length: int) -> torch.Tensor:
    """From positions to tokens along an axis of [.., P, P]; a token that no position holds sees nothing and is not seen."""
    if order is None:
        return mask.narrow(axis, 0, length)
    if mask.shape[1] > 1:
        order = by_query_head(order, mask.shape[1])
    batch, heads = (max(a, b) for a, b in zip(mask.shape[:2], order.shape[:2], strict=True))
    mask = mask.expand(batch, heads, -1, -1)
    place = order.long().masked_fill(order < 0, length)
    place = place[:, :, :, None] if axis == 2 else place[:, :, None, :]
    shape = list(mask.shape)
    shape[axis] = length + 1
    out = torch.zeros(shape, dtype=torch.bool, device=mask.device)
    return out.scatter_(axis, place.expand(mask.shape), mask).narrow(axis, 0, length)
