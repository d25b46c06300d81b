"""The lower half of the merging page: error against kept ratio, a line for every preset, each with its own dash and mark."""

from __future__ import annotations

from typing import Any

from saccade.demo.merging import TIMED, Study
from saccade.demo.merging_presets import PRESETS

__all__ = ["INK", "SOFT", "STYLES", "draw_curve", "draw_key"]

INK, SOFT = "#1a1a1a", "#5a5a5a"

# Okabe and Ito's colours, as in `picture`; dashes and marks say the same again.
STYLES: dict[str, tuple[str, Any, str]] = {
    "tome": ("#D55E00", "-", "o"),
    "auroracap": ("#0072B2", (0, (6, 1.5)), "s"),
    "tomesd": ("#009E73", (0, (1.2, 1.2)), "^"),
    "vidtome": ("#CC79A7", (0, (5, 1.5, 1.2, 1.5)), "D"),
    "framefusion": ("#56B4E9", (0, (3, 1.2)), "v"),
    "evs": ("#1a1a1a", (0, (4, 1.2, 1.2, 1.2, 1.2, 1.2)), "X"),
    "ppllava": ("#B88300", (0, (8, 2.5)), "P"),
}
_TICKS = (0.05, 0.07, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0)


def _line(axes: Any, name: str, x: Any, y: Any, every: Any = None) -> None:
    colour, dash, mark = STYLES[name]
    wide = 2.8 if name == "tome" else 1.9
    style = {"color": colour, "ls": dash, "lw": wide, "marker": mark, "ms": 7, "mec": "white", "mew": 0.7}
    axes.plot(x, y, **style, markevery=every, clip_on=False, zorder=3)


def draw_curve(axes: Any, study: Study) -> None:
    """Error against kept ratio on given axes."""
    for preset in reversed(PRESETS):
        points = study.of(preset.name)
        _line(axes, preset.name, [p.ratio for p in points], [100 * p.error for p in points])
    lowest = min(p.ratio for p in study.points)
    axes.set_xscale("log")
    axes.set_xlim(min(lowest, 0.5) * 0.94, 1.03)
    ticks = [t for t in _TICKS if t >= min(lowest, 0.5) * 0.94]
    axes.set_xticks(ticks, [f"{100 * t:g} %" for t in ticks])
    axes.minorticks_off()
    top = max(100 * p.error for p in study.points)
    axes.set_ylim(0, max(top * 1.05, 1.0))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    if top > 90:
        axes.axhline(100, color=SOFT, lw=0.9, ls=(0, (2, 2)), zorder=1)
        axes.text(1.0, 101, "one token for everything", fontsize=9.5, color=SOFT, ha="right", va="bottom")
    axes.grid(color="#000000", alpha=0.08, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("tokens kept, share of all (logarithmic)", fontsize=10.5)
    axes.set_ylabel("error after unmerge", fontsize=10.5)
    axes.tick_params(labelsize=9.5, length=3, colors=SOFT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_key(axes: Any, study: Study) -> None:
    """A line for each preset: its stroke, its name, its error at about a quarter, what it does."""
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(PRESETS), 0)
    for n, preset in enumerate(PRESETS):
        _line(axes, preset.name, [0.0, 0.06, 0.12], [n + 0.3] * 3, [1])
        axes.text(0.155, n + 0.3, preset.name, fontsize=12.5, fontweight="bold", color=INK, va="center")
        point = study.near(preset.name, TIMED)
        figures = f"{100 * point.error:.1f} % at {100 * point.ratio:.1f} % kept"
        axes.text(1.0, n + 0.3, figures, fontsize=11, color=INK, va="center", ha="right")
        axes.text(0.155, n + 0.64, preset.about, fontsize=10.3, color=SOFT, va="center")
