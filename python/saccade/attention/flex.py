"""Between `BlockLayout` and the `BlockMask` of torch's FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from saccade.attention._compact import numbered, padded_starts
from saccade.attention.bits import bits_at
from saccade.attention.layout import BLOCKS, SEEN_BY_ALL, BlockLayout, BlockLists

__all__ = ["from_flex", "to_flex"]

Tensor = torch.Tensor


def from_flex(block_mask: Any) -> BlockLayout:
    """The layout of a `BlockMask`: its lists are taken as they are, without a copy, and `mask_mod` becomes the bits of the partial blocks.

    `mask_mod` is called for the samples and heads that the lists tell apart: where they serve all heads, for head 0, as
    `create_block_mask(..., H=None)` does too. Reads the lists, once, to check them.

    Args:
        block_mask: of `create_block_mask` or `BlockMask.from_kv_blocks`, with blocks of 64 or 128.

    Raises:
        ValueError, TypeError: naming what came and what is accepted.

    Example:
        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 300, 300, device="cpu")
        >>> layout = from_flex(mask)
        >>> layout.full.indices.data_ptr() == mask.full_kv_indices.data_ptr(), int(layout.to_mask().sum())
        (True, 45150)
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask: expected a torch BlockMask, got {type(block_mask).__name__}")
    block: Any = tuple(block_mask.BLOCK_SIZE)
    if block[0] not in BLOCKS or block[1] not in BLOCKS:
        raise ValueError(
            f"block_mask: expected BLOCK_SIZE 64 or 128, which the kernels of this library take, got {block}; "
            "make it with create_block_mask(..., BLOCK_SIZE=128)"
        )
    q_len, k_len = block_mask.seq_lengths
    partial = _lists(block_mask.kv_num_blocks, block_mask.kv_indices)
    if block_mask.full_kv_num_blocks is None or block_mask.full_kv_indices is None:
        none = torch.zeros_like(partial.counts)
        full = BlockLists(none, none, partial.indices[..., :0].contiguous())
    else:
        full = _lists(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    BlockLayout.from_lists(q_len, k_len, block[0], block[1], partial)  # checks the lists before they are followed
    if not bool((partial.counts > 0).any()):
        return BlockLayout.from_lists(q_len, k_len, block[0], block[1], full)
    width = partial.indices.shape[-1]
    used = torch.arange(width, device=partial.counts.device) < partial.counts[..., None]
    b, h, row, _ = used.nonzero(as_tuple=True)
    column = partial.indices[used].long()
    ids = numbered(used).masked_fill(~used, 0)
    bits = bits_at(_pairs(block_mask.mask_mod, q_len, k_len), (b, h, row, column), (q_len, k_len), block)
    return BlockLayout.from_lists(q_len, k_len, block[0], block[1], full, partial=partial._replace(ids=ids), bits=bits)


def _lists(counts: Tensor, indices: Tensor) -> BlockLists:
    """Lists [B, H, rows, width] of FlexAttention, where B and H may be missing."""
    counts = counts.reshape((1,) * (3 - counts.ndim) + tuple(counts.shape))
    indices = indices.reshape((1,) * (4 - indices.ndim) + tuple(indices.shape))
    return BlockLists(padded_starts(counts, indices.shape[-1]), counts.contiguous(), indices.contiguous())


def _pairs(mask_mod: Callable[..., Tensor], q_len: int, k_len: int) -> Callable[..., Tensor]:
    """`mask_mod`, which takes scalars, over blocks of pairs; it is not asked beyond the lengths."""
    over_keys = torch.vmap(mask_mod, (None, None, None, 0))
    over_both = torch.vmap(over_keys, (None, None, 0, None))
    over_blocks = torch.vmap(over_both, (0, 0, 0, 0))

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q, k = q.clamp(max=max(q_len - 1, 0))[:, :, 0], k.clamp(max=max(k_len - 1, 0))[:, 0]
        return over_blocks(b[:, 0, 0], h[:, 0, 0], q, k)

    return visible


def to_flex(layout: BlockLayout) -> Any:
    """A `BlockMask` of the same blocks, its `mask_mod` exact for every pair, so it also serves FlexAttention's eager form.

    Shares the lists where they are stored as FlexAttention stores them (padded to all key blocks): always for a layout of `from_flex`.

    Raises:
        ValueError: where the layout reorders tokens, which FlexAttention cannot: permute q, k and v, and build it without an order.

    Example:
        >>> from saccade.attention import patterns
        >>> mask = to_flex(patterns.causal(300, block=128))
        >>> mask.seq_lengths, mask.BLOCK_SIZE, round(mask.sparsity())
        ((300, 300), (128, 128), 33)
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {type(layout).__name__}")
    if layout.q_order is not None or layout.k_order is not None:
        raise ValueError(
            "layout: expected one whose positions are tokens; FlexAttention has no order of tokens. Permute q, k and v, "
            "and build the layout without q_order and k_order"
        )
    none = torch.zeros_like(layout.full.counts)
    partial = layout.partial or BlockLists(none, none, layout.full.indices.flatten()[:0])
    return BlockMask.from_kv_blocks(
        partial.counts,
        padded(partial, layout.k_blocks).indices,
        layout.full.counts,
        padded(layout.full, layout.k_blocks).indices,
        BLOCK_SIZE=(layout.q_block, layout.k_block),
        mask_mod=_mask_mod(layout),
        seq_lengths=(layout.q_len, layout.k_len),
    )


def padded(lists: BlockLists, width: int) -> BlockLists:
    """The lists stored [Lb, Lh, rows, width], as they are where they are stored so."""
    starts, counts, indices, ids = lists
    wanted = padded_starts(counts, width)
    if indices.shape == (*counts.shape, width) and torch.equal(starts, wanted):
        return lists
    n = torch.arange(width, device=counts.device)
    used = n < counts[..., None]
    place = (starts[..., None].long() + n).masked_fill(~used, 0)
    flat = [
        None
        if x is None
        else x.flatten()[place].masked_fill(~used, 0)
        if x.numel()
        else torch.zeros_like(place, dtype=x.dtype)
        for x in (indices, ids)
    ]
    return BlockLists(wanted, counts, *flat)  # type: ignore[arg-type]


def dense_ids(layout: BlockLayout) -> Tensor:
    """[Lb, Lh, nQ, nK] int64: the row of bits of every block seen in part, 0 elsewhere."""
    assert layout.partial is not None and layout.partial.ids is not None
    lists = padded(layout.partial, layout.k_blocks)
    used = torch.arange(layout.k_blocks, device=layout.device) < lists.counts[..., None]
    out = torch.zeros((*lists.counts.shape, layout.k_blocks + 1), dtype=torch.int64, device=layout.device)
    column = lists.indices.long().masked_fill(~used, layout.k_blocks)
    assert lists.ids is not None
    return out.scatter_(-1, column, lists.ids.long())[..., : layout.k_blocks]


def _mask_mod(layout: BlockLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    classes = layout.block_map()
    block = layout.q_block, layout.k_block

    def at(table: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor | int, Tensor | int]:
        return b if table.shape[0] > 1 else b * 0, h if table.shape[1] > 1 else h * 0

    def kind(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h = at(classes, b, h)  # type: ignore[assignment]
        return classes[b, h, q // block[0], k // block[1]]

    if layout.partial is None:
        return lambda b, h, q, k: kind(b, h, q, k) == 2
    if layout.bits is not None:
        bits, ids = layout.bits, dense_ids(layout)

        def by_bits(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            what = kind(b, h, q, k)
            b, h = at(ids, b, h)  # type: ignore[assignment]
            word = bits[ids[b, h, q // block[0], k // block[1]], q % block[0], k % block[1] // 32]
            return (what == 2) | (what == 1) & ((word >> (k % 32)) & 1).bool()

        return by_bits
    box, numbers = layout.box, layout.at
    assert box is not None and numbers is not None

    def by_box(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        what = kind(b, h, q, k)
        (qb, qh), (kb, kh) = at(box, b, h), at(numbers, b, h)
        seen = torch.ones_like(what, dtype=torch.bool)
        for a in range(numbers.shape[2]):
            place = numbers[kb, kh, a, k]
            seen = seen & (box[qb, qh, 0, a, q] <= place) & (place < box[qb, qh, 1, a, q])
        return (what == 2) | (what == 1) & (seen | (numbers[kb, kh, 0, k] == SEEN_BY_ALL))

    return by_box
