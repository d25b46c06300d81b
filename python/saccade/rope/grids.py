"""Positions of tokens on a grid.

All positions are computed in float64 and returned [A, S], one row per axis, tokens in t-major order: int64 where every
one is whole, float64 otherwise. bfloat16 and float16 cannot hold positions and are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saccade._arguments import grid_sizes, items, number, whole

__all__ = ["grid_positions", "normalise_positions", "qwen_vision_positions"]

_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


def finish(rows: torch.Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> torch.Tensor:
    """float64 [A, S] on the device, as int64 where whole, or in the dtype asked for."""
    fractional = bool((rows != rows.floor()).any())
    if dtype is None:
        dtype = torch.float64 if fractional else torch.int64
    elif dtype not in _DTYPES:
        raise ValueError(f"dtype: expected int32, int64, float32 or float64, got {dtype}")
    elif fractional and not dtype.is_floating_point:
        raise ValueError(f"dtype: the positions are not whole numbers, {dtype} cannot hold them")
    return rows.to(device=device, dtype=dtype)


def mesh(t: torch.Tensor, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """[3, T*H*W] from coordinates per axis."""
    return torch.stack(torch.meshgrid(t, h, w, indexing="ij")).reshape(3, -1)


def numbers(value: Sequence[float], name: str, count: int, above: float | None = None) -> tuple[float, ...]:
    return tuple(float(number(x, f"{name}[{i}]", above)) for i, x in enumerate(items(value, name, count)))


def indices(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float64)


def grid_positions(
    grid: Sequence[int],
    *,
    stride: Sequence[float] = (1, 1, 1),
    origin: Sequence[float] = (0, 0, 0),
    centered: bool | Sequence[bool] = False,
    prefix: int = 0,
    suffix: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Positions [3, prefix + T*H*W + suffix] of a grid (T, H, W): origin + stride * index.

    Args:
        grid: sizes (T, H, W); a zero gives no tokens.
        stride: units of position per step along t, h, w.
        origin: position of index 0, or of the middle where `centered`.
        centered: measure the index from the middle, index - (size - 1) / 2; for all axes, or one bool per axis.
        prefix, suffix: text tokens before and after; they stand at position 0 of every axis, where nothing turns
            (CogVideoX has them before the video, HunyuanVideo after).
        device, dtype: of the result; int64 or float64 by default, whichever the positions need.

    Example:
        >>> grid_positions((1, 2, 2), prefix=1)
        tensor([[0, 0, 0, 0, 0],
                [0, 0, 0, 1, 1],
                [0, 0, 1, 0, 1]])
    """
    sizes = grid_sizes(grid, "grid")
    steps, origins = numbers(stride, "stride", 3), numbers(origin, "origin", 3)
    middle = (centered,) * 3 if isinstance(centered, bool) else items(centered, "centered", 3)
    if not all(isinstance(c, bool) for c in middle):
        raise TypeError(f"centered: expected True, False or one of them per axis, got {centered!r}")
    before, after = whole(prefix, "prefix", 0), whole(suffix, "suffix", 0)
    t, h, w = (origins[a] + steps[a] * (indices(n) - ((n - 1) / 2 if middle[a] else 0.0)) for a, n in enumerate(sizes))
    text = [torch.zeros(3, n, dtype=torch.float64) for n in (before, after)]
    return finish(torch.cat((text[0], mesh(t, h, w), text[1]), 1), device, dtype)


def qwen_vision_positions(
    grids: Sequence[Sequence[int]], *, merge: int = 2, device: torch.device | str | None = None
) -> torch.Tensor:
    """Positions [2, N] (h, w) of the patches of all grids (T, H, W) in turn, merge x merge blocks of patches together.

    Example:
        >>> qwen_vision_positions([(1, 2, 4)])
        tensor([[0, 0, 1, 1, 0, 0, 1, 1],
                [0, 1, 0, 1, 2, 3, 2, 3]])
    """
    block = whole(merge, "merge", 1)
    parts = [torch.zeros(2, 0, dtype=torch.int64)]
    for n, grid in enumerate(items(grids, "grids")):
        t, h, w = grid_sizes(grid, f"grids[{n}]")
        if h % block or w % block:
            raise ValueError(f"grids[{n}]: expected height and width that merge={block} divides, got {(t, h, w)}")
        place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
        place = place.reshape(2, h // block, block, w // block, block).transpose(2, 3).reshape(2, -1)
        parts.append(place.repeat(1, t))
    return torch.cat(parts, 1).to(device)


def normalise_positions(coordinates: torch.Tensor, size: Sequence[float]) -> torch.Tensor:
    """2 * coordinates / size - 1 for coordinates [A, ..., S] and one size per axis, in float64 (LTX's range [-1, 1]).

    Example:
        >>> normalise_positions(torch.tensor([[0, 10, 20]]), (20,))
        tensor([[-1.,  0.,  1.]], dtype=torch.float64)
    """
    if not isinstance(coordinates, torch.Tensor) or coordinates.ndim < 2:
        raise TypeError("coordinates: expected a tensor [A, ..., S]")
    if coordinates.is_floating_point() and coordinates.dtype not in _DTYPES:
        raise ValueError(f"coordinates: expected whole numbers, float32 or float64, got {coordinates.dtype}")
    sizes = numbers(size, "size", coordinates.shape[0], 0.0)
    scale = torch.tensor(sizes, dtype=torch.float64, device=coordinates.device)
    return 2 * coordinates.double() / scale.view(-1, *[1] * (coordinates.ndim - 1)) - 1
