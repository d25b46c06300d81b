"""Thresholds evaluated from the rows of one run: what every family's checks need."""

from __future__ import annotations

from collections.abc import Sequence

from bench.cases import Check
from bench.rows import Row

MEGABYTE = 1_000_000


def find(rows: Sequence[Row], case: str, mode: str, dtype: str, provider: str) -> Row | None:
    for row in rows:
        if (row.case, row.mode, row.dtype, row.provider, row.metric) == (case, mode, dtype, provider, "time"):
            return row
    return None


def at_least(name: str, row: Row | None, field: str, wanted: float, form: str) -> Check:
    """`row.field` >= wanted; a row that is missing, refused or wrong fails with its reason."""
    value = None if row is None or row.status != "ok" else getattr(row, field)
    if value is None:
        why = "not measured" if row is None or row.status == "ok" else f"{row.status}: {row.reason}"
        return Check(name, why, f">= {form.format(wanted)}", None)
    return Check(name, form.format(value), f">= {form.format(wanted)}", bool(value >= wanted))
