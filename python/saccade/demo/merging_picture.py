"""The merging page: ToMe's groups drawn over the frames, one frame by every preset, and the curve of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saccade.demo.merging import COLUMNS, TIMED, Point, Study
from saccade.demo.merging_curve import INK, SOFT, STYLES, draw_curve, draw_key
from saccade.demo.merging_presets import PRESETS
from saccade.demo.video import Clip

__all__ = ["draw"]

_WIDE = 15.0  # inches
_LEFT, _RIGHT = 0.68, 14.5
_FENCE = "#D55E00"
_MOST_ROWS = 4  # frames that are drawn
_CELL, _GAP = 3.32, 0.13  # width of a drawn frame


class _Page:
    """A figure measured in inches from its top left corner."""

    def __init__(self, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(_WIDE, height), dpi=110, facecolor="white")
        FigureCanvasAgg(self.figure)

    def text(self, x: float, y: float, text: str, size: float, *, colour: str = INK, **more: Any) -> None:
        place = x / _WIDE, 1 - y / self.height
        self.figure.text(
            *place, text, fontsize=size, color=colour, parse_math=False, **{"va": "top", "linespacing": 1.4, **more}
        )

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        box = x / _WIDE, 1 - (y + height) / self.height, width / _WIDE, height / self.height
        return self.figure.add_axes(box)

    def bar(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        from matplotlib.patches import Rectangle

        place = x / _WIDE, 1 - (y + height) / self.height
        size = width / _WIDE, height / self.height
        self.figure.add_artist(Rectangle(place, *size, color=colour, lw=0, transform=self.figure.transFigure))

    def heading(self, y: float, title: str, text: str) -> None:
        self.text(_LEFT, y, title, 14.5, fontweight="bold")
        self.text(_LEFT, y + 0.29, text, 10.8, colour=SOFT)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share == 0 or share >= 0.0995 else f"{100 * share:.1f} %"


def _rows(point: Point, study: Study) -> NDArray[np.int64]:
    """[T, h, w]: the row that shows each patch."""
    return point.made.row_of.view(study.patches.grid).numpy()


def _mean_colours(point: Point, study: Study) -> NDArray[np.float32]:
    """[T, h, w, 3]: every patch in the mean colour of its group."""
    p = study.patches
    colours = p.pixels.unflatten(2, (3, -1)).mean(3)
    return point.made.unmerge(point.made.merge(colours)).view(*p.grid, 3).numpy()


def _rebuilt(point: Point, study: Study, frame: int) -> NDArray[np.float32]:
    """[H, W, 3]: a frame after unmerging."""
    p = study.patches
    _, h, w = p.grid
    back = point.made.unmerge(point.made.merge(p.pixels)).view(*p.grid, 3, p.patch, p.patch)[frame]
    return back.permute(0, 3, 1, 4, 2).reshape(h * p.patch, w * p.patch, 3).clamp(0, 1).numpy()


def _edges(label: NDArray[Any], *, rim: bool) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Segments [n, 2, 2] (in patches) between unequal neighbours of label [h, w], and the patch (row, column) before each.

    `rim` adds the outer edges of patches whose label is not 0.
    """
    if rim:
        label = np.pad(label, 1)
    row, column = np.nonzero(label[:, 1:] != label[:, :-1])
    upright = np.stack((np.stack((column + 1, row), -1), np.stack((column + 1, row + 1), -1)), 1)
    below, at = np.nonzero(label[1:] != label[:-1])
    level = np.stack((np.stack((at, below + 1), -1), np.stack((at + 1, below + 1), -1)), 1)
    places = np.concatenate((np.stack((row, column), -1), np.stack((below, at), -1)))
    return np.concatenate((upright, level)).astype(float) - rim, places


