"""The acceleration page: merged groups of the captioner's visual tokens, what a query of the generator attends to, time of each part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saccade.demo.acceleration import Line, Study
from saccade.demo.levels import LEVELS
from saccade.demo.merging_curve import INK, SOFT
from saccade.demo.merging_picture import _edges, _far_reaching, _fences, _image, _name, _Page, _percent
from saccade.demo.patches import resize
from saccade.demo.video import Clip

__all__ = ["draw"]

_LEFT, _RIGHT = 0.68, 14.5  # inches, of a page that is 15 wide
_LABEL = 2.45  # width of the names on the left
_GAP = 0.12
_SEEN, _QUERY = "#0072B2", "#D55E00"
# Okabe and Ito's colours, light to dark as the parts follow each other
_PARTS = {
    "vision tower": "#56B4E9",
    "language model": "#0072B2",
    "self-attention": "#0072B2",
    "rest": "#C8C8C8",
}


def _colours(clip: Clip, grid: tuple[int, int, int]) -> torch.Tensor:
    """fp32 [T, h, w, 3]: the mean colour of each visual token, over the frames of its step."""
    pixels = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float() / 255
    cells = torch.nn.functional.adaptive_avg_pool2d(pixels, grid[1:])
    colours: torch.Tensor = cells.unflatten(0, (grid[0], -1)).mean(1).permute(0, 2, 3, 1)
    return colours


def _mean_of_groups(colours: torch.Tensor, groups: torch.Tensor) -> NDArray[np.float32]:
    """[T, h, w, 3]: every token in the mean colour of its group."""
    row, flat = groups.flatten(), colours.flatten(0, 2)
    total = torch.zeros(int(row.max()) + 1, 3).index_add_(0, row, flat)
    return (total / row.bincount()[:, None])[row].view(colours.shape).numpy()


def _label(page: _Page, y: float, line: Line, about: str) -> None:
    page.text(_LEFT, y, line.level, 17, fontweight="bold")
    page.text(_LEFT, y + 0.34, about, 11, colour=SOFT)


def _sizes(columns: int, ratio: float, most: float, tallest: float) -> tuple[float, float]:
    """Width and height of a frame, `ratio` as high as wide."""
    wide = min((_RIGHT - _LEFT - _LABEL - _GAP * (columns - 1)) / columns, most, tallest / ratio)
    return wide, max(wide * ratio, 0.2)


def _merged(page: _Page, top: float, study: Study, clip: Clip, size: tuple[float, float], pitch: float) -> None:
    """Panel 1: a row for each level but lossless, which merges nothing; a column for each step of the clip."""
    count, h, w = study.visual
    colours = _colours(clip, study.visual)
    frames = resize(clip.frames[:: len(clip.frames) // count], (28 * h, 28 * w)).permute(0, 2, 3, 1).numpy()
    lines = {line.level: line for line in study.captioner}
    text = lines["stock"].kept - count * h * w
    for n, level in enumerate(("stock", "balanced", "aggressive")):
        groups, y = study.groups[level], top + n * pitch
        label, fill = groups.numpy(), _mean_of_groups(colours, groups)
        line, own = lines[level], int(groups.max()) + 1
        about = f"{own} visual tokens\n+ {text:.0f} of text" if n == 0 else f"{own} visual tokens"
        if n:
            about += f"\nlogits change by {_percent(line.change)}\n{_percent(line.same or 0)} of the caption's\ntokens stay the same"
        _label(page, y, line, about)
        group = _far_reaching(label, list(range(count))) if own < count * h * w else None
        for k in range(count):
            axes = page.axes(_LEFT + _LABEL + k * (size[0] + _GAP), y, *size)
            _image(axes, fill[k] if n else frames[k], (h, w))
            _fences(axes, label[k], fill[k], group)


def _attended(page: _Page, top: float, study: Study, clip: Clip, size: tuple[float, float], pitch: float) -> None:
    """Panel 2: a row for each level, a column for each frame of the latents."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    count, h, w = study.sample.grid
    frames = resize(clip.frames, (8 * h, 8 * w))[list(study.sample.frames)].permute(0, 2, 3, 1).numpy() / 255
    at, row, column = study.query
    for n, line in enumerate(study.generator[1:]):
        seen, y = study.seen[line.level].numpy(), top + n * pitch
        share = f"{_percent(line.kept)} of the blocks\n{_percent(float(seen.mean()))} seen by the query"
        _label(page, y, line, share)
        for k in range(count):
            axes = page.axes(_LEFT + _LABEL + k * (size[0] + _GAP), y, *size)
            bright = np.kron(seen[k], np.ones((8, 8)))[..., None]
            grey = frames[k].mean(-1, keepdims=True)
            _image(axes, np.where(bright > 0, frames[k], 0.82 + 0.14 * grey), (h, w))
            around, _ = _edges(seen[k].astype(int), rim=True)
            fence = LineCollection(list(around), colors=_SEEN, linewidths=1.8, capstyle="projecting", zorder=3)
            fence.set_clip_on(False)
            axes.add_collection(fence)
            if k == at:
                for colour, wide in (("white", 4.4), (_QUERY, 2.4)):
                    ring = Rectangle((column - 0.5, row - 0.5), 2, 2, fill=False, ec=colour, lw=wide, zorder=4)
                    axes.add_patch(ring)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{1e3 * seconds:.0f} ms"
        if seconds >= 0.01
        else f"{1e3 * seconds:.1f} ms"
    )


