"""Masks of the patterns written from their definitions: one Python predicate per pair of tokens, no code of the package."""

from __future__ import annotations

from collections.abc import Callable

import torch

Place = tuple[int, int, int]


def places(grid: Place, prefix: int, suffix: int) -> list[Place | None]:
    """(t, h, w) of every token, None for text."""
    video = [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
    return [*[None] * prefix, *video, *[None] * suffix]


def video_mask(grid: Place, prefix: int, suffix: int, sees: Callable[[Place, Place], bool]) -> torch.Tensor:
    """[S, S]: `sees` between video tokens, everything with text."""
    tokens = places(grid, prefix, suffix)
    return torch.tensor([[q is None or k is None or sees(q, k) for k in tokens] for q in tokens]).reshape(
        len(tokens), -1
    )


def sliding_tile(grid: Place, tile: Place, window: Place) -> Callable[[Place, Place], bool]:
    def axis(q: int, k: int, a: int) -> bool:
        tiles = -(-grid[a] // tile[a])
        if window[a] >= tiles:
            return True
        half = window[a] // 2
        centre = min(max(q // tile[a], half), tiles - 1 - half)
        return abs(centre - k // tile[a]) <= half

    return lambda q, k: all(axis(q[a], k[a], a) for a in range(3))


def neighborhood(grid: Place, window: Place, stride: Place, dilation: Place, causal: tuple[bool, ...]):
    def axis(q: int, k: int, a: int) -> bool:
        size, w, s, d = grid[a], window[a], stride[a], dilation[a]
        if q % d != k % d:
            return False
        group = [x for x in range(size) if x % d == q % d]
        i, j, n = group.index(q), group.index(k), len(group)
        if causal[a]:
            leader = min(i // s * s + s - 1, n - 1)
            return j <= i and leader - j < w
        leader = min(i // s * s + s // 2, n - 1)
        if w >= n:
            return True
        left, right = w // 2, w - 1 - w // 2
        leader = min(max(leader, left), n - 1 - right)
        return leader - left <= j <= leader + right

    return lambda q, k: all(axis(q[a], k[a], a) for a in range(3))


def swin(grid: Place, window: Place, shift: Place) -> Callable[[Place, Place], bool]:
    """As published: pad, roll by -shift, cut into windows, and mask what the roll has joined."""
    size, off, padded = [], [], []
    for a in range(3):
        whole = grid[a] <= window[a]
        size.append(grid[a] if whole else window[a])
        off.append(0 if whole else shift[a])
        padded.append(-(-grid[a] // max(size[a], 1)) * size[a])

    def label(x: int, a: int) -> tuple[int, int]:
        rolled = (x - off[a]) % padded[a]
        region = 0
        if off[a]:
            region = 0 if rolled < padded[a] - size[a] else 1 if rolled < padded[a] - off[a] else 2
        return rolled // size[a], region

    return lambda q, k: all(label(q[a], a) == label(k[a], a) for a in range(3))


def band(grid: Place, width: float, sink: bool, by_token: bool) -> Callable[[Place, Place], bool]:
    t, h, w = grid

    def index(p: Place) -> int:
        return (p[1] * w + p[2]) * t + p[0] if by_token else (p[0] * h + p[1]) * w + p[2]

    return lambda q, k: (sink and k[0] == 0) or abs(index(q) - index(k)) < width * h * w


def radial(grid: Place, decay: float, least: int, near: str, sink: bool) -> Callable[[Place, Place], bool]:
    tokens = grid[1] * grid[2]

    def sees(q: Place, k: Place) -> bool:
        if sink and k[0] == 0:
            return True
        d = abs(q[0] - k[0])
        length = 2 ** len(f"{tokens:b}") / 2 ** (len(f"{d:b}") if d else 0)
        if length < least and d % int(least / length):
            return False
        far = abs((q[1] * grid[2] + q[2]) - (k[1] * grid[2] + k[2]))
        if d == 0 or (near == "hunyuan" and d == 1):
            return far <= tokens
        if d == 1:
            return far <= tokens // 2
        return far <= max(length * decay, least)

    return sees


def frame_causal(grid: Place, prefix: int, window: int | None, sink: bool, prefix_sees: str) -> torch.Tensor:
    tokens = places(grid, prefix, 0)

    def sees(q: Place | None, k: Place | None) -> bool:
        if k is None:
            return True
        if q is None:
            return prefix_sees == "all"
        near = window is None or q[0] - k[0] < window
        return k[0] <= q[0] and (near or (sink and k[0] == 0))

    return torch.tensor([[sees(q, k) for k in tokens] for q in tokens]).reshape(len(tokens), -1)


def packed(q_ends: list[int], k_ends: list[int], q_len: int, k_len: int, causal: bool) -> torch.Tensor:
    mask = torch.zeros(q_len, k_len, dtype=torch.bool)
    for s in range(len(q_ends) - 1):
        queries, keys = q_ends[s + 1] - q_ends[s], k_ends[s + 1] - k_ends[s]
        for i in range(queries):
            for j in range(keys):
                if not causal or j <= i + keys - queries:
                    mask[q_ends[s] + i, k_ends[s] + j] = True
    return mask


def media_time(media: list[list[bool]], count: int, tokens: int, see: str) -> torch.Tensor:
    out = []
    for row in media:
        rows, seen = [], 0
        for marker in row:
            seen += marker
            rows.append(
                [(n + 1 == seen if see == "latest" else n + 1 <= seen) for n in range(count) for _ in range(tokens)]
            )
        out.append([rows])
    return torch.tensor(out).reshape(len(media), 1, len(media[0]), count * tokens)
