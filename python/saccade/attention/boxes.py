"""Block lists of predicates on positions: exactly the blocks seen whole, and exactly those seen in part.

A block is seen whole where the tightest box of its queries holds every key of it: bounds of the block tell that exactly. That it is seen at
all, bounds tell only where they exclude it or where a key is seen by all; the rest is tried out, pair by pair, in pieces.
"""

from __future__ import annotations

import torch

from saccade.attention._compact import by_query_head, compact, trim
from saccade.attention.layout import SEEN_BY_ALL, BlockLayout

__all__ = ["from_boxes", "from_intervals"]

Tensor = torch.Tensor
HIGH = 2**31 - 1
LOW = -HIGH  # -2^31 means SEEN_BY_ALL
PIECE = 1 << 24  # pairs looked at together
SPARSE = 16  # every 16th query is tried first


def exists(length: int, block: int, order: Tensor | None, device: torch.device) -> Tensor:
    """[1|B, 1|H, n, block] bool: the positions that hold a token."""
    if order is None:
        blocks = -(-length // block)
        return (torch.arange(blocks * block, device=device) < length).reshape(1, 1, blocks, block)
    there: Tensor = (order >= 0).unflatten(-1, (-1, block))
    return there


def fill(x: Tensor, block: int, value: int = 0) -> Tensor:
    """`x` [..., S] as int32 [..., S up to a multiple of block]."""
    missing = -x.shape[-1] % block
    return torch.nn.functional.pad(x.to(torch.int32), (0, missing), value=value).contiguous()


class _Blocks:
    """Bounds of the boxes of every query block, and of the keys of every key block."""

    def __init__(self, box: Tensor, at: Tensor, queries: Tensor, keys: Tensor) -> None:
        heads = max(box.shape[1], at.shape[1], queries.shape[1], keys.shape[1])
        keys = by_query_head(keys, heads)
        self.box = box.unflatten(-1, (-1, queries.shape[3]))  # [.., 2, A, nQ, q_block]
        self.at = at.unflatten(-1, (-1, keys.shape[3]))  # [.., A, nK, k_block]
        self.queries, self.keys = queries, keys
        common = self.at[:, :, 0] == SEEN_BY_ALL
        local = keys & ~common
        low, high = self.box[:, :, 0], self.box[:, :, 1]
        here = queries[:, :, None]
        self.first = self.at.masked_fill(~local[:, :, None], HIGH).amin(-1)
        self.last = self.at.masked_fill(~local[:, :, None], LOW).amax(-1)
        self.common = (common & keys).any(-1)
        self.low = low.masked_fill(~here, HIGH).amin(-1), low.masked_fill(~here, LOW).amax(-1)
        self.high = high.masked_fill(~here, HIGH).amin(-1), high.masked_fill(~here, LOW).amax(-1)
        self.some = queries.any(-1)[..., :, None] & keys.any(-1)[..., None, :]
        self.local = local

    def whole(self) -> Tensor:
        """[Lb, Lh, nQ, nK]: every query sees every key."""
        inside = (self.low[1][..., None] <= self.first[..., None, :]) & (
            self.last[..., None, :] < self.high[0][..., None]
        )
        every: Tensor = inside.all(2) & self.some
        return every

    def apart(self) -> Tensor:
        """[Lb, Lh, nQ, nK]: no query sees a key, for sure."""
        outside = (self.low[0][..., None] > self.last[..., None, :]) | (
            self.first[..., None, :] >= self.high[1][..., None]
        )
        never: Tensor = outside.any(2) & ~self.common[..., None, :] | ~self.some
        return never


def from_boxes(
    box: Tensor,
    at: Tensor,
    q_len: int,
    k_len: int,
    block: tuple[int, int],
    *,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
) -> BlockLayout:
    """The layout of `box` and `at` (see `BlockLayout`), its lists exact. Reads sizes from the device, when it is built."""
    sides = _sides(q_len, k_len, block, q_order, k_order, box.device)
    blocks = _Blocks(box, at, *sides)
    whole, apart = blocks.whole(), blocks.apart()
    whole, apart = torch.broadcast_tensors(whole, apart)
    part = ~(whole | apart)
    part = part & (blocks.common[..., None, :] | _tried(blocks, part & ~blocks.common[..., None, :]))
    full = trim(compact(whole))
    if not bool(part.any()):
        return BlockLayout(q_len, k_len, *block, full, q_order=q_order, k_order=k_order)
    return BlockLayout(
        q_len, k_len, *block, full, trim(compact(part)), box=box, at=at, q_order=q_order, k_order=k_order
    )


def from_intervals(
    low: Tensor,
    high: Tensor,
    at: Tensor,
    q_len: int,
    k_len: int,
    block: tuple[int, int],
    *,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    shown: Tensor | None = None,
) -> BlockLayout:
    """The layout of one axis on which keys are numbered without gaps in each block, its lists exact: nothing waits for the device.

    Args:
        low, high: [1|B, 1|H, nQ * q_block] int32: a query sees the keys numbered low to high - 1.
        at: [1|B, 1|H, nK * k_block] int32, the numbers of the keys, -2^31 for one that all see.
        shown: bool [nQ, nK], or None: blocks that may be seen at all, also where a key says that all see it.
    """
    box, numbers = torch.stack((low, high), 2)[:, :, :, None].contiguous(), at[:, :, None].contiguous()
    blocks = _Blocks(box, numbers, *_sides(q_len, k_len, block, q_order, k_order, low.device))
    whole = blocks.whole()
    first, last = blocks.first[:, :, 0, None, None, :], blocks.last[:, :, 0, None, None, :]  # [.., 1, 1, nK]
    low, high = blocks.box[:, :, 0, 0, ..., None], blocks.box[:, :, 1, 0, ..., None]  # [.., nQ, q_block, 1]
    pieces = []
    rows = max(1, PIECE // max(whole.shape[0] * whole.shape[1] * block[0] * whole.shape[3], 1))
    for n in range(0, max(whole.shape[2], 1), rows):
        some = slice(n, n + rows)
        meets = torch.maximum(low[:, :, some], first) <= torch.minimum(high[:, :, some] - 1, last)
        pieces.append((meets & blocks.queries[:, :, some, :, None]).any(3))
    seen = (torch.cat(pieces, 2) | blocks.common[..., None, :]) & blocks.some
    if shown is not None:
        seen, whole = seen & shown, whole & shown
    part = seen & ~whole
    whole = whole.expand(part.shape)
    return BlockLayout(
        q_len, k_len, *block, compact(whole), compact(part), box=box, at=numbers, q_order=q_order, k_order=k_order
    )


def _sides(
    q_len: int, k_len: int, block: tuple[int, int], q_order: Tensor | None, k_order: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    return exists(q_len, block[0], q_order, device), exists(k_len, block[1], k_order, device)


def _tried(blocks: _Blocks, open_: Tensor) -> Tensor:
    """Which of the open blocks [Lb, Lh, nQ, nK] show a key to a query."""
    out = torch.zeros_like(open_)
    where = open_.nonzero()
    for step in (SPARSE, 1):
        pairs = blocks.queries.shape[3] // step * blocks.keys.shape[3]
        found = [_shown(blocks, piece, step) for piece in where.split(max(PIECE // pairs, 1))]
        hit = torch.cat(found) if found else where.new_zeros(0, dtype=torch.bool)
        out[tuple(where[hit].T)] = True
        where = where[~hit]
    return out


def _shown(blocks: _Blocks, where: Tensor, step: int) -> Tensor:
    """[n] bool: whether any of every `step`-th query of the block sees a key of it."""
    b, h, row, column = where.T
    box = _pick(blocks.box, b, h, row)[..., ::step]  # [n, 2, A, q]
    at = _pick(blocks.at, b, h, column)  # [n, A, k]
    seen = _pick(blocks.local, b, h, column)[:, None, :] & _pick(blocks.queries, b, h, row)[:, ::step, None]
    for a in range(at.shape[1]):
        seen &= (box[:, 0, a, :, None] <= at[:, a, None, :]) & (at[:, a, None, :] < box[:, 1, a, :, None])
    return seen.flatten(1).any(1)


def _pick(table: Tensor, b: Tensor, h: Tensor, n: Tensor) -> Tensor:
    """Blocks `n` of a table [1|B, 1|H, ..., blocks, block], as [len(n), ..., block]."""
    table = table.movedim(-2, 2)
    return table[b if table.shape[0] > 1 else torch.zeros_like(b), h if table.shape[1] > 1 else torch.zeros_like(h), n]
