"""The picture of a run: every provider per case against the roof that bounds it, copy or matrix product, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.roofline import Roofs
from bench.rows import Row

COLOURS = {"ours": "#1b7f5c", "eager": "#b9b9b9", "compile": "#d99a3b", "peer": "#7d8fc4", "copy": "#e0e0e0"}
COLUMNS = 3
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}  # behind labels that cross the line


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Time rows by case, in order."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.metric == "time" and row.provider:
            groups.setdefault(row.key, []).append(row)
    return list(groups.values())


def _scale(rows: Sequence[Row], roofs: Roofs) -> tuple[list[float], float, str]:
    """Lengths of the bars, the roof that bounds this case, and what they are: bandwidth, or operations where they take longer."""
    first = rows[0]
    rate = roofs.matmul_tflops.get("float32", 0.0)  # the same floor for every dtype: peers may be above it
    if rate and first.flops / rate / 1e12 > first.bytes / roofs.copy_gbps / 1e9:
        return [r.tflops or 0.0 for r in rows], rate, "TFLOP/s of the operations counted; dashed: torch matmul, fp32"
    copy = next((r.gbps for r in rows if r.role == "copy" and r.gbps), roofs.copy_gbps)
    return [r.gbps or 0.0 for r in rows], copy, "GB/s of the bytes that must move; dashed: torch copy_"


def _bars(axes: Any, rows: Sequence[Row], roofs: Roofs) -> None:
    names = [r.provider for r in rows]
    widths, roof, meaning = _scale(rows, roofs)
    places = range(len(rows))
    axes.barh(places, widths, color=[COLOURS[r.role] for r in rows], height=0.72)
    axes.axvline(roof, color="black", linewidth=0.8, linestyle="--")
    limit = 1.45 * max([roof, *widths])
    for place, row, width in zip(places, rows, widths, strict=True):
        label = f"{row.value:.4g} ms" if row.status == "ok" and row.value else f"{row.status}"
        if row.speedup_eager and row.role == "ours":
            label += f", {row.speedup_eager:.1f}x eager"
        axes.text(width + 0.01 * limit, place, label, va="center", fontsize=6, bbox=PAPER)
    axes.set_yticks(list(places), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, limit)
    axes.tick_params(axis="x", labelsize=6)
    axes.set_xlabel(meaning, fontsize=6)
    axes.set_title(f"{rows[0].case}, {rows[0].mode}\n{rows[0].dtype}, {rows[0].shape}", fontsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _roofline(axes: Any, groups: Sequence[Sequence[Row]], roofs: Roofs) -> None:
    """Operations per second over operations per byte, log-log, under the measured roofs."""
    points = [r for rows in groups for r in rows if r.role == "ours" and r.tflops and r.value]
    intensities = [r.flops / r.bytes for r in points] or [1.0]
    rate = roofs.matmul_tflops.get("float32", 1.0)
    knee = rate * 1e3 / roofs.copy_gbps
    low, high = min([*intensities, knee]) / 4, max([*intensities, knee]) * 4
    axes.plot([low, knee, high], [low * roofs.copy_gbps / 1e3, rate, rate], color="black", linewidth=1)
    axes.scatter(intensities, [r.tflops or 0 for r in points] or [0.0], s=14, color=COLOURS["ours"], zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte", fontsize=6)
    axes.set_ylabel("TFLOP/s", fontsize=6)
    axes.tick_params(labelsize=6, which="both")
    axes.set_title("roofline: copy and fp32 matmul measured in this run", fontsize=7)


def draw(path: Path, rows: Sequence[Row], roofs: Roofs, caption: str) -> bool:
    """Write the PNG; False where matplotlib is missing or nothing was timed."""
    groups = [g for g in grouped(rows) if any(r.gbps for r in g)]
    if not groups:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(groups) + 1
    lines = -(-count // COLUMNS)
    figure, grid = plt.subplots(lines, COLUMNS, figsize=(5.2 * COLUMNS, 2.4 * lines + 0.5), squeeze=False)
    cells = list(grid.flat)
    for axes, group in zip(cells, groups, strict=False):
        _bars(axes, group, roofs)
    _roofline(cells[len(groups)], groups, roofs)
    for axes in cells[count:]:
        axes.set_visible(False)
    figure.suptitle(caption, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
