"""Sparse VideoGen: for every head the band that loses less, chosen on sampled rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from saccade._arguments import whole
from saccade.attention import _check
from saccade.attention.layout import BlockLayout, BlockLists
from saccade.attention.patterns._tokens import Video, check_flag
from saccade.attention.patterns.bands import band, reach

__all__ = ["svg", "svg_errors"]

Tensor = torch.Tensor
PIECE = 1 << 26  # scores held together


def _bands(
    video: Video, distance: int, sink: bool, device: torch.device
) -> tuple[BlockLayout, BlockLayout, Tensor, Tensor]:
    """Both layouts, over as many positions; the places [2, S] of tokens in the bands, and bool [S]: the keys that all see."""
    key = video.grid, (video.prefix, video.suffix, video.block), distance, sink, device
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _built(*key)
    return _kept(*key)


def _built(
    grid: tuple[int, int, int],
    sizes: tuple[int, int, tuple[int, int]],
    distance: int,
    sink: bool,
    device: torch.device,
) -> tuple[BlockLayout, BlockLayout, Tensor, Tensor]:
    with torch.inference_mode(False):
        video = Video(grid, *sizes)
        near, far = (band(video, distance, sink, by_token, device, laid=True) for by_token in (False, True))
        n, frames, frame = torch.arange(video.count), video.grid[0], max(video.frame, 1)
        rank = torch.stack((n, n % frame * frames + n // frame))
        common = torch.ones(video.length, dtype=torch.bool)
        common[video.prefix + (video.frame if sink else 0) : video.prefix + video.count] = False
        return near, far, video.query_table(rank, 0).to(device), common.to(device)


_kept = functools.lru_cache(maxsize=32)(_built)


def _prepared(
    q: Any, k: Any, v: Any, grid: Any, width: Any, sink: Any, round_to: Any, prefix: Any, suffix: Any, block: Any
) -> tuple[Tensor, Tensor, Tensor, Video, int]:
    q, k, v = _check.check_qkv(q, k, v)
    video = Video(grid, prefix, suffix, block)
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] != video.length:
            parts = f"{video.prefix} + {' x '.join(map(str, video.grid))} + {video.suffix}"
            raise ValueError(f"{name}: expected the {video.length} tokens of {parts}, got {x.shape[2]}")
    check_flag(sink, "sink")
    return q, k, v, video, reach(video, width, round_to)


def svg_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    width: float = 1.5,
    *,
    sink: bool = False,
    round_to: int | None = None,
    rows: int = 32,
    offset: int = 0,
    prefix: int = 0,
    suffix: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Mean squared error of the spatial and the temporal band against full attention on sampled rows: [B, Hk, 2] fp32.

    Query heads that share a key head are judged together, since the order of its keys is the same for all of them.

    Args:
        q: [B, H, S, D]; k, v: [B, Hk, S, D]; S = prefix + T * H * W + suffix.
        grid, width, sink, round_to, prefix, suffix: as in `patterns.spatial`.
        rows: how many video tokens are taken as queries, evenly over the video (published code draws 32 at random from all tokens).
        offset: moves them by so many tokens.
        scale: of q.k; 1 / sqrt(D) where None.
    """
    q, k, v, video, distance = _prepared(q, k, v, grid, width, sink, round_to, prefix, suffix, 64)
    factor = _check.check_scale(scale, q.shape[3])
    count, shift = whole(rows, "rows", 1), whole(offset, "offset", 0)
    _, _, rank, common = _bands(video, distance, sink, q.device)
    if video.count == 0:
        return q.new_zeros(q.shape[0], k.shape[1], 2, dtype=torch.float32)
    step = torch.arange(count, device=q.device)
    sampled = video.prefix + ((2 * step + 1) * video.count // (2 * count) + shift) % video.count
    seen = common | ((rank[:, sampled, None] - rank[:, None, :]).abs() < distance)  # [2, R, S]
    batch, heads, length, _ = q.shape
    group = heads // k.shape[1]
    chosen = q[:, :, sampled].unflatten(1, (-1, group))
    errors = []
    some = max(PIECE // max(batch * group * count * length, 1), 1)
    for n in range(0, k.shape[1], some):
        keys, values = k[:, n : n + some, None].float(), v[:, n : n + some, None].float()
        scores = chosen[:, n : n + some].float() * factor @ keys.mT
        full = scores.softmax(-1) @ values
        for one in seen:
            error = scores.masked_fill(~one, -torch.inf).softmax(-1) @ values - full
            errors.append(error.square().mean((2, 3, 4)))
    return torch.stack((torch.cat(errors[::2], 1), torch.cat(errors[1::2], 1)), -1)


def svg(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    width: float = 1.5,
    *,
    sink: bool = False,
    round_to: int | None = None,
    rows: int = 32,
    offset: int = 0,
    prefix: int = 0,
    suffix: int = 0,
    scale: float | None = None,
    block: int | tuple[int, int] = 64,
) -> BlockLayout:
    """For every head the spatial or the temporal band, whichever comes closer to full attention on sampled rows (Xi et al. 2025, Sparse
    VideoGen, arXiv 2502.01776, algorithm 1).

    Nothing waits for the device: the choice is made there, between lists and orders that are built once for a grid and kept. Ties take
    the spatial band. Temporal heads address their tokens in token-major order; nothing is permuted.

    Args:
        q, k, v, grid, width, sink, round_to, rows, offset, prefix, suffix, scale: as in `svg_errors`.
        block: as in `dense`.

    Returns:
        A layout for B samples and H heads.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 32).unbind()
        >>> layout = svg(q, k, v, (4, 8, 8))
        >>> layout.batch, layout.heads
        (1, 2)
    """
    q, k, v, video, distance = _prepared(q, k, v, grid, width, sink, round_to, prefix, suffix, block)
    errors = svg_errors(
        q,
        k,
        v,
        grid,
        width,
        sink=sink,
        round_to=round_to,
        rows=rows,
        offset=offset,
        prefix=prefix,
        suffix=suffix,
        scale=scale,
    )
    by_token = errors[..., 1] < errors[..., 0]  # [B, Hk]
    of_query = by_token.repeat_interleave(q.shape[1] // k.shape[1], 1)
    near, far, _, _ = _bands(video, distance, sink, q.device)

    def pick(name: str, choice: Tensor = of_query) -> Tensor:
        one, other = getattr(near, name), getattr(far, name)
        return torch.where(choice.view(*choice.shape, *[1] * (one.ndim - 2)), other, one)

    def lists(name: str) -> BlockLists:
        one, other = getattr(near, name), getattr(far, name)
        counts = torch.where(of_query[..., None], other.counts, one.counts)
        indices = torch.where(of_query[..., None, None], other.indices, one.indices)
        starts = torch.arange(counts.numel(), dtype=torch.int32, device=counts.device) * indices.shape[-1]
        return BlockLists(starts.reshape(counts.shape), counts, indices)

    return BlockLayout(
        video.length,
        video.length,
        *video.block,
        lists("full"),
        lists("partial"),
        box=pick("box"),
        at=pick("at"),
        q_order=pick("q_order"),
        k_order=pick("k_order", by_token),
    )
