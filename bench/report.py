"""What a person sees: one table per case on stdout, and a summary of the run. Plain text where rich is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from bench.cases import Check
from bench.roofline import Roofs
from bench.rows import Row

HEADINGS = ("provider", "ms", "p20..p80", "n", "GB/s", "of copy", "vs eager", "vs compile", "max error", "extra MB")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def line(row: Row, extra: Row | None) -> tuple[str, ...]:
    """Cells of one provider; where there is no time, the reason stands instead. A red gate shows no speed-up."""
    error = _number(row.max_error, "{:.1e}")
    if row.status != "ok" or row.value is None:
        return (row.provider, row.status.upper(), row.reason, *[""] * 5, error, "")
    memory = None if extra is None or extra.value is None else extra.value / 1e6
    mark = " (throttled)" if row.throttled else ""
    return (
        row.provider,
        f"{row.value:.4g}{mark}",
        f"{row.p20:.4g}..{row.p80:.4g}",
        str(row.n),
        _number(row.gbps, "{:.1f}"),
        _number(row.copy_fraction, "{:.0%}"),
        _number(row.speedup_eager, "{:.2f}x"),
        _number(row.speedup_compile, "{:.2f}x"),
        error,
        _number(memory, "{:.1f}"),
    )


def title(rows: Sequence[Row]) -> str:
    """Case, shape, dtype, the floor, and how it was timed."""
    first = rows[0]
    timed = [r for r in rows if r.timer]
    how = "; ".join(sorted({f"{r.timer}, {r.cache}" if r.cache else r.timer for r in timed}))
    floor = f", floor {first.floor_ms:.4g} ms" if first.floor_ms else ""
    return f"{first.family}: {first.case} {first.mode}, {first.dtype} [{first.shape}]{floor}" + (
        f" ({how})" if how else ""
    )


def print_table(heading: str, headings: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A table by rich; aligned plain text without it."""
    lines = [tuple(map(str, cells)) for cells in lines]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        widths = [max(len(c[i]) for c in [tuple(headings), *lines]) for i in range(len(headings))]
        print(heading)
        for cells in [tuple(headings), *lines]:
            print("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())
        print()
        return
    table = Table(title=Text(heading), title_justify="left", title_style="bold")
    for i, name in enumerate(headings):
        wide = headings is HEADINGS and i == 2  # reasons stand here
        table.add_column(
            name,
            justify="right" if i and headings is HEADINGS else "left",
            overflow="fold",
            min_width=8 if wide else None,
        )
    for cells in lines:
        table.add_row(*(Text(c) for c in cells))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)


def print_case(rows: Sequence[Row]) -> None:
    """The table of one case."""
    if not rows:
        return
    times = [r for r in rows if r.metric == "time"]
    extra = {r.provider: r for r in rows if r.metric == "peak_extra_memory"}
    print_table(title(times), HEADINGS, [line(r, extra.get(r.provider)) for r in times])


def print_checks(checks: Sequence[Check]) -> None:
    """PASS, FAIL or NOT MEASURED per threshold."""
    verdict = {True: "PASS", False: "FAIL", None: "NOT MEASURED"}
    print_table(
        "thresholds",
        ("verdict", "what", "measured", "wanted"),
        [(verdict[c.ok], c.name, c.measured, c.wanted) for c in checks],
    )


def print_stamp(stamp: dict[str, Any], roofs: Roofs) -> None:
    """Two lines that say on what this was measured."""
    cpu, gpu, git = stamp["cpu"], stamp["gpu"], stamp["git"]
    state = {True: ", with uncommitted changes", False: "", None: ""}[git["dirty"]]
    where = f"{cpu['model']}, {cpu['threads']} threads, {cpu['isa'] or 'no compiled library'}"
    if gpu is not None:
        where = f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}; {where}"
    if (cpu["load"] or 0.0) > 0.5 * (cpu["cores"] or 1):
        where += f"\nload {cpu['load']:.1f} before the run: others use this machine, the timings are noise"
    versions = ", ".join(f"{k} {v}" for k, v in stamp["versions"].items() if v)
    print(f"{where}\n{versions}; commit {git['sha']}{state}")
    rates = ", ".join(f"matmul {k} {v:.3g} TFLOP/s" for k, v in roofs.matmul_tflops.items())
    print(f"roofs measured now: copy {roofs.copy_gbps:.4g} GB/s (read + written), {rates}", flush=True)
