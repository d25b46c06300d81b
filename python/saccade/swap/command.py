"""`saccade plan` and `saccade presets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saccade.swap.engine import plan as make_plan
from saccade.swap.presets import FAMILIES, KEPT, LEVELS, SPARSE, preset
from saccade.swap.report import COLUMNS, NUMBERS, Report
from saccade.swap.skeleton import skeleton

__all__ = ["plan", "presets", "table"]


def table(report: Report) -> Any:
    """The report as a rich table."""
    from rich import box
    from rich.table import Table

    lines, remarks = report.lines()
    out = Table(box=box.SIMPLE_HEAD, title=report.headline, title_justify="left", caption_justify="left")
    for i, name in enumerate(COLUMNS):
        out.add_column(name, justify="right" if i in NUMBERS else "left", no_wrap=i in NUMBERS, overflow="fold")
    for line in lines:
        out.add_row(*line, style="dim" if line[3] == "stock" else None)
    out.caption = "\n".join([*remarks, *report.footnotes])
    return out


def plan(console: Any, model: str, recipe: str, grid: str | None, text: int | None, json_path: Path | None) -> int:
    """Print what would be swapped; the exit code."""
    try:
        sizes = None if grid is None else tuple(int(size) for size in grid.split(","))
    except ValueError:
        console.print(
            f"saccade plan: --grid: expected three numbers as in 21,30,52, got {grid!r}", style="red", highlight=False
        )
        return 2
    try:
        report = make_plan(skeleton(model), recipe, grid=sizes, text=text)  # type: ignore[arg-type]
        if json_path is not None:
            report.to_json(json_path)
    except (ValueError, TypeError, OSError) as error:
        console.print(f"saccade plan: {error}", style="red", highlight=False, markup=False)
        return 2
    console.print(table(report), highlight=False)
    if not report.rows:
        console.print("No attention was found in this model.")
    return 0


def presets(console: Any, name: str | None) -> int:
    """Print the presets, or one as JSON; the exit code."""
    if name is not None:
        try:
            console.out(preset(name).to_json(), end="", highlight=False)
        except ValueError as error:
            console.print(f"saccade presets: {error}", style="red", highlight=False, markup=False)
            return 2
        return 0
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD)
    for title in ("level", "video generation", "captioning"):
        out.add_column(title, overflow="fold")
    for level in LEVELS:
        if level == "lossless":
            out.add_row(level, "exact; norm and rotation fused", "exact; packed attention, fused rotation")
            continue
        steps, layers, density = SPARSE[level]
        dense = f"{density:.0%} of the pairs; the first {steps} steps and {layers} layers dense"
        out.add_row(level, dense, f"{KEPT[level]:.0%} of a tower's tokens left at its end")
    console.print(out)
    console.print("For one family put its name before the level, as in wan-balanced:")
    console.print("  " + ", ".join(FAMILIES), highlight=False)
    console.print("saccade presets NAME prints a recipe as JSON, to edit and to give to accelerate or plan.")
    return 0
