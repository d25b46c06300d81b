"""Layouts from layouts: union, intersection, sequences packed into one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from saccade._arguments import items
from saccade.attention._compact import compact, numbered
from saccade.attention._mask import pack_bits
from saccade.attention.bits import bits_at
from saccade.attention.boxes import exists, fill
from saccade.attention.flex import dense_ids, padded
from saccade.attention.layout import SEEN_BY_ALL, BlockLayout, BlockLists

__all__ = ["concat", "intersection", "union"]

Tensor = torch.Tensor
Where = tuple[Tensor, Tensor, Tensor, Tensor]  # batch, head, row and column of blocks


def union(a: BlockLayout, b: BlockLayout) -> BlockLayout:
    """What a query sees in either layout; also `a | b`.

    Both must be for the same lengths, blocks, device and orders of tokens; batches and heads of 1 serve all. Blocks seen in part are
    evaluated and stored as bits; reads their number from the device.

    Example:
        >>> from saccade.attention import patterns
        >>> one = patterns.spatial((4, 8, 8), 1.0) | patterns.temporal((4, 1, 64), 0.1)
        Traceback (most recent call last):
        ValueError: b: expected the q_order of a, none, got one; build both layouts in one order of tokens
        >>> one = patterns.spatial((4, 8, 8), 1.0) | patterns.neighborhood((4, 8, 8), (4, 1, 1))
        >>> int(one.to_mask()[0, 0, 0].sum())  # a frame, and three more tokens at its place
        67
    """
    return _merge(a, b, torch.bitwise_or)


def intersection(a: BlockLayout, b: BlockLayout) -> BlockLayout:
    """What a query sees in both layouts; also `a & b`. See `union`.

    Example:
        >>> from saccade.attention import patterns
        >>> int((patterns.causal(100) & patterns.causal(100, window=10)).to_mask()[0, 0, 50].sum())
        10
    """
    return _merge(a, b, torch.bitwise_and)


def _check_same(a: Any, b: Any) -> None:
    for name, layout in (("a", a), ("b", b)):
        if not isinstance(layout, BlockLayout):
            raise TypeError(f"{name}: expected a BlockLayout, got {type(layout).__name__}")
    for name in ("q_len", "k_len", "q_block", "k_block", "device"):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(f"b: expected the {name} of a, {getattr(a, name)}, got {getattr(b, name)}")
    for name in ("q_order", "k_order"):
        one, other = getattr(a, name), getattr(b, name)
        if (one is None) != (other is None):
            there, here = ("none" if x is None else "one" for x in (one, other))
            raise ValueError(
                f"b: expected the {name} of a, {there}, got {here}; build both layouts in one order of tokens"
            )
        if one is not None and one is not other and not torch.equal(one, other):
            raise ValueError(f"b: expected the {name} of a, got another one; build both layouts in one order of tokens")
    for name in ("batch", "heads"):
        if getattr(a, name) != getattr(b, name) and 1 not in (getattr(a, name), getattr(b, name)):
            raise ValueError(f"b: expected 1 or the {getattr(a, name)} {name} of a, got {getattr(b, name)}")


def _merge(a: BlockLayout, b: BlockLayout, how: Callable[[Tensor, Tensor], Tensor]) -> BlockLayout:
    _check_same(a, b)
    first, second = torch.broadcast_tensors(a.block_map(), b.block_map())
    either = how is torch.bitwise_or
    whole = ((first == 2) | (second == 2)) if either else ((first == 2) & (second == 2))
    some = ((first > 0) | (second > 0)) if either else ((first > 0) & (second > 0))
    open_ = some & ~whole
    plain = replace(a, full=compact(whole), partial=None, box=None, at=None, bits=None, _transposed=[])
    where: Any = open_.nonzero(as_tuple=True)
    if not len(where[0]):
        return plain
    heads = whole.shape[1]
    bits = how(shown_bits(a, where, heads), shown_bits(b, where, heads))
    there = existing_bits(a, where, heads)
    seen, all_of_it = (bits != 0).flatten(1).any(1), (bits == there).flatten(1).all(1)
    whole = whole.clone()
    whole[where] = all_of_it
    part = torch.zeros_like(open_)
    part[where] = seen & ~all_of_it
    kept = bits[seen & ~all_of_it]
    if not len(kept):
        return replace(plain, full=compact(whole))
    return replace(plain, full=compact(whole), partial=compact(part, numbered(part)), bits=kept.contiguous())


def _at(table: Tensor, b: Tensor, h: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Indices of the first two axes of a table [1|B, 1|H or 1|Hk, ...]."""
    each = heads // table.shape[1] if table.shape[1] > 1 else heads
    return b if table.shape[0] > 1 else b * 0, h // max(each, 1) if table.shape[1] > 1 else h * 0