def _bars(axes: Any, lines: list[Line], title: str) -> None:
    """A bar for each level, made of its parts."""
    from matplotlib.patches import Patch

    parts = [part for part in lines[0].seconds if part != "whole"]
    longest = max(sum(line.seconds[part] for part in parts) for line in lines)
    for n, line in enumerate(lines):
        left = 0.0
        for part in parts:
            axes.barh(n, line.seconds[part], left=left, height=0.62, color=_PARTS[part], ec="white", lw=0.8)
            left += line.seconds[part]
        gain = lines[0].seconds["whole"] / line.seconds["whole"]
        said = _duration(line.seconds["whole"]) + (f", {gain:.2f} x as fast" if n else "")
        axes.text(left + 0.015 * longest, n, said, fontsize=11, color=INK, va="center")
    axes.set_yticks(range(len(LEVELS)), LEVELS, fontsize=12)
    axes.set_ylim(len(LEVELS) - 0.45, -0.55)
    axes.set_xlim(0, 1.5 * longest)
    axes.xaxis.set_major_formatter(lambda value, _: f"{1e3 * value:g}")
    axes.set_xlabel("ms", fontsize=10.5)
    axes.tick_params(axis="x", labelsize=9.5, length=3, colors=SOFT)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, fontsize=12.5, fontweight="bold", color=INK, loc="left", pad=30)
    handles = [Patch(facecolor=_PARTS[part], label="everything else" if part == "rest" else part) for part in parts]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 0.985), ncols=3, frameon=False, fontsize=11,
        handlelength=1.1, borderaxespad=0.2,
    )  # fmt: skip
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(path: Path, study: Study, clip: Clip) -> Path:
    """Draw the page of a clip to `path` (PNG)."""
    (t, h, w), (frames, rows, columns) = study.visual, study.sample.grid
    visual = _sizes(t, h / w, 2.75, 2.4)
    latent = _sizes(frames, rows / columns, 1.4, 1.9)
    pitch = max(visual[1], 1.45) + _GAP, max(latent[1], 0.85) + _GAP  # room for the names
    first = 1.66
    second = first + 1.0 + 3 * pitch[0] + 0.35
    third = second + 1.0 + 3 * pitch[1] + 0.35
    page = _Page(third + 5.0)
    page.text(_LEFT, 0.3, "Where two video models save work, and what it costs", 23, fontweight="bold")
    page.text(
        _LEFT,
        0.8,
        f"{_name(clip.path)}, seen by a captioner (Qwen2.5-VL, {t} x {h} x {w} visual tokens) and by a generator (Wan, {frames} x {rows} x "
        f"{columns} tokens).\nsaccade.accelerate(model, level): lossless has other kernels and the same result, balanced and aggressive "
        "leave work out.\nRandom weights (the generator's always are) show what is left out and how long it takes, not how good a caption "
        "or a video would still be.",
        11.2,
        colour=SOFT,
    )
    page.heading(
        first,
        "1  Captioner: which visual tokens were merged before the language model",
        "A column is a step of the video, two frames. Each group of merged tokens is filled with its mean colour, with thin lines between "
        "groups, which may reach over several steps.\nIn each row one group is fenced in orange: all that it encloses enters the language "
        "model as a single token. Text is never merged; lossless is as stock.",
    )
    _merged(page, first + 1.0, study, clip, visual, pitch[0])
    at, row, column = study.query
    page.heading(
        second,
        "2  Generator: what one token attends to",
        f"The query is the token in the orange ring, at row {row} and column {column} of frame {at}; coloured and fenced in blue is what "
        "it attends to in the last layer, behind the dense first steps.\nPale parts are not seen and not computed. balanced also keeps the "
        "first layer dense, which its share of the blocks counts.",
    )
    _attended(page, second + 1.0, study, clip, latent, pitch[1])
    page.heading(
        third,
        "3  Time of each part",
        "Median time of a forward on this machine, the levels taking turns. Matching, merging and unmerging are part of the language "
        "model's time.\nSmall models on a CPU: the longer the video, the more of the time is attention, and the more is saved.",
    )
    page_top, wide = third + 1.75, (_RIGHT - _LEFT - 1.9) / 2
    _bars(page.axes(_LEFT + 0.95, page_top, wide, 2.5), study.captioner, "Captioner")
    _bars(page.axes(_LEFT + 1.9 + wide, page_top, wide, 2.5), study.generator, "Generator")
    page.figure.savefig(path)
    return path
