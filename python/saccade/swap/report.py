"""`Report`: every site of a model, what was put there, what was left and why, and what it is estimated to save."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.swap.recipe import Recipe
from saccade.swap.site import Choice

__all__ = ["Report", "Row"]

_WIDEST = 64


@dataclass(frozen=True)
class Row:
    """One site.

    Attributes:
        path: of the module.
        cls: its class.
        family, kind, role: as in `Rule`.
        kernel: what runs there; "stock" where nothing was changed.
        change: what changes, in a few words.
        reason: why it was left, or None.
        fits: whether a rule of the recipe speaks of the site.
        flops, bytes: (before, after), estimated, or None.
    """

    path: str
    cls: str
    family: str
    kind: str
    role: str
    kernel: str
    change: str
    reason: str | None
    fits: bool
    flops: tuple[float, float] | None = None
    bytes: tuple[float, float] | None = None

    @classmethod
    def of(cls, choice: Choice) -> Row:
        """The row of a choice."""
        site, before, after = choice.site, choice.before, choice.after
        both = before is not None and after is not None
        return cls(
            site.path, type(site.module).__name__, choice.family, site.kind, site.role, choice.kernel, choice.change,
            choice.reason, bool(choice.rules),
            (before.flops, after.flops) if both else None,  # type: ignore[union-attr]
            (before.bytes, after.bytes) if both else None,  # type: ignore[union-attr]
        )  # fmt: skip


@dataclass
class Report:
    """What `plan` found and `accelerate` did. `print(report)` is a table; sites that fared alike share a line.

    Attributes:
        recipe: the recipe.
        rows: one for each site, in the model's order.
        applied: whether the swaps are in place.
        sizes: what the estimates assume, for each family.
        contexts: of the models, for `steps` and `notes`.
    """

    recipe: Recipe
    rows: tuple[Row, ...]
    applied: bool = False
    sizes: dict[str, str] = field(default_factory=dict)
    contexts: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def swapped(self) -> tuple[Row, ...]:
        """Sites that were changed."""
        return tuple(row for row in self.rows if row.fits and row.reason is None)

    @property
    def skipped(self) -> tuple[Row, ...]:
        """Sites that a rule speaks of, and that were left, with the reason."""
        return tuple(row for row in self.rows if row.fits and row.reason is not None)

    @property
    def unchanged(self) -> tuple[Row, ...]:
        """Sites that no rule speaks of."""
        return tuple(row for row in self.rows if not row.fits)

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be served while the model ran."""
        return tuple(note for context in self.contexts for note in context.notes)

    def set_step(self, step: int | None) -> None:
        """Tell the swapped model its denoising step, where it cannot find out (None: it counts timesteps again)."""
        for context in self.contexts:
            context.fixed_step = step
            if step is None:
                context.reset()

    def reset(self) -> None:
        """The next call is denoising step 0."""
        for context in self.contexts:
            context.reset()

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON; written to a file where a path is given."""
        data = {
            "recipe": json.loads(self.recipe.to_json()),
            "applied": self.applied,
            "assumed": self.sizes,
            "sites": [vars(row) for row in self.rows],
            "notes": list(self.notes),
        }
        text = json.dumps(data, indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def lines(self) -> list[tuple[str, ...]]:
        """The table's lines: (sites, count, class, role, kernel, GFLOP before, after, MB before, after, what or why)."""
        out: list[tuple[str, ...]] = []
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(_alike(row), []).append(row)
        for rows in groups.values():
            head = rows[0]
            cost = ("", "", "", "")
            flop_pairs = [row.flops for row in rows if row.flops]
            byte_pairs = [row.bytes for row in rows if row.bytes]
            if len(flop_pairs) == len(byte_pairs) == len(rows):
                flops = [sum(pair[i] for pair in flop_pairs) for i in (0, 1)]
                moved = [sum(pair[i] for pair in byte_pairs) for i in (0, 1)]
                cost = (_short(flops[0] / 1e9), _short(flops[1] / 1e9), _short(moved[0] / 1e6), _short(moved[1] / 1e6))
            why = head.reason or head.change
            role = head.kind if head.kind != "attention" else head.role
            out.append((_paths([row.path for row in rows]), str(len(rows)), head.cls, role, head.kernel, *cost, why))
        return out

    def __str__(self) -> str:
        names = ("sites", "n", "class", "role", "kernel", "GFLOP", "after", "MB", "after", "what changes, or why not")
        lines = [names, *self.lines()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(names) - 1)]
        right = {1, 5, 6, 7, 8}
        table = []
        for line in lines:
            cells = [
                c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=False))
            ]
            table.append("  ".join([*cells, line[-1]]).rstrip())
        table.insert(1, "-" * max(map(len, table)))
        state = "applied" if self.applied else "planned, nothing is changed"
        counts = f"{len(self.swapped)} sites swapped, {len(self.skipped)} skipped, {len(self.unchanged)} left stock"
        head = f"recipe {self.recipe.name}: {counts} ({state})"
        tail = [
            f"estimates: one forward of one sample, bf16, linear layers left out; {f}: {s}"
            for f, s in self.sizes.items()
        ]
        return "\n".join([head, *table, *tail, *(f"note: {note}" for note in self.notes)])


def _alike(row: Row) -> tuple[Any, ...]:
    return re.sub(r"\d+", "#", row.path), row.cls, row.kind, row.role, row.kernel, row.change, row.reason, row.fits


def _paths(paths: list[str]) -> str:
    """One path for all: numbers that differ become ranges."""
    if len(paths) == 1:
        return paths[0]
    parts = [re.split(r"(\d+)", path) for path in paths]
    merged = []
    for column in zip(*parts, strict=True):
        merged.append(column[0] if len(set(column)) == 1 else f"{column[0]}-{column[-1]}")
    return "".join(merged)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
