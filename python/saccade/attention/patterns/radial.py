"""Radial attention: the window between two frames halves with every doubling of their distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from saccade._arguments import choice, number, whole
from saccade.attention._compact import compact, trim
from saccade.attention.bits import interval_words, listed
from saccade.attention.layout import BlockLayout
from saccade.attention.patterns._tokens import Video, check_flag

__all__ = ["radial"]

Tensor = torch.Tensor
PIECE = 1 << 22  # words of bits made together
NEAR = {"wan": 0, "hunyuan": 1}  # frames up to this distance see each other whole


def widths(frames: int, tokens: int, decay: float, least: int, near: str) -> Tensor:
    """int64 [frames]: the reach between frames at each distance; -1 where they do not see each other."""
    out = []
    for d in range(frames):
        power = 2.0 ** (tokens.bit_length() - d.bit_length())
        width = max(int(power * decay), least)
        if d <= NEAR[near]:
            width = tokens
        elif d == 1:
            width = tokens // 2
        every = int(least / power) if power < least else 1
        out.append(-1 if d % every else width)
    return torch.tensor(out, dtype=torch.int64)


def radial(
    grid: Sequence[int],
    *,
    decay: float = 1.0,
    least: int = 128,
    near: str = "wan",
    sink: bool = True,
    prefix: int = 0,
    suffix: int = 0,
    block: int | tuple[int, int] = 64,
    device: Any = None,
) -> BlockLayout:
    """Radial attention (Li et al. 2025, arXiv 2506.19852, equation 6), exact for every pair of tokens.

    With N = H * W tokens a frame, b(n) the bits that n takes, and d the distance of two frames, tokens x and y of these frames see each
    other where |x - y| <= max(decay * 2^(b(N) - b(d)), least). Frames at distance 0 see each other whole, at distance 1 within N / 2
    (near="wan"), or whole as well ("hunyuan"). Where 2^(b(N) - b(d)) is less than `least`, only every (least / 2^(b(N) - b(d)))-th
    distance is seen. The published code shrinks this to blocks, keeping those in which over 60 % of the columns that are seen are seen
    by over a third of the rows; here every pair is exact, and blocks at the edge of a window are seen in part.

    Args:
        grid: (T, H, W).
        decay: factor of the windows.
        least: the smallest window, in tokens; the published code takes its block of 128.
        near: "wan" or "hunyuan", how frames next to each other see each other.
        sink: every query sees the first frame.
        prefix, suffix: text tokens before and after the video; they see everything, and every query sees them.
        block, device: as in `dense`.

    Example:
        >>> layout = radial((16, 8, 8), least=4)
        >>> round(float(layout.to_mask().float().mean()), 3)
        0.563
    """
    video = Video(grid, prefix, suffix, block)
    factor = float(number(decay, "decay", 0))
    width = widths(video.grid[0], video.frame, factor, whole(least, "least", 1), choice(near, "near", tuple(NEAR)))
    has_sink = check_flag(sink, "sink")
    rows, columns = (_Runs(video, one) for one in video.block)
    # Runs of tokens of one frame: extremes of |x - y| over two runs say whether all, and whether any, see each other.
    reach = width[(rows.frame[:, None] - columns.frame).abs()]
    nearest = torch.maximum(rows.first[:, None] - columns.last, columns.first - rows.last[:, None]).clamp(min=0)
    farthest = torch.maximum((rows.last[:, None] - columns.first).abs(), (columns.last - rows.first[:, None]).abs())
    always = rows.text[:, None] | columns.text | ((columns.frame == 0) & has_sink)
    some, every = (
        _to_blocks(always | (nearest <= reach), rows, columns, "amax"),
        _to_blocks(always | (farthest <= reach), rows, columns, "amin"),
    )
    full, part = trim(compact((some & every).to(device)[None, None])), (some & ~every).to(device)
    if not bool(part.any()):
        return BlockLayout(video.length, video.length, *video.block, full)
    partial, where = listed(part[None, None])
    bits = _bits(video, width.to(device), has_sink, columns.by_block(device), where[2:])
    return BlockLayout(video.length, video.length, *video.block, full, partial, bits=bits)


def _bits(video: Video, reach: Tensor, sink: bool, runs: tuple[Tensor, ...], where: tuple[Tensor, ...]) -> Tensor:
    """int32 [n, q_block, k_block / 32] of the blocks at rows and columns `where`: each query sees one interval of each run of keys."""
    (q_block, k_block), device = video.block, reach.device
    pieces = []
    step = max(PIECE // (q_block * k_block // 32), 1)
    for row, column in zip(*(x.split(step) for x in where), strict=True):
        q = row[:, None] * q_block + torch.arange(q_block, device=device)
        frame_q, x, text_q = _where(video, q)
        words = torch.zeros(*q.shape, k_block // 32, dtype=torch.int32, device=device)
        for start, stop, frame_k, place, text_k in zip(*(r[:, column] for r in runs), strict=True):
            whole = text_q | (text_k | ((frame_k == 0) & sink))[:, None]
            near = reach[(frame_q - frame_k[:, None]).abs()]
            middle = start[:, None] + x - place[:, None]  # where a key at the place of the query would be
            low = torch.where(whole, start[:, None], torch.maximum(middle - near, start[:, None]))
            high = torch.where(whole, stop[:, None], torch.minimum(middle + near + 1, stop[:, None]))
            high = torch.where((near < 0) & ~whole | (q >= video.length), low, high)
            words |= interval_words(low - column[:, None] * k_block, high - column[:, None] * k_block, k_block // 32)
        pieces.append(words)
    return torch.cat(pieces)


def _where(video: Video, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, place in the frame, and whether it is text. Text is given frame 0; tokens that do not exist too."""
    n = token - video.prefix
    text = (n < 0) | (n >= video.count)
    n = n.clamp(0, max(video.count - 1, 0))
    return n // max(video.frame, 1), n % max(video.frame, 1), text