def _fences(axes: Any, label: NDArray[Any], fill: NDArray[np.float32], group: int | None) -> None:
    """Thin lines between groups, dark on bright patches and bright on dark ones; a strong one around `group`."""
    from matplotlib.collections import LineCollection

    lines, places = _edges(label, rim=False)
    light = fill[places[:, 0], places[:, 1]] @ np.array([0.3, 0.59, 0.11], np.float32)
    colours = np.where(light[:, None] > 0.42, [[0, 0, 0, 0.6]], [[1, 1, 1, 0.6]])
    axes.add_collection(LineCollection(list(lines), colors=colours, linewidths=0.55, capstyle="projecting"))
    if group is not None and (label == group).any():
        around, _ = _edges((label == group).astype(int), rim=True)
        for colour, width in (("white", 4.2), (_FENCE, 2.4)):
            strokes = LineCollection(list(around), colors=colour, linewidths=width, capstyle="projecting", zorder=4)
            strokes.set_clip_on(False)
            axes.add_collection(strokes)


def _image(axes: Any, picture: NDArray[Any], grid: tuple[int, int]) -> None:
    """A picture in patches as units."""
    axes.imshow(picture, extent=(0, grid[1], grid[0], 0), interpolation="nearest", vmin=0, vmax=1)
    axes.set_anchor("C")
    axes.axis("off")


def _far_reaching(label: NDArray[np.int64], shown: list[int]) -> int | None:
    """The group that is seen in the most of the drawn frames, the largest of those; None where all are single patches."""
    seen = np.zeros((len(shown), int(label.max()) + 1), np.int64)
    for n, frame in enumerate(shown):
        seen[n] = np.bincount(label[frame].ravel(), minlength=seen.shape[1])
    if seen.sum(0).max() < 2:
        return None
    return int(np.lexsort((seen.sum(0), (seen > 0).sum(0)))[-1])


def _groups(page: _Page, top: float, study: Study, clip: Clip, cell: float) -> None:
    """Panel 1: a column for each kept ratio, a row for each drawn frame."""
    count, h, w = study.patches.grid
    shown = [int(i) for i in np.linspace(0, count - 1, min(count, _MOST_ROWS)).round()]
    for n, ratio in enumerate(COLUMNS):
        point, x = study.near("tome", ratio), _LEFT + n * (_CELL + _GAP) + 0.1
        label, fill = _rows(point, study), _mean_colours(point, study)
        middle = x + _CELL / 2
        page.text(middle, top, f"{_percent(point.ratio)} kept", 17, fontweight="bold", ha="center")
        about = f"{point.kept} of {study.patches.count} tokens, error {_percent(point.error)}"
        page.text(middle, top + 0.32, about, 11, colour=SOFT, ha="center")
        group = _far_reaching(label, shown) if point.kept < study.patches.count else None
        for k, frame in enumerate(shown):
            y = top + 0.62 + k * (cell + _GAP)
            axes = page.axes(x, y, _CELL, cell)
            _image(axes, fill[frame] if point.kept < study.patches.count else study.frames[frame], (h, w))
            _fences(axes, label[frame], fill[frame], group)
            if n == 0:
                time = f"{clip.times[frame]:.{1 if clip.interval >= 0.1 else 2}f} s"
                page.text(_LEFT - 0.02, y + cell / 2, time, 10, colour=SOFT, rotation=90, va="center", ha="center")


def _presets(page: _Page, top: float, study: Study, frame: int, tall: float) -> None:
    """Panel 2: one frame, as it is and as every preset leaves it."""
    _, h, w = study.patches.grid
    gap = 0.1
    wide = (_RIGHT - _LEFT - gap * len(PRESETS)) / (len(PRESETS) + 1)
    for n in range(len(PRESETS) + 1):
        x, y = _LEFT + n * (wide + gap), top + 0.5
        axes = page.axes(x, y, wide, tall)
        if n == 0:
            _image(axes, study.frames[frame], (h, w))
            name, about = "the frame", "all tokens"
        else:
            name = PRESETS[n - 1].name
            point = study.near(name, TIMED)
            _image(axes, _rebuilt(point, study, frame), (h, w))
            about = f"{_percent(point.ratio)}, error {_percent(point.error)}"
            page.bar(x, y - 0.07, wide, 0.04, STYLES[name][0])
        page.text(x + wide / 2, top + 0.14, name, 12, fontweight="bold", ha="center", va="baseline")
        page.text(x + wide / 2, top + 0.33, about, 9.5, colour=SOFT, ha="center", va="baseline")


