"""Plain pooling of video tokens, frame by frame, as captioners do it between vision tower and language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn import functional

from saccade._arguments import choice, grid_sizes, items, whole
from saccade.merge._check import check_values

__all__ = ["pixel_shuffle", "pixel_unshuffle", "pool2d"]

Grid = tuple[int, int, int]


def _tokens(x: Any, grid: Any, name: str = "x") -> tuple[torch.Tensor, Grid]:
    x = check_values(name, x)
    t, h, w = grid_sizes(grid, "grid", 1)
    if t * h * w != x.shape[1]:
        raise ValueError(f"grid: {(t, h, w)} has {t * h * w} tokens, {name} has {x.shape[1]} (shape {list(x.shape)})")
    return x, (t, h, w)


def _pair(value: Any, name: str) -> tuple[int, int]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        first, second = (whole(v, f"{name}[{i}]", 1) for i, v in enumerate(items(value, name, 2)))
        return first, second
    return whole(value, name, 1), whole(value, name, 1)


class _Bilinear(torch.autograd.Function):
    """Resampling without antialiasing. Its gradient is by two small matrices: torch's own adds with atomics on a GPU."""

    @staticmethod
    def forward(ctx: Any, x, size):  # type: ignore[no-untyped-def]
        ctx.shape = x.shape
        return functional.interpolate(x, size=size, mode="bilinear")

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        wide = dy if dy.dtype == torch.float64 else dy.float()
        rows, columns = (_resampling(n, m, wide) for n, m in zip(ctx.shape[2:], dy.shape[2:], strict=True))
        return torch.einsum("bchw,ih,jw->bcij", wide, rows, columns).to(dy.dtype), None


def _resampling(before: int, after: int, like: torch.Tensor) -> torch.Tensor:
    """[before, after]: the share of every input in every output."""
    one_each = torch.eye(before, dtype=like.dtype, device=like.device)[:, None]
    return functional.interpolate(one_each, size=after, mode="linear")[:, 0]


def _count(n: int, kernel: int, stride: int, ceil: bool) -> int:
    """Windows along an axis; with `ceil` also one that overhangs, where it begins inside."""
    full = (n - kernel) // stride + 1
    return full + (ceil and (full - 1) * stride + kernel < n and full * stride < n)


def pool2d(
    x: torch.Tensor,
    grid: Sequence[int],
    kernel: int | Sequence[int] = 2,
    *,
    mode: Literal["mean", "max", "bilinear"] = "mean",
    stride: int | Sequence[int] | None = None,
    ceil: bool = False,
) -> torch.Tensor:
    """Pool the tokens of every frame (LLaVA-OneVision, arXiv 2408.03326; LLaVA-Video, arXiv 2410.02713: their `get_2dPool`).

    A grid of 27 x 27 (SigLIP at 384) under a kernel of 2: "mean" and "max" make 13 x 13 = 169 tokens, the last row and column left out;
    with `ceil` they make 14 x 14 = 196, the last windows holding what is left of the grid (2 or 1 tokens, no padding in the mean).
    "bilinear" always makes ceil(27 / 2) = 14, which is where the 196 tokens of a frame of LLaVA-Video and LLaVA-OneVision come from: it
    resamples at 14 points a side (align_corners=False, no antialiasing), each between its 4 neighbours.

    Reads tokens as they lie, without LLaVA's two transposed copies. Sums are fp32 (fp64 for fp64). Differentiable.

    Args:
        x: [B, T * H * W, D], tokens in t-major order, fp32, fp16, bf16, fp64, any strides.
        grid: (T, H, W).
        kernel: (h, w) or one number for both, at most the grid's size.
        mode: "mean", "max" (NaN where a window has one) or "bilinear".
        stride: (h, w) or one number; None for the kernel, as "bilinear" has it.
        ceil: whether "mean" and "max" keep a remainder that fills no window.

    Returns:
        [B, T * Ho * Wo, D] in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.arange(4.0).view(1, 4, 1)
        >>> merge.pool2d(x, (1, 2, 2)).flatten().tolist()
        [1.5]
        >>> merge.pool2d(torch.zeros(1, 729, 8), (1, 27, 27), mode="bilinear").shape
        torch.Size([1, 196, 8])
    """
    x, (t, h, w) = _tokens(x, grid)
    choice(mode, "mode", ("mean", "max", "bilinear"))
    size = _pair(kernel, "kernel")
    step = size if stride is None else _pair(stride, "stride")
    for axis, k, n in zip("HW", size, (h, w), strict=True):
        if k > n:
            raise ValueError(f"kernel: {k} along {axis} does not fit the grid's {n}")
    if mode == "bilinear" and step != size:
        raise ValueError(f'stride: expected None or the kernel {size} with mode="bilinear", got {step}')
    batch, _, width = x.shape
    if batch * width == 0:
        out = [
            math.ceil(n / k) if mode == "bilinear" else _count(n, k, s, ceil)
            for n, k, s in zip((h, w), size, step, strict=True)
        ]
        return x.new_empty(batch, t * out[0] * out[1], width)
    image = x.reshape(batch * t, h, w, width).permute(0, 3, 1, 2)  # channels last
    if mode == "bilinear":
        pooled = _Bilinear.apply(image, tuple(math.ceil(n / k) for n, k in zip((h, w), size, strict=True)))
    elif mode == "max":
        pooled = functional.max_pool2d(image, size, step, ceil_mode=bool(ceil))
    else:
        pooled = functional.avg_pool2d(image, size, step, ceil_mode=bool(ceil), count_include_pad=False)
    tokens: torch.Tensor = pooled.permute(0, 2, 3, 1).reshape(batch, -1, width)
    return tokens


