"""A layout is exact for a mask: the same pairs, and the blocks that are seen whole, in part and not at all are listed as such."""

from __future__ import annotations

import torch

from saccade.attention import BlockLayout
from saccade.attention._check_layout import check_whole


def positions(order: torch.Tensor | None, length: int, block: int) -> list[int]:
    """The token at each position, -1 for none."""
    if order is None:
        blocks = -(-length // block)
        return [p if p < length else -1 for p in range(blocks * block)]
    return order.tolist()


def block_classes(mask: torch.Tensor, q: list[int], k: list[int], block: tuple[int, int]) -> torch.Tensor:
    """[nQ, nK] 0 not seen, 1 in part, 2 whole, by looking at every pair of tokens that exists."""
    out = torch.zeros(len(q) // block[0], len(k) // block[1], dtype=torch.uint8)
    for i in range(out.shape[0]):
        rows = [t for t in q[i * block[0] : (i + 1) * block[0]] if t >= 0]
        for j in range(out.shape[1]):
            columns = [t for t in k[j * block[1] : (j + 1) * block[1]] if t >= 0]
            piece = mask[rows][:, columns]
            out[i, j] = 0 if not piece.numel() or not piece.any() else 2 if piece.all() else 1
    return out


def of_head(table: torch.Tensor | None, b: int, h: int) -> torch.Tensor | None:
    if table is None:
        return None
    return table[b if table.shape[0] > 1 else 0, h if table.shape[1] > 1 else 0]


def check_exact(layout: BlockLayout, mask: torch.Tensor) -> None:
    """`mask` is [Sq, Sk] or [1|B, 1|H, Sq, Sk]."""
    mask = mask if mask.ndim == 4 else mask[None, None]
    shown = layout.to_mask()
    shape = torch.broadcast_shapes(shown.shape, mask.shape)
    assert torch.equal(shown.expand(shape), mask.expand(shape))
    block = layout.q_block, layout.k_block
    classes = layout.block_map()
    for b in range(shape[0]):
        for h in range(shape[1]):
            q = positions(of_head(layout.q_order, b, h), layout.q_len, block[0])
            k = positions(of_head(layout.k_order, b, h), layout.k_len, block[1])
            assert sorted(t for t in q if t >= 0) == list(range(layout.q_len))
            assert sorted(t for t in k if t >= 0) == list(range(layout.k_len))
            wanted = block_classes(of_head(mask, b, h), q, k, block)
            assert torch.equal(of_head(classes, b, h), wanted)
    listed = layout.counts.sum() / max(classes.numel(), 1)
    assert float(layout.density) == float(listed)
    check_whole(layout)