@torch.no_grad()
def _hardest(study: Study) -> int:
    """The frame where the presets, all together, are the furthest off."""
    p = study.patches
    off = torch.zeros(p.grid[0])
    for preset in PRESETS:
        made = study.near(preset.name, TIMED).made
        off += (made.unmerge(made.merge(p.pixels)) - p.pixels).square().view(p.grid[0], -1).mean(1).sqrt()
    return int(off.argmax())


def _name(path: Path) -> str:
    """A file's name, of bounded length."""
    return path.name if len(path.name) <= 40 else f"{path.name[:24]}…{path.name[-15:]}"


def _head(page: _Page, study: Study, clip: Clip) -> None:
    count, h, w = study.patches.grid
    side = study.patches.patch
    page.text(_LEFT, 0.3, "How a video gets by with fewer tokens", 23, fontweight="bold")
    page.text(
        _LEFT,
        0.8,
        f"{_name(clip.path)}: {count} frame{'s' * (count > 1)} of {h} x {w} patches, {side} x {side} pixels each, make "
        f"{study.patches.count} tokens, before any model sees them.\nPatches are compared by the cosine of their 4 x 4 mean colours "
        "around the clip's mean, with one constant entry so that pale and strong ones differ: nothing is trained.",
        11.2,
        colour=SOFT,
    )


def draw(path: Path, study: Study, clip: Clip) -> Path:
    """Draw the page of a clip to `path` (PNG)."""
    count, h, w = study.patches.grid
    drawn, curve = min(count, _MOST_ROWS), 4.3
    cell, small = min(max(_CELL * h / w, 0.36), 3.1), min(max(1.6 * h / w, 0.2), 2.2)
    first = 1.44
    second = first + 1.77 + drawn * (cell + _GAP)
    third = second + 1.77 + small
    page = _Page(third + 1.57 + curve)
    _head(page, study, clip)
    page.heading(
        first,
        "1  What merges with what (preset tome)",
        "Every group of merged patches is filled with its mean colour, with thin lines between groups; merging runs over all frames "
        "at once, so a group may be in many places and frames.\nIn each column, one group is fenced in orange: all that it encloses, "
        "in every frame, has become a single token. The error is that of part 3.",
    )
    _groups(page, first + 0.85, study, clip, cell)
    hardest = _hardest(study)
    page.heading(
        second,
        "2  The same frame by every preset, at about a quarter of the tokens",
        f"The frame at {clip.times[hardest]:.1f} s, where they are furthest off, after unmerge: each patch is its row's mean, or the "
        "patch that stands for it; kept ratio and error are those of all frames.\n"
        + (
            "framefusion and evs look along time alone, at one place, so motion and cuts hit them; the others but ppllava compare "
            "patches wherever they lie."
            if count > 1
            else "There is only one frame here, so vidtome, framefusion and evs, which work along time, have nothing to merge."
        ),
    )
    _presets(page, second + 0.87, study, hardest, small)
    page.heading(
        third,
        "3  What it costs",
        "How far the pixels are off after unmerge, by how many tokens are kept; lower is better. 100 % is the spread of the pixels, "
        "which a single token for the whole clip would leave.\nA line that stops has reached its preset's end: vidtome, framefusion and "
        "evs keep one frame's tokens at least.",
    )
    draw_curve(page.axes(_LEFT + 0.75, third + 0.92, 7.1, curve), study)
    draw_key(page.axes(9.15, third + 0.92, _RIGHT - 9.15, curve), study)
    page.figure.savefig(path)
    return path