class _Runs:
    """Tokens cut at blocks, frames and text: frame, first and last place in it, and block of each run."""

    def __init__(self, video: Video, block: int) -> None:
        cuts = torch.cat(
            (torch.arange(0, video.length, block), video.prefix + torch.arange(video.grid[0] + 1) * video.frame)
        )
        cuts = cuts.unique()
        start = cuts[cuts < video.length]
        stop = torch.cat((start[1:], torch.tensor([video.length])))[: len(start)]
        self.frame, self.first, self.text = _where(video, start)
        self.last = self.first + (stop - start - 1)
        self.block = start // block
        self.blocks = -(-video.length // block)
        self.start, self.stop = start, stop

    def by_block(self, device: Any) -> tuple[Tensor, ...]:
        """Start, stop, frame, first place and text flag of the runs of every block, each [runs, blocks]; the last ones may be empty."""
        nth = torch.arange(len(self.block)) - torch.searchsorted(self.block, self.block)
        shape = int(nth.max()) + 1, self.blocks
        out = []
        for x in (self.start, self.stop, self.frame, self.first, self.text):
            table = torch.zeros(shape, dtype=x.dtype)
            table[nth, self.block] = x
            out.append(table.to(device))
        return tuple(out)


def _to_blocks(runs: Tensor, rows: _Runs, columns: _Runs, how: str) -> Tensor:
    """[nQ, nK] bool from [rows, columns]: of any ("amax"), or of all ("amin"), runs of the blocks."""
    start = 0 if how == "amax" else 1
    out = torch.full((rows.blocks, runs.shape[1]), start, dtype=torch.uint8)
    out.scatter_reduce_(0, rows.block[:, None].expand(runs.shape), runs.byte(), how)
    both = torch.full((rows.blocks, columns.blocks), start, dtype=torch.uint8)
    return both.scatter_reduce_(1, columns.block[None].expand(out.shape), out, how).bool()
