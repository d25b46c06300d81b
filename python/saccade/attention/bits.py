"""Bits of the blocks seen in part, from a predicate on pairs of positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from saccade.attention._compact import compact, numbered, trim
from saccade.attention._mask import as_words, pack_bits
from saccade.attention.layout import BlockLists

__all__ = ["bits_at", "interval_words", "listed"]

Tensor = torch.Tensor
PIECE = 1 << 23  # pairs looked at together
# batch, head [n, 1, 1], query and key positions [n, q_block, 1] and [n, 1, k_block] -> bool [n, q_block, k_block]
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def bits_at(
    visible: Visible, where: tuple[Tensor, Tensor, Tensor, Tensor], lengths: tuple[int, int], block: tuple[int, int]
) -> Tensor:
    """int32 [n, q_block, k_block / 32] of the blocks at `where` (batch, head, row, column), each [n]; 0 behind the lengths."""
    device, (q_block, k_block) = where[0].device, block
    rows = torch.arange(q_block, device=device)[:, None]
    columns = torch.arange(k_block, device=device)[None, :]
    pieces = [torch.zeros(0, q_block, k_block // 32, dtype=torch.int32, device=device)]
    for b, h, row, column in zip(*(x.split(max(PIECE // (q_block * k_block), 1)) for x in where), strict=True):
        q = row[:, None, None] * q_block + rows
        k = column[:, None, None] * k_block + columns
        seen = visible(b[:, None, None], h[:, None, None], q, k)
        seen = (seen & (q < lengths[0]) & (k < lengths[1])).expand(len(b), q_block, k_block)
        pieces.append(pack_bits(seen))
    return torch.cat(pieces)


def listed(part: Tensor) -> tuple[BlockLists, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Lists, with ids, of the blocks marked in `part` [Lb, Lh, nQ, nK], and where these are; reads their number from the device."""
    where: Any = part.nonzero(as_tuple=True)
    return trim(compact(part, numbered(part))), where


def interval_words(low: Tensor, high: Tensor, words: int) -> Tensor:
    """int32 [..., words]: bits low to high - 1 set, none where high <= low."""
    first = torch.arange(words, device=low.device) * 32
    below, upto = ((x[..., None] - first).clamp(0, 32) for x in (low, torch.maximum(low, high)))
    return as_words((1 << upto) - (1 << below))