def _factor(factor: Any, grid: Grid) -> int:
    f = whole(factor, "factor", 1)
    for axis, n in zip("HW", grid[1:], strict=True):
        if n % f:
            raise ValueError(f"factor: {f} does not divide the grid's {n} along {axis}")
    return f


def pixel_shuffle(x: torch.Tensor, grid: Sequence[int], factor: int = 2) -> torch.Tensor:
    """Stack every factor x factor square of a frame's tokens along the channels (InternVL 1.5, arXiv 2404.16821, section 3.1).

    No value is lost: it is space to depth, though InternVL names it by its inverse. Axes are as in InternVL ("ps_version" v2, and
    transformers' InternVLModel): row in the square, column in the square, channel, so that

        y[i, j] = cat(x[f i, f j], x[f i, f j + 1], ..., x[f i + 1, f j], ...)

    and output tokens in row-major order (InternVL's v1 left them transposed). The patch merger of Qwen2-VL stacks in the same order.

    Args:
        x: [B, T * H * W, D], tokens in t-major order, any float dtype and strides.
        grid: (T, H, W); factor divides H and W.
        factor: f, tokens along each side of a square.

    Returns:
        [B, T * (H / f) * (W / f), D * f * f].

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.arange(8.0).view(1, 8, 1)
        >>> merge.pixel_shuffle(x, (1, 2, 4), 2).tolist()
        [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    x, (t, h, w) = _tokens(x, grid)
    f = _factor(factor, (t, h, w))
    batch, _, width = x.shape
    squares = x.reshape(batch, t, h // f, f, w // f, f, width).transpose(3, 4)
    return squares.reshape(batch, t * (h // f) * (w // f), f * f * width)


def pixel_unshuffle(y: torch.Tensor, grid: Sequence[int], factor: int = 2) -> torch.Tensor:
    """The inverse of `pixel_shuffle`.

    Args:
        y: [B, T * (H / f) * (W / f), D * f * f], of `pixel_shuffle`.
        grid: (T, H, W) before shuffling.
        factor: f.

    Returns:
        [B, T * H * W, D].

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.arange(8.0).view(1, 8, 1)
        >>> bool((merge.pixel_unshuffle(merge.pixel_shuffle(x, (1, 2, 4)), (1, 2, 4)) == x).all())
        True
    """
    t, h, w = grid_sizes(grid, "grid", 1)
    f = _factor(factor, (t, h, w))
    y, _ = _tokens(y, (t, h // f, w // f), "y")
    batch, _, width = y.shape
    if width % (f * f):
        raise ValueError(f"y: expected a width that {f * f} (factor squared) divides, got {width}")
    squares = y.reshape(batch, t, h // f, w // f, f, f, width // (f * f)).transpose(3, 4)
    return squares.reshape(batch, t * h * w, width // (f * f))
