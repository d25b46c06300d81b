"""What the demo says: the tables, the checks, and result.json."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saccade.demo.acceleration import Study as Accelerated
from saccade.demo.captioner import Inputs
from saccade.demo.checks import Check
from saccade.demo.measure import Cell, Row
from saccade.demo.merging import Study
from saccade.demo.video import Clip

__all__ = ["facts", "show", "write"]


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            break
    value = seconds * factor
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def _cell(cell: Cell) -> Text:
    if cell.seconds is None:
        return Text(cell.note, style="dim")
    shown = Text(duration(cell.seconds))
    if cell.error is not None:
        shown.append(f"\n± {cell.error:.1e}", style="dim")
    return shown


def _table(rows: list[Row]) -> Table:
    table = Table(
        title="Qwen2.5-VL on the clip, fp32: median time, and below it the largest error\n"
        "against float64; speed-up over eager, and below it over torch.compile",
        title_justify="left",
        title_style="bold",
        padding=(0, 1),
    )
    table.add_column("op")
    for name in ("stock\neager", "torch.\ncompile", "Saccade"):
        table.add_column(name, justify="right")
    table.add_column("speed-up", justify="right")
    for row in rows:
        op = Text(row.name)
        op.append(f"\n{row.detail}", style="dim")
        gain = Text("" if row.speedup is None else f"{row.speedup:.1f} x", style="bold")
        if row.compiled.seconds is not None and row.saccade.seconds is not None:
            gain.append(f"\n{row.compiled.seconds / row.saccade.seconds:.1f} x", style="dim not bold")
        table.add_row(op, *map(_cell, (row.stock, row.compiled, row.saccade)), gain)
        table.add_section()
    return table


def _merging_table(merging: dict[str, Any]) -> Table:
    """A line for each preset; `merging` is of `Study.to_dict`."""
    table = Table(
        title=f"Merging the {merging['tokens']} patches of the sampled frames, to about a quarter where a preset can:\n"
        "error after unmerge (100 % is what one token for everything leaves), median times",
        title_justify="left",
        title_style="bold",
        padding=(0, 1),
    )
    table.add_column("preset")
    for name in ("kept", "ratio", "error", "match", "merge", "unmerge"):
        table.add_column(name, justify="right")
    for line in merging["times"]:
        times = (duration(line[f"{name}_ms"] / 1e3) for name in ("match", "merge", "unmerge"))
        table.add_row(line["preset"], str(line["kept"]), f"{line['ratio']:.1%}", f"{line['error']:.1%}", *times)
    return table


def _levels_table(title: str, lines: list[dict[str, Any]], names: dict[str, str], kept: str) -> Table:
    """A line for each level of one model, of `acceleration.Study.to_dict`; `names`: of the parts whose times are shown."""
    table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 1))
    table.add_column("level")
    words = lines[0]["same"] is not None
    for name in (*names.values(), "speed-\nup", kept, "change", *(["same\ntokens"] if words else [])):
        table.add_column(name, justify="right")
    for line in lines:
        times = [duration(line["seconds"][part]) for part in names]
        gain = f"{lines[0]['seconds']['whole'] / line['seconds']['whole']:.2f} x"
        share = str(line["kept"]) if words else f"{line['kept']:.0%}"
        change = (
            "" if line is lines[0] else f"{line['change']:.1%}" if line["change"] >= 1e-3 else f"{line['change']:.0e}"
        )
        same = [f"{line['same']:.0%}"] if words else []
        table.add_row(line["level"], *times, Text(gain, style="bold"), share, change, *same)
    return table


def _acceleration_tables(found: dict[str, Any]) -> list[Table]:
    """Captioner and generator; `found` is of `acceleration.Study.to_dict`."""
    t, h, w = found["captioner"]["visual_tokens"]
    frames, rows, columns = found["generator"]["grid"]
    parts = {"vision tower": "vision\ntower", "language model": "text\nmodel", "whole": "whole"}
    captioner = _levels_table(
        f"Captioner at three levels ({t} x {h} x {w} visual tokens): tokens that\nenter the text model; change "
        "of the caption's logits, relative to stock's",
        found["captioner"]["levels"],
        parts,
        "tokens",
    )
    generator = _levels_table(
        f"Generator at three levels ({frames} x {rows} x {columns} tokens, denoising step {found['generator']['denoising_step']}):\n"
        "blocks of attention that are computed; change of the output,\nrelative to stock's",
        found["generator"]["levels"],
        {"self-attention": "self-\nattention", "rest": "rest", "whole": "whole"},
        "blocks",
    )
    return [captioner, generator]


def facts(
    clip: Clip, inputs: Inputs, model: Any, source: str, ran: str, study: Study, accelerated: Accelerated
) -> dict[str, Any]:
    """What the figures belong to."""
    import diffusers
    import transformers

    import saccade

    return {
        "clip": {
            "path": str(clip.path),
            "seconds": clip.duration,
            "frames": clip.count,
            "size": list(clip.size),
            "sampled": list(clip.times),
            "notes": list(clip.notes),
        },
        "model": {
            "weights": source,
            "parameters": sum(p.numel() for p in model.parameters()),
            "patches": list(inputs.pixels.shape),
            "tokens": inputs.ids.shape[1],
            "segments": [list(s) if isinstance(s, tuple) else s for s in inputs.segments],
            "text": inputs.tokens,
        },
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "diffusers": diffusers.__version__,
            "saccade": saccade.__version__,
        },
        "saccade_ran": ran,
        "merging": study.to_dict(),
        "acceleration": accelerated.to_dict(),
    }


def show(console: Console, about: dict[str, Any], rows: list[Row], checks: list[Check]) -> None:
    """Print the tables and the checks."""
    clip, model, machine = about["clip"], about["model"], about["machine"]
    console.print()
    console.print(_table(rows))
    console.print(
        f"Saccade ran its {about['saccade_ran']} implementation on {machine['threads']} threads, in place; stock's tables of "
        f"cos and sin were made before its clock started. Ops have the head counts of the 7B model; the captioner has "
        f"{model['parameters'] / 1e6:.0f}M parameters ({model['weights']}), {model['patches'][0]} patches, {model['tokens']} tokens.",
        style="dim",
        highlight=False,
    )
    console.print()
    console.print(_merging_table(about["merging"]))
    for table in _acceleration_tables(about["acceleration"]):
        console.print()
        console.print(table)
    console.print(
        "Times on this machine, the levels taking turns. A change says little about quality where weights are random; the "
        "generator's always are.",
        style="dim",
        highlight=False,
    )
    for note in clip["notes"]:
        console.print(f"note: {note}", style="yellow", highlight=False)
    console.print()
    console.print("Checks [dim](allowed: 2 x stock's own error against float64, 3 x for gradients)[/]", style="bold")
    lines = Table.grid(padding=(0, 1))
    for check in checks:
        mark = Text("✓", style="green") if check.ok else Text("✗", style="bold red")
        lines.add_row(mark, Text(check.name, no_wrap=True), Text(check.detail, style="dim" if check.ok else "red"))
    console.print(lines)
    passed = sum(check.ok for check in checks)
    style = "bold green" if passed == len(checks) else "bold red"
    console.print(f"{passed} of {len(checks)} checks passed\n", style=style, highlight=False)


def write(path: Path, about: dict[str, Any], rows: list[Row], checks: list[Check]) -> Path:
    """Write result.json."""
    result = {**about, "rows": [row.to_dict() for row in rows], "checks": [asdict(check) for check in checks]}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
