"""What the patterns share: checked arguments, and boxes of text and video tokens laid out by position."""

from __future__ import annotations

from typing import Any

import torch

from saccade._arguments import grid_sizes, whole
from saccade.attention._check import check_block
from saccade.attention.boxes import HIGH, LOW, exists, fill
from saccade.attention.layout import SEEN_BY_ALL

Tensor = torch.Tensor
Sizes = tuple[int, int, int]


def check_flag(value: Any, name: str) -> bool:
    """`value`, which must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


class Video:
    """Tokens: prefix text, a grid (T, H, W) t-major, suffix text."""

    def __init__(self, grid: Any, prefix: Any, suffix: Any, block: Any) -> None:
        self.grid: Sizes = grid_sizes(grid, "grid")
        self.prefix, self.suffix = whole(prefix, "prefix", 0), whole(suffix, "suffix", 0)
        self.block = check_block(block)
        self.count = self.grid[0] * self.grid[1] * self.grid[2]
        self.frame = self.grid[1] * self.grid[2]
        self.length = self.prefix + self.count + self.suffix

    def query_table(self, video: Tensor, text: int) -> Tensor:
        """[..., N] of the video tokens with `text` for each text token, [..., S]."""
        return torch.nn.functional.pad(video, (self.prefix, self.suffix), value=text)

    def boxes(self, low: Tensor, high: Tensor) -> Tensor:
        """[..., 2, A, S]: boxes of the video tokens [..., A, N]; text sees everything."""
        return torch.stack((self.query_table(low, LOW), self.query_table(high, HIGH)), -3)

    def keys(self, at: Tensor) -> Tensor:
        """[..., A, S]: places of the video tokens [..., A, N]; every query sees text."""
        out = self.query_table(at, 0)
        for text in (out[..., 0, : self.prefix], out[..., 0, self.prefix + self.count :]):
            text.fill_(SEEN_BY_ALL)
        return out


def by_position(table: Tensor, order: Tensor | None, length: int, block: int) -> Tensor:
    """A table [..., S] by token as int32 [..., P] by position; 0 where there is no token."""
    if order is None:
        return fill(table, block)
    place = order[0, 0].long()
    return table[..., place.clamp(min=0)].masked_fill(place < 0, 0).to(torch.int32).contiguous()


def arranged(
    video: Video, orders: tuple[Tensor | None, Tensor | None], boxes: Tensor, keys: Tensor, device: Any
) -> dict[str, Tensor | None]:
    """Tables by token [1, H, 2, A, S] and [1, H, A, S] as arguments of `from_boxes`."""
    q_order, k_order = orders
    return {
        "box": by_position(boxes, q_order, video.length, video.block[0]).to(device),
        "at": by_position(keys, k_order, video.length, video.block[1]).to(device),
        "q_order": None if q_order is None else q_order.to(device),
        "k_order": None if k_order is None else k_order.to(device),
    }


__all__ = ["Video", "arranged", "by_position", "check_flag", "exists"]
