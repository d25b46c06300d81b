"""`Report`: every site of a model, what was put there, what was left and why, and what it is estimated to save."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.swap.attend import Context
from saccade.swap.recipe import Recipe
from saccade.swap.site import Choice

__all__ = ["COLUMNS", "NUMBERS", "STATE", "Report", "Row"]

STATE = "_saccade_swap"  # in the __dict__ of an accelerated root
COLUMNS = ("sites", "n", "role", "kernel", "GFLOP", "MB", "note")
NUMBERS = (1, 4, 5, 6)  # columns aligned to the right
_RUNS = 4  # of numbers that one cell names


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
        sizes: what the estimates assume, for each family.
        contexts: of the models; each has notes.
        holders: weak references to the modules that remember how to undo them.
        unused: rules of patterns or of merging that speak of one of the model's families, and found no site.
    """

    recipe: Recipe
    rows: tuple[Row, ...]
    sizes: dict[str, str] = field(default_factory=dict)
    contexts: tuple[Any, ...] = field(default=(), repr=False)
    holders: tuple[Any, ...] = field(default=(), repr=False)
    unused: tuple[str, ...] = ()

    @property
    def applied(self) -> bool:
        """Whether its swaps, or some of them, are in place."""
        holders = [holder() for holder in self.holders]
        states = [vars(holder).get(STATE) for holder in holders if holder is not None]
        return any(state is not None and state.report is self for state in states)

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        """With a copied model: its report, of those roots alone that are copied."""
        made = dataclasses.replace(self, contexts=copy.deepcopy(self.contexts, memo), holders=())
        memo[id(self)] = made
        roots = [memo[id(root)] for holder in self.holders if (root := holder()) is not None and id(root) in memo]
        made.holders = tuple(weakref.ref(root) for root in roots)
        return made

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
            if isinstance(context, Context):
                context.steps.told = step
        if step is None:
            self.reset()

    def reset(self) -> None:
        """The next call is denoising step 0."""
        for context in self.contexts:
            if isinstance(context, Context):
                context.reset()

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON; written to a file where a path is given."""
        data = {
            "recipe": json.loads(self.recipe.to_json()),
            "applied": self.applied,
            "assumed": self.sizes,
            "sites": [vars(row) for row in self.rows],
            "unused": list(self.unused),
            "notes": list(self.notes),
        }
        text = json.dumps(data, indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def lines(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """The table's lines (see `COLUMNS`), and the remarks that their last cells number."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(_alike(row), []).append(row)
        remarks: dict[str, int] = {}
        lines: list[tuple[str, ...]] = []
        for rows in groups.values():
            head = rows[0]
            remark = head.reason or head.change
            number = str(remarks.setdefault(remark, len(remarks) + 1)) if remark else ""
            role = head.kind if head.kind != "attention" else head.role
            costs = (_pair([row.flops for row in rows], 1e9), _pair([row.bytes for row in rows], 1e6))
            lines.append((_paths([row.path for row in rows]), str(len(rows)), role, head.kernel, *costs, number))
        return lines, [f"{number}  {remark}" for remark, number in remarks.items()]

    @property
    def headline(self) -> str:
        """One line: what was done."""
        counts = f"{len(self.swapped)} sites swapped, {len(self.skipped)} skipped, {len(self.unchanged)} left stock"
        return f"recipe {self.recipe.name}: {counts} ({'applied' if self.applied else 'planned, nothing is changed'})"

    @property
    def footnotes(self) -> list[str]:
        """What the estimates assume, and what could not be served while the model ran."""
        sizes = "; ".join(f"{family}: {size} tokens" for family, size in self.sizes.items())
        found = [f"estimates: one forward of one sample in bf16, linear layers left out; {sizes}"] if sizes else []
        unused = [f"no site: {rule}" for rule in self.unused]
        return [*found, *unused, *(f"note: {note}" for note in self.notes)]

    def __str__(self) -> str:
        lines, remarks = self.lines()
        lines = [COLUMNS, *lines]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        rows = []
        for line in lines:
            cells = [
                c.rjust(w) if i in NUMBERS else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            ]
            rows.append("  ".join(cells).rstrip())
        rows.insert(1, "-" * max(map(len, rows)))
        return "\n".join([self.headline, *rows, *remarks, *self.footnotes])


def _alike(row: Row) -> tuple[Any, ...]:
    return re.sub(r"\d+", "#", row.path), row.cls, row.kind, row.role, row.kernel, row.change, row.reason, row.fits


def _paths(paths: list[str]) -> str:
    """One path for all: numbers that differ become ranges."""
    parts = [re.split(r"(\d+)", path) for path in paths]  # every second part is a number
    columns = enumerate(zip(*parts, strict=True))
    return "".join(_ranges({int(n) for n in column}) if i % 2 else column[0] for i, column in columns)


def _ranges(numbers: set[int]) -> str:
    """As in "0-3,7"; from the first to the last, with two dots, where there are many gaps."""
    starts, ends = (sorted(n for n in numbers if n + step not in numbers) for step in (-1, 1))
    if len(starts) > _RUNS:
        return f"{starts[0]}..{ends[-1]}"
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _pair(pairs: list[tuple[float, float] | None], unit: float) -> str:
    """The sums before and after, in units; once where nothing changes; nothing where one is not known."""
    known = [pair for pair in pairs if pair is not None]
    if not known or len(known) < len(pairs):
        return ""
    before, after = (_short(sum(pair[i] for pair in known) / unit) for i in (0, 1))
    return before if before == after else f"{before} > {after}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