def _pick(table: Tensor, b: Tensor, h: Tensor, heads: int, *rest: Tensor) -> Tensor:
    """Entries [n, ...] of such a table."""
    return table[(*_at(table, b, h, heads), *rest)]


def existing_bits(layout: BlockLayout, where: Where, heads: int) -> Tensor:
    """int32 [n, q_block, k_block / 32]: pairs of a query and a key that exist."""
    b, h, row, column = where
    q = exists(layout.q_len, layout.q_block, layout.q_order, layout.device)
    k = exists(layout.k_len, layout.k_block, layout.k_order, layout.device)
    return pack_bits(_pick(q, b, h, heads, row)[:, :, None] & _pick(k, b, h, heads, column)[:, None, :])


def shown_bits(layout: BlockLayout, where: Where, heads: int) -> Tensor:
    """int32 [n, q_block, k_block / 32]: the pairs of these blocks that the layout shows."""
    b, h, row, column = where
    classes = layout.block_map()
    kind = _pick(classes, b, h, heads, row, column)[:, None, None]
    there = existing_bits(layout, where, heads)
    out = there.masked_fill(kind != 2, 0)
    if layout.partial is None:
        return out
    if layout.bits is not None:
        ids = dense_ids(layout)
        part = layout.bits[_pick(ids, b, h, heads, row, column)]
    else:
        box, at = layout.box, layout.at
        assert box is not None and at is not None

        def visible(i_b: Tensor, i_h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            qb, qh = _at(box, i_b, i_h, heads)
            kb, kh = _at(at, i_b, i_h, heads)
            seen = at[kb, kh, 0, k] == SEEN_BY_ALL
            inside = torch.ones_like(seen)
            for a in range(at.shape[2]):
                place = at[kb, kh, a, k]
                inside = inside & (box[qb, qh, 0, a, q] <= place) & (place < box[qb, qh, 1, a, q])
            return seen | inside

        positions = layout.q_blocks * layout.q_block, layout.k_blocks * layout.k_block
        part = bits_at(visible, where, positions, (layout.q_block, layout.k_block))
    return out | (part & there).masked_fill(kind != 1, 0)


def concat(layouts: Sequence[BlockLayout]) -> BlockLayout:
    """Sequences one after another in one row of tokens, each with a layout of its own; none sees another.

    The queries of layout n stand behind those of layout n - 1, keys likewise. Each sequence begins at a block: where lengths are not
    multiples of it the result has an order of tokens with holes, and the lists are those of the parts, shifted. Batches and heads of 1
    serve all.

    Example:
        >>> from saccade.attention import patterns
        >>> row = concat([patterns.causal(3), patterns.dense(2)])
        >>> row.to_mask()[0, 0].int().tolist()
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    """
    parts = items(layouts, "layouts")
    if not parts:
        raise ValueError("layouts: expected at least one BlockLayout, got none")
    for n, one in enumerate(parts):
        if not isinstance(one, BlockLayout):
            raise TypeError(f"layouts[{n}]: expected a BlockLayout, got {type(one).__name__}")
        for name in ("q_block", "k_block", "device"):
            if getattr(one, name) != getattr(parts[0], name):
                raise ValueError(
                    f"layouts[{n}]: expected the {name} of the first, {getattr(parts[0], name)}, got {getattr(one, name)}"
                )
        for name in ("batch", "heads"):
            sizes = {getattr(x, name) for x in parts[: n + 1]} - {1}
            if len(sizes) > 1:
                raise ValueError(f"layouts[{n}]: expected {name} that agree or are 1, got {sorted(sizes)}")
    if len({x.bits is not None for x in parts if x.partial is not None}) > 1:
        parts = tuple(x if x.bits is not None or x.partial is None else _as_bits(x) for x in parts)
    first = parts[0]
    out: dict[str, Any] = {
        "q_order": _joined_order([(x.q_order, x.q_len, x.q_block) for x in parts], first.device),
        "k_order": _joined_order([(x.k_order, x.k_len, x.k_block) for x in parts], first.device),
    }
    lead = max(x.batch for x in parts), max(x.heads for x in parts)
    partial = None
    if any(x.partial is not None for x in parts):
        partial = _joined_lists([x.partial or _empty(x) for x in parts], parts, lead)
        out |= _joined_bits(parts) if any(x.bits is not None for x in parts) else _joined_boxes(parts)
    full = _joined_lists([x.full for x in parts], parts, lead)
    return BlockLayout(
        sum(x.q_len for x in parts), sum(x.k_len for x in parts), first.q_block, first.k_block, full, partial, **out
    )


def _as_bits(layout: BlockLayout) -> BlockLayout:
    """The layout with bits in place of boxes."""
    part = layout.block_map() == 1
    ids = (part.flatten().cumsum(0) - 1).reshape(part.shape).to(torch.int32)
    bits = shown_bits(layout, part.nonzero(as_tuple=True), layout.heads)  # type: ignore[arg-type]
    return replace(layout, partial=compact(part, ids), bits=bits, box=None, at=None, _transposed=[])


def _empty(layout: BlockLayout) -> BlockLists:
    none = torch.zeros_like(layout.full.counts)
    return BlockLists(none, none, none.flatten()[:0])


def _joined_lists(lists: list[BlockLists], parts: Sequence[BlockLayout], lead: tuple[int, int]) -> BlockLists:
    width, shift, id_shift = max(x.k_blocks for x in parts), 0, 0
    counts, indices, ids = [], [], []
    for one, layout in zip(lists, parts, strict=True):
        stored = padded(one, width)
        used = torch.arange(width, device=layout.device) < stored.counts[..., None]
        counts.append(stored.counts.expand(*lead, -1))
        indices.append((stored.indices + shift).masked_fill(~used, 0).expand(*lead, -1, -1))
        own = torch.zeros_like(stored.indices) if stored.ids is None else stored.ids
        ids.append((own + id_shift).masked_fill(~used, 0).expand(*lead, -1, -1))
        shift += layout.k_blocks
        id_shift += 0 if layout.bits is None else layout.bits.shape[0]
    count = torch.cat(counts, 2).contiguous()
    starts = (torch.arange(count.numel(), dtype=torch.int32, device=count.device) * width).reshape(count.shape)
    has_ids = any(x.ids is not None for x in lists)
    return BlockLists(
        starts, count, torch.cat(indices, 2).contiguous(), torch.cat(ids, 2).contiguous() if has_ids else None
    )


def _joined_order(parts: list[tuple[Tensor | None, int, int]], device: torch.device) -> Tensor | None:
    """Orders behind one another; None where positions are tokens."""
    if all(order is None and length % block == 0 for order, length, block in parts[:-1]) and parts[-1][0] is None:
        return None
    rows, shift = [], 0
    for order, length, block in parts:
        if order is None:
            order = fill(torch.arange(length, dtype=torch.int32, device=device), block, -1)[None, None]
        rows.append(torch.where(order >= 0, order + shift, -1))
        shift += length
    lead = tuple(max(x.shape[a] for x in rows) for a in (0, 1))
    return torch.cat([x.expand(*lead, -1) for x in rows], 2).to(torch.int32).contiguous()


def _joined_bits(parts: Sequence[BlockLayout]) -> dict[str, Tensor]:
    return {"bits": torch.cat([x.bits for x in parts if x.bits is not None])}


def _joined_boxes(parts: Sequence[BlockLayout]) -> dict[str, Tensor]:
    """Boxes of as many axes as the part with the most; the others see everything along the rest."""
    axes = max(x.at.shape[2] for x in parts if x.at is not None)
    boxes, places = [], []
    for one in parts:
        q, k = one.q_blocks * one.q_block, one.k_blocks * one.k_block
        box = one.full.counts.new_zeros(1, 1, 2, 0, q) if one.box is None else one.box
        at = one.full.counts.new_zeros(1, 1, 0, k) if one.at is None else one.at
        missing = axes - at.shape[2]
        rest = torch.zeros_like(box[:, :, :, :1]).expand(-1, -1, -1, missing, -1) if box.shape[3] else None
        if rest is None:
            box, at = one.full.counts.new_zeros(1, 1, 2, axes, q), one.full.counts.new_zeros(1, 1, axes, k)
        else:
            rest = rest.clone()
            rest[:, :, 1] = 1
            box = torch.cat((box, rest), 3)
            at = torch.nn.functional.pad(at, (0, 0, 0, missing))
        boxes.append(box)
        places.append(at)
    lead = [[max(x.shape[a] for x in tables) for a in (0, 1)] for tables in (boxes, places)]
    return {
        "box": torch.cat([x.expand(*lead[0], -1, -1, -1) for x in boxes], 4).contiguous(),
        "at": torch.cat([x.expand(*lead[1], -1, -1) for x in places], 3).contiguous(),
    }
