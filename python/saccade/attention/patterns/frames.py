"""Patterns over whole frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from saccade._arguments import choice, whole
from saccade.attention.boxes import HIGH, LOW, from_intervals
from saccade.attention.layout import SEEN_BY_ALL, BlockLayout
from saccade.attention.orders import frame_order
from saccade.attention.patterns._tokens import Video, by_position, check_flag

__all__ = ["frame_causal"]


def frame_causal(
    grid: Sequence[int],
    *,
    window: int | None = None,
    sink: bool = False,
    prefix: int = 0,
    prefix_sees: str = "prefix",
    block: int | tuple[int, int] = 64,
    device: Any = None,
) -> BlockLayout:
    """A token sees its own and earlier frames, whole (autoregressive video generators: CausVid, arXiv 2412.07772; Self Forcing).

    Args:
        grid: (T, H, W).
        window: how many frames a token sees at most, its own included; None: all.
        sink: the first frame stays visible when the window has left it.
        prefix: text tokens in front; every query sees them.
        prefix_sees: "prefix", text sees text alone, so that no later frame reaches an earlier one through it; or "all".
        block, device: as in `dense`.

    Example:
        >>> frame_causal((3, 1, 1), window=1, sink=True, prefix=1).to_mask()[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    """
    video = Video(grid, prefix, 0, block)
    frame = torch.arange(video.count) // max(video.frame, 1)
    start = torch.zeros_like(frame) if window is None else frame + 1 - whole(window, "window", 1)
    sees = choice(prefix_sees, "prefix_sees", ("prefix", "all"))
    text = (LOW, HIGH) if sees == "all" else (0, 0)
    low = video.query_table(start * video.frame, text[0])[None, None]
    high = video.query_table((frame + 1) * video.frame, text[1])[None, None]
    at = video.query_table(torch.arange(video.count), 0)
    at[: video.prefix + (video.frame if check_flag(sink, "sink") else 0)] = SEEN_BY_ALL
    orders: list[Any] = [None, None]
    shown = None
    if sink and video.prefix and sees == "prefix":
        # All see the first frame, save text: its queries, in blocks of their own, do not list the blocks of the video.
        orders = [frame_order(video.grid, prefix=video.prefix, block=one) for one in video.block]
        text_blocks = [-(-video.prefix // one) for one in video.block]
        rows, columns = (torch.arange(o.shape[2] // b) for o, b in zip(orders, video.block, strict=True))
        shown = ((rows >= text_blocks[0])[:, None] | (columns < text_blocks[1])).to(device)
    low, high = (by_position(x, orders[0], video.length, video.block[0]).to(device) for x in (low, high))
    numbers = by_position(at, orders[1], video.length, video.block[1])[None, None].to(device)
    q_order, k_order = (None if order is None else order.to(device) for order in orders)
    return from_intervals(
        low, high, numbers, video.length, video.length, video.block, q_order=q_order, k_order=k_order, shown=shown
    )
