"""`Tokens`: what a sequence is made of, and the windows that give a density on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Tokens", "tile_windows", "token_window"]

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Tokens:
    """A video of (T, H, W) tokens in t-major order, with text before or after it.

    Args:
        grid: (T, H, W).
        prefix, suffix: text tokens before and after the video.
    """

    grid: Sizes
    prefix: int = 0
    suffix: int = 0

    @property
    def video(self) -> int:
        """Tokens of the video."""
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        """All tokens."""
        return self.prefix + self.video + self.suffix

    def __str__(self) -> str:
        text = self.prefix + self.suffix
        return " x ".join(map(str, self.grid)) + (f" + {text} of text" if text else "")


def tile_windows(grid: Sizes, tile: Sequence[int], density: float) -> Sizes:
    """The window of tiles (odd, or the whole axis) whose share is nearest to `density`; among equals the most cubic."""
    counts = [max(-(-size // edge), 1) for size, edge in zip(grid, tile, strict=True)]
    choices = [[n for n in range(1, count + 1) if n % 2 or n == count] for count in counts]

    def badness(window: tuple[int, ...]) -> tuple[float, float]:
        share = math.prod(window) / math.prod(counts)
        reach = [min(1.0, n / count) for n, count in zip(window, counts, strict=True)]
        return round(abs(math.log(share / density)), 6), max(reach) - min(reach)

    t, h, w = min(itertools.product(*choices), key=badness)
    return t, h, w


def token_window(grid: Sizes, density: float) -> Sizes:
    """A window of tokens whose share of the grid is about `density`: the same share of every axis, at least one token."""
    share = density ** (1 / sum(size > 1 for size in grid)) if any(size > 1 for size in grid) else 1.0
    t, h, w = (max(1, round(size * share)) for size in grid)
    return t, h, w
