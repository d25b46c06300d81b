"""Orders of the tokens of a video: which token lies at each position, so that tokens which see each other share blocks.

An order is int32 [1, 1, P], P a multiple of the block, with -1 at positions that hold no token. It goes into `q_order` and `k_order` of a
`BlockLayout`: attention reads and writes the tokens where they are, nothing is copied. Text before and after the video has blocks of
its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from saccade._arguments import grid_sizes, items, whole

__all__ = ["frame_order", "tile_order", "token_order", "window_order", "window_spans"]

ROOM = 1.5  # groups are filled up to whole blocks where all positions together stay below this multiple of the tokens


def _filled(count: int, block: int) -> int:
    return -(-count // block) * block


def place_groups(
    group: torch.Tensor, block: int, *, prefix: int = 0, suffix: int = 0, ends: bool = True
) -> torch.Tensor:
    """The position of every token, int64 [prefix + N + suffix], from the group of each video token [N], groups numbered from 0.

    Tokens of a group lie together, in the order of their index. Each group begins a new block where that costs at most half as many
    positions again as there are tokens; else they lie back to back. `ends` gives prefix and suffix blocks of their own.
    """
    count = group.numel()
    sizes = torch.bincount(group) if count else group.new_zeros(1)
    room = -(-sizes // block) * block
    if int(room.sum()) > ROOM * count:
        room = sizes
    start = room.cumsum(0) - room
    by_group = torch.argsort(group, stable=True)
    rank = torch.empty_like(group)
    rank[by_group] = torch.arange(count) - (sizes.cumsum(0) - sizes)[group[by_group]]
    first = _filled(prefix, block) if ends else prefix
    video = first + start[group] + rank
    after = first + int(room.sum())
    after = _filled(after, block) if ends and suffix else after
    return torch.cat((torch.arange(prefix), video, after + torch.arange(suffix)))


def order_of(place: torch.Tensor, block: int, device: Any = None) -> torch.Tensor:
    """int32 [1, 1, P]: the token at each position, from the position of each token."""
    positions = _filled(int(place.max()) + 1, block) if place.numel() else 0
    order = torch.full((positions,), -1, dtype=torch.int32)
    order[place] = torch.arange(place.numel(), dtype=torch.int32)
    return order.to(device)[None, None]


def grid_places(grid: tuple[int, int, int]) -> torch.Tensor:
    """int64 [3, T*H*W]: frame, row and column of every token, t-major."""
    axes = [torch.arange(size) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1)


def text_sizes(prefix: Any, suffix: Any) -> tuple[int, int]:
    """The checked numbers of text tokens before and after the video."""
    return whole(prefix, "prefix", 0), whole(suffix, "suffix", 0)


def window_spans(size: int, window: int, shift: int) -> list[tuple[int, int]]:
    """The windows [from, to) of one axis: [0, shift), then pieces of `window`, the last one what is left.

    Example:
        >>> window_spans(7, 3, 0), window_spans(7, 3, 1)
        ([(0, 3), (3, 6), (6, 7)], [(0, 1), (1, 4), (4, 7)])
    """
    edges = sorted({0, size, *range(shift, size, window)} if size else {0})
    return list(itertools.pairwise(edges))


def span_index(spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """int64 [size]: the span of every coordinate."""
    lengths = torch.tensor([high - low for low, high in spans], dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(spans)), lengths)


def group_windows(grid: tuple[int, int, int], spans: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
    """int64 [T*H*W]: the window of every token, windows numbered t-major."""
    t, h, w = (span_index(one)[place] for one, place in zip(spans, grid_places(grid), strict=True))
    return (t * len(spans[1]) + h) * len(spans[2]) + w


def axis_windows(
    grid: tuple[int, int, int], window: Any, shift: Any, name: str
) -> tuple[list[list[tuple[int, int]]], tuple[int, ...]]:
    """Spans of every axis, and the window sizes used. An axis that one window covers is not shifted, as in Video Swin."""
    sizes = grid_sizes(window, name, 1)
    shifts = (
        (0, 0, 0)
        if shift is None
        else tuple(whole(s, f"shift[{i}]", 0) for i, s in enumerate(items(shift, "shift", 3)))
    )
    spans, used = [], []
    for n, (size, want, off) in enumerate(zip(grid, sizes, shifts, strict=True)):
        if off >= want:
            raise ValueError(f"shift[{n}]: expected less than the window, {want}, got {off}")
        spans.append(window_spans(size, want, 0 if size <= want else off))
        used.append(min(size, want))
    return spans, tuple(used)


def frame_order(
    grid: Sequence[int], *, prefix: int = 0, suffix: int = 0, block: int = 64, device: Any = None
) -> torch.Tensor:
    """Frame-major: tokens as they come, text in blocks of its own. int32 [1, 1, P].

    Example:
        >>> frame_order((1, 2, 2), prefix=2)[0, 0, [0, 1, 2, 64, 67, 68]].tolist()
        [0, 1, -1, 2, 5, -1]
    """
    sizes, (before, after) = grid_sizes(grid, "grid"), text_sizes(prefix, suffix)
    one = torch.zeros(sizes[0] * sizes[1] * sizes[2], dtype=torch.int64)
    return order_of(place_groups(one, whole(block, "block", 1), prefix=before, suffix=after), block, device)


def token_order(
    grid: Sequence[int], *, prefix: int = 0, suffix: int = 0, block: int = 64, device: Any = None
) -> torch.Tensor:
    """Token-major: all frames of one place (h, w) together (Sparse VideoGen's layout for temporal heads). int32 [1, 1, P].

    Example:
        >>> token_order((3, 1, 2))[0, 0, :7].tolist()
        [0, 2, 4, 1, 3, 5, -1]
    """
    sizes, (before, after) = grid_sizes(grid, "grid"), text_sizes(prefix, suffix)
    place = place_groups(
        torch.zeros(sizes[0] * sizes[1] * sizes[2], dtype=torch.int64),
        whole(block, "block", 1),
        prefix=before,
        suffix=after,
    )
    count = sizes[0] * sizes[1] * sizes[2]
    video = place[before : before + count].clone()
    place[before : before + count] = video.reshape(sizes[1] * sizes[2], sizes[0]).T.reshape(-1)
    return order_of(place, block, device)


def tile_order(
    grid: Sequence[int],
    tile: Sequence[int],
    *,
    prefix: int = 0,
    suffix: int = 0,
    block: int = 64,
    device: Any = None,
) -> torch.Tensor:
    """Tiles (t, h, w) one after another, t-major inside and between; tiles at the border are smaller. int32 [1, 1, P].

    Every tile begins a new block where the holes this leaves cost at most half as many positions again as there are tokens.

    Example:
        >>> tile_order((1, 2, 4), (1, 2, 2))[0, 0, :9].tolist()  # two tiles of 4 in blocks of 64: back to back
        [0, 1, 4, 5, 2, 3, 6, 7, -1]
    """
    return window_order(grid, tile, prefix=prefix, suffix=suffix, block=block, device=device)


def window_order(
    grid: Sequence[int],
    window: Sequence[int],
    *,
    shift: Sequence[int] | None = None,
    prefix: int = 0,
    suffix: int = 0,
    block: int = 64,
    device: Any = None,
) -> torch.Tensor:
    """Windows (t, h, w) one after another, cut `shift` behind the edge of the video. int32 [1, 1, P]; see `tile_order`."""
    sizes, (before, after) = grid_sizes(grid, "grid"), text_sizes(prefix, suffix)
    spans, _ = axis_windows(sizes, window, shift, "window")
    group = group_windows(sizes, spans)
    return order_of(place_groups(group, whole(block, "block", 1), prefix=before, suffix=after), block, device)
