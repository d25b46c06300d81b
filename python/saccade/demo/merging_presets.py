"""The presets of token merging on a clip's patches: each makes about as many rows of N tokens as it is asked for.

Every preset ends as one map from tokens to rows, so all of them can be drawn, undone and measured the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from saccade import merge
from saccade.merge import MergePlan, compose

__all__ = ["PRESETS", "Made", "Patches", "Preset", "tome_plan"]

_LAYERS = 12  # rounds of AuroraCap's per-frame merging


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
    """A preset, what it does in a few words, and how it is made for a target.

    Args:
        make: (tokens, rows wanted) to what it made, or None where it cannot leave so few.
    """

    name: str
    about: str
    make: Callable[[Patches, int], Made | None]


def _identity(tokens: int, rows_of_plan: MergePlan | None = None) -> MergePlan:
    """Nothing merged: what a merger makes of r = 0."""
    return merge.TokenMerger(0).match(torch.zeros(1, tokens, 1))


def _planned(plan: MergePlan, mode: Any = "mean") -> Made:
    """A plan over all tokens; one of a sample for each frame counts rows frame by frame."""
    plan = plan.compact() if plan.batch == 1 else plan
    frames, rows = plan.batch, plan.rows
    row_of = plan.inverse.long() + rows * torch.arange(frames)[:, None]

    def forth(x: torch.Tensor) -> torch.Tensor:
        y = merge.merge(x.view(frames, plan.tokens, x.shape[2]), plan, mode=mode)[0]
        return y.view(1, frames * rows, x.shape[2])

    def back(y: torch.Tensor) -> torch.Tensor:
        out = merge.unmerge(y.view(frames, rows, y.shape[2]), plan)
        return out.view(1, frames * plan.tokens, y.shape[2])

    return Made(frames * rows, row_of.flatten(), plan.ptr.diff(dim=1).flatten(), forth, back)


def _gathered(rows: int, row_of: torch.Tensor, forth: Callable[[torch.Tensor], torch.Tensor]) -> Made:
    """Where no plan is: every token is shown by one of the rows."""
    size = torch.bincount(row_of, minlength=rows)
    return Made(rows, row_of, size, forth, lambda y: y[:, row_of])


def tome_plan(metric: torch.Tensor, rows: int, rounds: list[int] | None = None) -> tuple[MergePlan, torch.Tensor]:
    """Rounds of ToMe until `rows` are left, as one plan, and the sizes that the rounds carried along.

    A round merges an eighth of what is there, as layers of a tower do, never more than half. A plan for fewer rows only goes on from
    one for more where `rounds` names that one, and other stops, on the way.
    """
    plan, size, x = _identity(metric.shape[1]), torch.ones(1, metric.shape[1], 1), metric
    stops = sorted({n for n in (rounds or []) if n > rows} | {rows}, reverse=True)
    for stop in stops:
        while x.shape[1] > stop:
            r = max(1, min(x.shape[1] - stop, x.shape[1] // 8))
            x, size, own = merge.tome(r, class_token=False)(x, size=size)
            plan = compose(plan, own)
    return plan, size


def _tome(patches: Patches, rows: int) -> Made:
    stops = [round(patches.count * share) for share in SHARES]
    return _planned(tome_plan(patches.metric, rows, stops)[0])


def _tomesd(patches: Patches, rows: int) -> Made | None:
    """Cells of 2 x 2, and where they leave too many rows, of 4 x 4."""
    _, h, w = patches.grid
    for cell in ((2, 2), (4, 4)):
        left = patches.grid[0] * (h // cell[0]) * (w // cell[1])
        if 0 < left <= rows:
            ratio = (patches.count - rows) / patches.count
            return _planned(merge.tomesd(ratio, patches.grid, cell)(patches.metric)[2])
    return None


def _auroracap(patches: Patches, rows: int) -> Made | None:
    """Every frame on its own, the same r in all layers of the schedule."""
    frames, h, w = patches.grid
    tower = merge.auroracap(rows / patches.count, _LAYERS, (h, w), class_token=False)
    merger, size, plan = tower.merger(), None, _identity(h * w)
    x = patches.metric.view(frames, h * w, -1)
    for layer in range(_LAYERS):
        x, size, own = merger(x, size=size, index=layer)
        plan = compose(plan, own)
    return _planned(plan)


def _vidtome(patches: Patches, rows: int) -> Made | None:
    """Every frame but one is a source once, so the local ratio follows from the rows wanted."""
    sources = patches.count - patches.places
    ratio = (patches.count - rows) / sources if sources else 0.0
    if ratio > 1 or (not sources and rows < patches.count):
        return None
    _, plan = merge.vidtome(patches.grid[0], local_ratio=ratio)(patches.metric)
    within = plan.within or _identity(patches.count)
    return _planned(within, plan.mode)


def _framefusion(patches: Patches, rows: int) -> Made | None:
    """The threshold is the cosine that as many links exceed as tokens shall merge."""
    frames, merged = patches.grid[0], patches.count - rows
    if merged > patches.count - patches.places:
        return None
    alike = merge.frame_similarity(patches.metric, frames).flatten().sort(descending=True).values
    threshold = float(alike[merged - 1]) if merged else float("inf")
    return _planned(merge.framefusion(threshold).merge(patches.metric, frames)[2])


def _evs(patches: Patches, rows: int) -> Made | None:
    """A token that was dropped is shown as the last one that was kept at its place."""
    frames = patches.grid[0]
    if rows < patches.places:
        return None
    # The share to drop, so that int(N (1 - share)) is rows whatever the rounding.
    retention = merge.evs(frames, min(max(1 - (rows + 0.5) / patches.count, 0.0), 1.0))
    kept = merge.retain(patches.metric, frames, ratio=retention.ratio)
    last = torch.full((patches.count,), -1)
    last[kept[0]] = torch.arange(kept.shape[1])
    row_of = last.view(frames, patches.places).cummax(0).values.flatten()
    return _gathered(kept.shape[1], row_of, lambda x: merge.select(x, kept))


def _ppllava(patches: Patches, rows: int) -> Made | None:
    """The finest of a few windows that leaves no more rows; no prompt, so all weights are equal. Windows tile the grid from its start."""
    for kernel in ((1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2), (2, 3, 3), (2, 4, 4)):
        fits = all(k <= n for k, n in zip(kernel, patches.grid, strict=True))
        counts = [n // k for k, n in zip(kernel, patches.grid, strict=True)]
        if fits and counts[0] * counts[1] * counts[2] <= rows:
            break
    else:
        return None
    pool = replace_kernel(kernel)
    weights = torch.zeros(1, patches.count)
    at = [
        (torch.arange(n) // k).clamp(max=c - 1) for n, k, c in zip(patches.grid, kernel, counts, strict=True)
    ]  # a remainder that fills no window is shown by the last one
    row_of = (at[0][:, None, None] * counts[1] + at[1][:, None]) * counts[2] + at[2]

    def forth(x: torch.Tensor) -> torch.Tensor:
        y = merge.prompt_pool3d(x, weights, pool.kernel, temperature=pool.temperature, grid=patches.grid)
        return y.flatten(1, 3)

    return _gathered(counts[0] * counts[1] * counts[2], row_of.flatten(), forth)
