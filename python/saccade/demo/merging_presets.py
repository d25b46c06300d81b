"""The presets of token merging on a clip's patches: each makes about as many rows of N tokens as it is asked for.

Every preset ends as one map from tokens to rows, so all of them can be drawn, undone and measured the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from saccade import merge
from saccade.merge import MergePlan, compose

__all__ = ["PRESETS", "SHARES", "Made", "Patches", "Preset", "tome_plan"]

SHARES = (1.0, 0.9, 0.75, 0.6, 0.5, 0.375, 0.25, 0.175, 0.125, 0.1, 0.07, 0.05)
_LAYERS = 12  # of the tower that AuroraCap's schedule is for
_WINDOWS = ((1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2), (1, 3, 3), (1, 4, 4), (2, 3, 3), (2, 4, 4))  # ever larger ones


@dataclass(frozen=True)
class Patches:
    """The tokens: every patch of every sampled frame, frame by frame.

    Args:
        pixels: [1, N, 3 * patch * patch], the values, RGB from 0 to 1.
        metric: [1, N, C], what is compared.
        grid: (T, h, w), T * h * w = N.
        patch: its side in pixels.
    """

    pixels: torch.Tensor
    metric: torch.Tensor
    grid: tuple[int, int, int]
    patch: int

    @property
    def count(self) -> int:
        """N"""
        return self.pixels.shape[1]

    def rows(self, share: float) -> int:
        """Rows to be left for a share of the tokens."""
        return max(1, round(self.count * share))

    @property
    def places(self) -> int:
        """Patches of a frame."""
        return self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Made:
    """What a preset made of the tokens.

    Args:
        rows: tokens kept.
        row_of: [N], the row that shows each token.
        size: [rows], how many tokens each row stands for.
        merge: values [1, N, D] to rows.
        unmerge: rows to values [1, N, D].
    """

    rows: int
    row_of: torch.Tensor
    size: torch.Tensor
    merge: Callable[[torch.Tensor], torch.Tensor]
    unmerge: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Preset:
    """A preset, what it does in a few words, and how it is made.

    Args:
        make: (tokens, rows wanted) to what it made, about so many rows; None where it cannot leave so few.
    """

    name: str
    about: str
    make: Callable[[Patches, int], Made | None]


def _identity(samples: int, tokens: int) -> MergePlan:
    """Nothing is merged."""
    target = torch.full((samples, tokens), -1)
    plan: MergePlan = merge.build_plan(target.float(), target, r=0)
    return plan


def _planned(plan: MergePlan, mode: Any = "mean") -> Made:
    """A plan for all tokens, or one with a sample for each frame, whose rows count on from frame to frame."""
    plan = plan.compact()
    frames, rows = plan.batch, plan.rows
    row_of = plan.inverse.long() + rows * torch.arange(frames)[:, None]

    def forth(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = merge.merge(x.view(frames, plan.tokens, x.shape[2]), plan, mode=mode)[0]
        return y.view(1, frames * rows, x.shape[2])

    def back(y: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = merge.unmerge(y.view(frames, rows, y.shape[2]), plan)
        return x.view(1, frames * plan.tokens, y.shape[2])

    return Made(frames * rows, row_of.flatten(), plan.ptr.diff(dim=1).flatten(), forth, back)


def _gathered(rows: int, row_of: torch.Tensor, forth: Callable[[torch.Tensor], torch.Tensor]) -> Made:
    """Where there is no plan: every token is shown by one of the rows."""
    return Made(rows, row_of, torch.bincount(row_of, minlength=rows), forth, lambda y: y[:, row_of])


def tome_plan(metric: torch.Tensor, stops: list[int]) -> tuple[MergePlan, torch.Tensor]:
    """Rounds of ToMe down to the last of the falling `stops`, as one plan, and the sizes that the rounds carried along.

    A round merges at most a quarter of what is there (a half is all that it can), and none steps over a stop: so the groups at one
    stop are unions of those at the stop before, and the error can only grow.
    """
    x, size, plan = metric, torch.ones(1, metric.shape[1], 1), _identity(1, metric.shape[1])
    for stop in stops:
        while x.shape[1] > stop:
            r = min(x.shape[1] - stop, max(x.shape[1] // 4, 1))
            x, size, own = merge.tome(r, class_token=False)(x, size=size)
            plan = compose(plan, own)
    return plan, size


def _tome(patches: Patches, rows: int) -> Made:
    stops = [patches.rows(share) for share in SHARES]
    return _planned(tome_plan(patches.metric, [*(n for n in stops if n > rows), rows])[0])


def _tomesd(patches: Patches, rows: int) -> Made | None:
    """Cells of 2 x 2, and where those leave too many rows, of 4 x 4."""
    frames, h, w = patches.grid
    for side in (2, 4):
        if 0 < frames * (h // side) * (w // side) <= rows:
            ratio = (patches.count - rows) / patches.count
            return _planned(merge.tomesd(ratio, patches.grid, (side, side))(patches.metric)[2])
    return None


def _auroracap(patches: Patches, rows: int) -> Made:
    """Every frame by itself, the same r in all layers of the schedule."""
    frames, h, w = patches.grid
    tower = merge.auroracap(rows / patches.count, _LAYERS, (h, w), class_token=False)
    merger, plan = tower.merger(), _identity(frames, h * w)
    x, size = patches.metric.view(frames, h * w, -1), torch.ones(frames, h * w, 1)
    for layer in range(_LAYERS):
        x, size, own = merger(x, size=size, index=layer)
        plan = compose(plan, own)
    return _planned(plan)


def _vidtome(patches: Patches, rows: int) -> Made | None:
    """Every frame but one is a source once, so the local ratio follows from the rows that are wanted."""
    merged, sources = patches.count - rows, patches.count - patches.places
    if merged > sources:
        return None
    merger = merge.vidtome(patches.grid[0], local_ratio=merged / max(sources, 1))
    plan = merger(patches.metric)[1]
    return _planned(_identity(1, patches.count) if plan.within is None else plan.within, plan.mode)


def _framefusion(patches: Patches, rows: int) -> Made | None:
    """The threshold is the cosine that as many links reach as tokens shall merge."""
    frames, merged = patches.grid[0], patches.count - rows
    if merged > patches.count - patches.places:
        return None
    alike = merge.frame_similarity(patches.metric, frames).flatten().sort(descending=True).values
    fusion = merge.framefusion(float(alike[merged - 1]) if merged else float("inf"))
    return _planned(fusion.merge(patches.metric, frames)[2])


def _evs(patches: Patches, rows: int) -> Made | None:
    """A token that was dropped is shown as the last one that was kept at its place."""
    if rows < patches.places:
        return None
    share = 1 - (rows + 0.5) / patches.count  # int(N (1 - share)) is rows, whatever the rounding
    kept = merge.evs(patches.grid[0], max(share, 0.0))(patches.metric)[1]
    last = torch.full((patches.count,), -1)
    last[kept[0]] = torch.arange(kept.shape[1])
    row_of = last.view(patches.grid[0], patches.places).cummax(0).values.flatten()
    return _gathered(kept.shape[1], row_of, lambda x: merge.select(x, kept))


def _ppllava(patches: Patches, rows: int) -> Made | None:
    """The smallest window that leaves no more rows; without a prompt all its weights are equal."""
    for kernel in _WINDOWS:
        counts = [n // k for n, k in zip(patches.grid, kernel, strict=True)]
        if 0 < counts[0] * counts[1] * counts[2] <= rows:
            break
    else:
        return None
    # Tokens of a remainder that fills no window are shown by the last one.
    t, h, w = ((torch.arange(n) // k).clamp(max=c - 1) for n, k, c in zip(patches.grid, kernel, counts, strict=True))
    row_of = (t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w
    weights, temperature = torch.zeros(1, patches.count), merge.ppllava().temperature

    def forth(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = merge.prompt_pool3d(x, weights, kernel, temperature=temperature, grid=patches.grid)
        return y.flatten(1, 3)

    return _gathered(counts[0] * counts[1] * counts[2], row_of.flatten(), forth)


PRESETS = (
    Preset("tome", "rounds over all frames at once; means weighted by size", _tome),
    Preset("auroracap", "each frame by itself, the same r in each of 12 layers", _auroracap),
    Preset("tomesd", "into one patch of each 2 x 2 cell (4 x 4 below 25 %)", _tomesd),
    Preset("vidtome", "into one frame, whose patches stand for what they took in", _vidtome),
    Preset("framefusion", "runs at one place over time, to their mean", _framefusion),
    Preset("evs", "drops what changes least, the last one kept there is shown", _evs),
    Preset("ppllava", "windows of the grid, to their mean (here without a prompt)", _ppllava),
)
