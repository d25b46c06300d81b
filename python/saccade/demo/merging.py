"""Token merging on the clip: what every preset leaves of its patches, how far off the frames then are, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import adaptive_avg_pool2d

from saccade.demo import measure
from saccade.demo.checks import Check
from saccade.demo.merging_presets import PRESETS, SHARES, Made, Patches, Preset, tome_plan
from saccade.demo.patches import fit, resize

__all__ = ["COLUMNS", "STEPS", "TIMED", "UNIT", "Point", "Study", "Timed", "patches_of", "study"]

STEPS = len(PRESETS)
COLUMNS = (1.0, 0.5, 0.25, 0.1)  # kept ratios that are drawn
TIMED = 0.25  # kept ratio of the table
_PATCH = 14
_MOST_PATCHES = 2880  # of all frames
_COLOURS = 4  # a patch is compared by its 4 x 4 mean colours
UNIT = (
    "RMS of the difference over all pixels, relative to their RMS distance from the clip's mean patch: "
    "1 is what one token for everything would leave"
)


@dataclass(frozen=True)
class Point:
    """One preset at one number of rows."""

    preset: str
    made: Made
    ratio: float
    error: float

    @property
    def kept(self) -> int:
        """Tokens kept."""
        return self.made.rows

    def to_dict(self) -> dict[str, Any]:
        """For result.json."""
        return {"preset": self.preset, "kept": self.kept, "ratio": self.ratio, "error": self.error}


@dataclass(frozen=True)
class Timed:
    """A point with median seconds on this machine."""

    point: Point
    match: float
    merge: float
    unmerge: float

    def to_dict(self) -> dict[str, Any]:
        """For result.json."""
        times = {"match_ms": self.match * 1e3, "merge_ms": self.merge * 1e3, "unmerge_ms": self.unmerge * 1e3}
        return {**self.point.to_dict(), **times}


def _near(points: list[Point], ratio: float) -> Point:
    return min(points, key=lambda p: abs(p.ratio - ratio))


@dataclass(frozen=True)
class Study:
    """Everything that the page, the table and result.json say about merging.

    Args:
        frames: uint8 [T, H, W, 3], as they were cut into patches.
        points: of all presets, by falling number of rows.
        timed: for each preset, the point nearest to `TIMED`.
    """

    patches: Patches
    frames: NDArray[np.uint8]
    points: list[Point]
    timed: list[Timed]
    checks: list[Check]

    def of(self, preset: str) -> list[Point]:
        """The points of a preset, by falling number of rows."""
        return [p for p in self.points if p.preset == preset]

    def near(self, preset: str, ratio: float) -> Point:
        """The point of a preset that is nearest to a kept ratio."""
        return _near(self.of(preset), ratio)

    def to_dict(self) -> dict[str, Any]:
        """For result.json."""
        frames, rows, columns = self.patches.grid
        about = {"frames": frames, "grid": [rows, columns], "patch": self.patches.patch, "tokens": self.patches.count}
        return {
            **about,
            "error_unit": UNIT,
            "curve": [p.to_dict() for p in self.points],
            "times": [t.to_dict() for t in self.timed],
        }


def patches_of(frames: NDArray[np.uint8]) -> tuple[Patches, NDArray[np.uint8]]:
    """Tokens of frames uint8 [T, H, W, 3], and the frames at the size that the patches divide."""
    count, height, width = frames.shape[:3]
    unit = 2 * _PATCH
    size = fit(height, width, unit=unit, most=max(4, _MOST_PATCHES // (4 * count)) * unit**2)
    small = resize(frames, size)
    h, w = (side // _PATCH for side in size)
    blocks = (small.float() / 255).view(count, 3, h, _PATCH, w, _PATCH).permute(0, 2, 4, 1, 3, 5)
    pixels = blocks.reshape(1, count * h * w, 3 * _PATCH**2)
    colours = adaptive_avg_pool2d(blocks.flatten(0, 2), _COLOURS).flatten(1)
    metric = colours - colours.mean(0)
    # One entry that all patches share: without it cosine would not tell a pale patch from a strong one of the same colours.
    lift = 2 * metric.square().sum(1).mean().sqrt().clamp(min=1e-3)
    metric = torch.cat((metric, lift.expand(len(metric), 1)), 1)[None]
    return Patches(pixels, metric, (count, h, w), _PATCH), small.permute(0, 2, 3, 1).contiguous().numpy()


def _error(back: torch.Tensor, pixels: torch.Tensor, spread: float) -> float:
    return float((back - pixels).double().square().mean().sqrt()) / spread


def _spread(pixels: torch.Tensor) -> float:
    """RMS distance from the mean patch, at least one grey level, which a clip of one colour has not."""
    distance = pixels.double() - pixels.double().mean(1, keepdim=True)
    return max(float(distance.square().mean().sqrt()), 1 / 255)


def _points(preset: Preset, patches: Patches, spread: float) -> list[Point]:
    points: list[Point] = []
    for share in SHARES:
        made = preset.make(patches, patches.rows(share))
        if made is None or made.rows in {p.kept for p in points}:
            continue
        error = _error(made.unmerge(made.merge(patches.pixels)), patches.pixels, spread)
        points.append(Point(preset.name, made, made.rows / patches.count, error))
    return points


def _timed(preset: Preset, patches: Patches, points: list[Point]) -> Timed:
    point = _near(points, TIMED)
    x, rows = patches.pixels, patches.rows(TIMED) if len(points) > 1 else patches.count
    y = point.made.merge(x)
    calls = [lambda: preset.make(patches, rows), lambda: point.made.merge(x), lambda: point.made.unmerge(y)]
    return Timed(point, *measure.time_calls(calls, budget=0.2))


def _checks(patches: Patches, points: list[Point]) -> list[Check]:
    wrong = [p for p in points if int(p.made.size.sum()) != patches.count]
    _, carried = tome_plan(patches.metric, [patches.rows(COLUMNS[-1])])
    total = float(carried.double().sum())
    conserved = not wrong and total == patches.count
    detail = f"sizes sum to all {patches.count} tokens in {len(points)} reductions, and where ToMe's rounds carry them"
    if not conserved:
        detail = f"{len(wrong)} of {len(points)} reductions lose or double tokens; ToMe's rounds carry {total:g} of {patches.count}"
    whole = [p for p in points if p.made.rows == patches.count]
    exact = all(torch.equal(p.made.unmerge(p.made.merge(patches.pixels)), patches.pixels) for p in whole)
    said = "every pixel comes back" if exact else "pixels do not come back"
    return [
        Check("tokens are conserved", conserved, detail),
        Check("unmerge at kept ratio 1", exact and bool(whole), f"{said}, bit for bit, in {len(whole)} presets"),
    ]


@torch.no_grad()
def study(frames: NDArray[np.uint8], advance: Callable[[], None] = lambda: None) -> Study:
    """Every preset at all kept ratios that it can reach; `advance` is called after each of `STEPS` steps."""
    patches, small = patches_of(frames)
    spread, points, timed = _spread(patches.pixels), list[Point](), list[Timed]()
    for preset in PRESETS:
        found = _points(preset, patches, spread)
        points += found
        timed.append(_timed(preset, patches, found))
        advance()
    return Study(patches, small, points, timed, _checks(patches, points))
