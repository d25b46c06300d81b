"""Windows over the grid: sliding tiles, neighbourhoods, Swin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from saccade._arguments import grid_sizes, items, whole
from saccade.attention.boxes import from_boxes, from_intervals
from saccade.attention.layout import BlockLayout
from saccade.attention.orders import (
    axis_windows,
    grid_places,
    group_windows,
    order_of,
    place_groups,
)
from saccade.attention.patterns._tokens import Video, arranged, check_flag

__all__ = ["neighborhood", "sliding_tile", "window"]

Tensor = torch.Tensor
Block = int | tuple[int, int]


def _orders(video: Video, group: Tensor) -> tuple[Tensor, Tensor]:
    """Orders of queries and keys in which the groups lie together."""
    both = [place_groups(group, block, prefix=video.prefix, suffix=video.suffix) for block in video.block]
    return order_of(both[0], video.block[0]), order_of(both[1], video.block[1])


def _per_head(value: Any, name: str) -> list[tuple[int, int, int]]:
    """One window (t, h, w), or a list with one for each head."""
    windows = items(value, name)
    if windows and not isinstance(windows[0], Sequence):
        return [grid_sizes(windows, name, 1)]
    if not windows:
        raise ValueError(f"{name}: expected a window (t, h, w), or one for each head, got none")
    return [grid_sizes(one, f"{name}[{n}]", 1) for n, one in enumerate(windows)]


def sliding_tile(
    grid: Sequence[int],
    tile: Sequence[int] = (6, 8, 8),
    window: Sequence[Any] = (3, 3, 3),
    *,
    prefix: int = 0,
    suffix: int = 0,
    block: Block = 64,
    device: Any = None,
) -> BlockLayout:
    """Sliding tile attention (Zhang et al. 2025, arXiv 2502.04507, algorithm 1): all queries of a tile see the tiles of one window.

    The video is cut into tiles; the window is centred on the query's tile, its centre clamped so that the window stays inside the
    video. Text sees everything and every query sees it. Tokens are addressed tile by tile (`tile_order`), so blocks are whole where
    tiles fill them. Differences to the published kernels: any T x H x W, where tiles at the border are smaller, in place of three fixed
    canvases; any tile and window; gradients.

    Args:
        grid: (T, H, W).
        tile: (t, h, w) tokens.
        window: (t, h, w) tiles, odd, or at least as many as the axis has (then it sees the whole axis); or a list with one for each head.
        prefix, suffix: text tokens before and after the video (HunyuanVideo has them after it).
        block, device: as in `dense`.

    Example:
        >>> layout = sliding_tile((12, 16, 24), window=(1, 1, 3))
        >>> round(float(layout.density), 3), layout.partial is None
        (0.25, True)
    """
    video = Video(grid, prefix, suffix, block)
    spans, _ = axis_windows(video.grid, tile, None, "tile")
    counts = [len(one) for one in spans]
    group = group_windows(video.grid, spans)
    places = torch.stack([group // (counts[1] * counts[2]), group // counts[2] % counts[1], group % counts[2]])
    lows, highs = [], []
    for n, sizes in enumerate(_per_head(window, "window")):
        reach = []
        for a, (size, tiles) in enumerate(zip(sizes, counts, strict=True)):
            if size % 2 == 0 and size < tiles:
                raise ValueError(
                    f"window: expected odd numbers of tiles, or the whole axis of {tiles}, got {size} for axis {a} of window {n}"
                )
            reach.append(min(size, tiles))
        shown, most = torch.tensor(reach)[:, None], torch.tensor(counts)[:, None]
        low = torch.minimum((places - shown // 2).clamp(min=0), most - shown)
        lows.append(low)
        highs.append(low + shown)
    boxes, keys = video.boxes(torch.stack(lows)[None], torch.stack(highs)[None]), video.keys(places[None, None])
    tables: Any = arranged(video, _orders(video, group), boxes, keys, device)
    return from_boxes(q_len=video.length, k_len=video.length, block=video.block, **tables)


def _three(value: Any, name: str, least: int) -> tuple[int, int, int]:
    return (whole(value, name, least),) * 3 if isinstance(value, int) else grid_sizes(value, name, least)


def _axis(size: int, window: int, stride: int, dilation: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Per coordinate of one axis: the interval of places it sees, and its own place. Places of a dilation group are consecutive."""
    x = torch.arange(size)
    inner, rest = x // dilation, x % dilation
    length = (size - rest + dilation - 1) // dilation  # of its group
    base = rest * (size // dilation + 1)
    first = inner // stride * stride
    if causal:
        leader = torch.minimum(first + stride - 1, length - 1)
        low, high = (leader - window + 1).clamp(min=0), inner + 1
    else:
        leader = torch.minimum(first + stride // 2, length - 1)
        low = torch.minimum(leader - window // 2, length - window).clamp(min=0)
        high = torch.minimum(low + window, length)
    return base + low, base + high, base + inner


def neighborhood(
    grid: Sequence[int],
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    tile: Sequence[int] | None = None,
    prefix: int = 0,
    suffix: int = 0,
    block: Block = 64,
    device: Any = None,
) -> BlockLayout:
    """Neighbourhood attention, exactly (Hassani et al. 2023, arXiv 2204.07143; strided: 2025, arXiv 2504.16922): a window around each
    token.

    Per axis, a token sees the `window` tokens of its dilation group around the leader of its stride group: the middle one (the right
    one of two), or the last one on a causal axis, where it sees none behind itself. The window is moved, not cut, at the borders of an
    axis that is not causal. An even window has one token more on the left. As NATTEN 0.21 defines it; a window larger than the axis,
    which NATTEN refuses, sees the whole group here. Text sees everything and every query sees it.

    Args:
        grid: (T, H, W).
        window, stride, dilation: one size, or (t, h, w); stride at most the window. A stride as large as the window gives blocked
            attention.
        causal: for all axes, or one of them each.
        tile: (t, h, w), lays the tokens in such tiles, so that fewer blocks are met; the result is the same. None: as they come.
        prefix, suffix: text tokens before and after the video.
        block, device: as in `dense`.

    Example:
        >>> neighborhood((1, 1, 4), (1, 1, 3)).to_mask()[0, 0].int().tolist()
        [[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    """
    video = Video(grid, prefix, suffix, block)
    sizes, strides, steps = _three(window, "window", 1), _three(stride, "stride", 1), _three(dilation, "dilation", 1)
    flags = (causal,) * 3 if isinstance(causal, bool) else items(causal, "causal", 3)
    for a, flag in enumerate(flags):
        check_flag(flag, f"causal[{a}]")
        if strides[a] > sizes[a]:
            raise ValueError(f"stride: expected at most the window, {sizes[a]}, got {strides[a]} for axis {a}")
    axes = [_axis(*each) for each in zip(video.grid, sizes, strides, steps, flags, strict=True)]
    places = grid_places(video.grid)
    low, high, at = (torch.stack([axis[n][place] for axis, place in zip(axes, places, strict=True)]) for n in range(3))
    orders: tuple[Tensor | None, Tensor | None] = (None, None)
    if tile is not None:
        spans, _ = axis_windows(video.grid, tile, None, "tile")
        orders = _orders(video, group_windows(video.grid, spans))
    boxes, keys = video.boxes(low[None, None], high[None, None]), video.keys(at[None, None])
    tables: Any = arranged(video, orders, boxes, keys, device)
    return from_boxes(q_len=video.length, k_len=video.length, block=video.block, **tables)


def window(
    grid: Sequence[int],
    window: Sequence[int],
    *,
    shift: Sequence[int] | None = None,
    prefix: int = 0,
    suffix: int = 0,
    block: Block = 64,
    device: Any = None,
) -> BlockLayout:
    """Windows of Swin (Liu et al. 2021, arXiv 2103.14030, section 3.2; Video Swin, arXiv 2106.13230): tokens see their own window.

    With `shift` the windows are cut `shift` tokens further on. Published code rolls the video, cuts regular windows and masks the
    regions that the roll has joined: on each axis that leaves the pieces [0, shift), [shift, shift + window), ... which this takes as
    windows. It pads the video to whole windows, and unmasked padding is seen as zeros; here nothing is padded. An axis that one window
    covers is not shifted. Tokens are addressed window by window (`window_order`). Text sees everything and every query sees it.

    Args:
        grid: (T, H, W).
        window: (t, h, w).
        shift: (t, h, w), each less than the window; half of it in every second layer of Swin.
        prefix, suffix: text tokens before and after the video.
        block, device: as in `dense`.

    Example:
        >>> window((1, 1, 5), (1, 1, 2), shift=(0, 0, 1)).to_mask()[0, 0].int().tolist()
        [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    """
    video = Video(grid, prefix, suffix, block)
    spans, _ = axis_windows(video.grid, window, shift, "window")
    group = group_windows(video.grid, spans)
    orders = _orders(video, group)
    boxes, keys = video.boxes(group[None, None, None], group[None, None, None] + 1), video.keys(group[None, None, None])
    tables: Any = arranged(video, orders, boxes, keys, device)
    box = tables.pop("box")
    return from_intervals(
        box[:, :, 0, 0], box[:, :, 1, 0], tables.pop("at")[:, :, 0], video.length, video.length, video.block, **tables
    )
