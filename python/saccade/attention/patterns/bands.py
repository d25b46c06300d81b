"""Bands of Sparse VideoGen: around the diagonal in frame-major order (spatial) or in token-major order (temporal)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from saccade._arguments import number, whole
from saccade.attention.boxes import HIGH, LOW, from_intervals
from saccade.attention.layout import SEEN_BY_ALL, BlockLayout
from saccade.attention.orders import frame_order, token_order
from saccade.attention.patterns._tokens import Video, by_position, check_flag

__all__ = ["spatial", "temporal"]

Tensor = torch.Tensor
Block = int | tuple[int, int]


def spatial(
    grid: Sequence[int],
    width: float = 1.5,
    *,
    sink: bool = False,
    round_to: int | None = None,
    prefix: int = 0,
    suffix: int = 0,
    block: Block = 64,
    device: Any = None,
) -> BlockLayout:
    """The band |i - j| < width * H * W of tokens in frame-major order: a token sees the frames near its own (Xi et al. 2025, Sparse
    VideoGen, arXiv 2502.01776, section 3.1, spatial head).

    Text sees everything and every query sees it.

    Args:
        grid: (T, H, W).
        width: half the width of the band, in frames.
        sink: every query sees the first frame.
        round_to: the reach in tokens is cut to a multiple of this, as published code does with 128; None: it is not.
        prefix, suffix: text tokens before and after the video.
        block, device: as in `dense`.

    Example:
        >>> spatial((4, 1, 1), 1.5, sink=True).to_mask()[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]]
    """
    video = Video(grid, prefix, suffix, block)
    return band(video, reach(video, width, round_to), check_flag(sink, "sink"), False, device)


def temporal(
    grid: Sequence[int],
    width: float = 1.5,
    *,
    sink: bool = False,
    round_to: int | None = None,
    prefix: int = 0,
    suffix: int = 0,
    block: Block = 64,
    device: Any = None,
) -> BlockLayout:
    """The band |i - j| < width * H * W of tokens in token-major order: a token sees all frames at the places near its own (Xi et al. 2025,
    Sparse VideoGen, arXiv 2502.01776, section 3.1, temporal head).

    Tokens are addressed in that order (`token_order`), nothing is permuted. The first frame of `sink` is the video's, in blocks before the
    others; published code takes the first H * W tokens of whichever order.

    Args:
        grid, width, sink, round_to, prefix, suffix, block, device: as in `spatial`.

    Example:
        >>> temporal((2, 1, 3), 0.5).to_mask()[0, 0].int().tolist()[0]  # (frame, place) 00 01 02 10 11 12
        [1, 0, 0, 1, 0, 0]
    """
    video = Video(grid, prefix, suffix, block)
    return band(video, reach(video, width, round_to), check_flag(sink, "sink"), True, device)


def reach(video: Video, width: Any, round_to: Any) -> int:
    """The distance in tokens below which two see each other."""
    tokens = number(width, "width", 0) * video.frame
    whole_tokens = int(tokens) if tokens == int(tokens) else int(tokens) + 1  # |i - j| < tokens
    if round_to is None:
        return whole_tokens
    step = whole(round_to, "round_to", 1)
    if int(tokens) < step and video.count:
        raise ValueError(
            f"round_to: {width} frames are {int(tokens)} tokens, expected at least the {step} they are cut to multiples of"
        )
    return int(tokens) // step * step


def band(video: Video, distance: int, sink: bool, by_token: bool, device: Any, laid: bool = False) -> BlockLayout:
    """The band; `laid` gives the frame-major one an explicit order too, with as many positions as the token-major one has."""
    (t, h, w), n = video.grid, torch.arange(video.count)
    rank = n % max(h * w, 1) * t + n // max(h * w, 1) if by_token else n  # place in the order of the band
    low, high, number_of = rank - distance + 1, rank + distance, rank
    if sink and by_token:
        # Without the first frame, which all see, the others have ranks without gaps: those below x are x - ceil(x / T).
        low, high, number_of = (x - (x + t - 1).div(t, rounding_mode="floor") for x in (low, high, rank))
    at = video.query_table(number_of, 0)
    at[: video.prefix] = at[video.prefix + video.count :] = SEEN_BY_ALL
    if sink:
        at[video.prefix : video.prefix + min(video.frame, video.count)] = SEEN_BY_ALL
    q_order, k_order = (_order(video, sink, by_token, laid, one) for one in video.block)
    lows = by_position(video.query_table(low, LOW), q_order, video.length, video.block[0])
    highs = by_position(video.query_table(high, HIGH), q_order, video.length, video.block[0])
    numbers = by_position(at, k_order, video.length, video.block[1])
    return from_intervals(
        lows[None, None].to(device),
        highs[None, None].to(device),
        numbers[None, None].to(device),
        video.length,
        video.length,
        video.block,
        q_order=None if q_order is None else q_order.to(device),
        k_order=None if k_order is None else k_order.to(device),
    )


def _order(video: Video, sink: bool, by_token: bool, laid: bool, block: int) -> Tensor | None:
    if not by_token:
        return frame_order(video.grid, prefix=video.prefix, suffix=video.suffix, block=block) if laid else None
    order = token_order(video.grid, prefix=video.prefix, suffix=video.suffix, block=block)
    if not sink:
        return order
    # The first frame in front, the others behind it in their order.
    tokens = order[0, 0]
    is_video = (tokens >= video.prefix) & (tokens < video.prefix + video.count)
    in_order = tokens[is_video]
    first = in_order < video.prefix + video.frame
    moved = tokens.clone()
    moved[is_video] = torch.cat((in_order[first], in_order[~first]))
    return moved[None, None]
