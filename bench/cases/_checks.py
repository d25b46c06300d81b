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


def measured(
    rows: Sequence[Row], case: str, mode: str, dtype: str, *providers: str
) -> tuple[list[tuple[Row, float]], str]:
    """The rows of the providers with their times, or none and the reason why one of them has no time."""
    found: list[tuple[Row, float]] = []
    for provider in providers:
        row = find(rows, case, mode, dtype, provider)
        if row is None or row.status != "ok" or not row.value:
            return [], f"{provider}: {'not measured' if row is None else f'{row.status}: {row.reason}'}"
        found.append((row, row.value))
    return found, ""


def faster(
    name: str,
    rows: Sequence[Row],
    case: str,
    ours: str,
    peer: str,
    wanted: float,
    dtype: str,
    form: str = "{:.2f}x",
    mode: str = "forward",
) -> Check:
    """Time of a peer over ours, at least `wanted`; a time that is missing fails with its reason."""
    found, why = measured(rows, case, mode, dtype, ours, peer)
    if not found:
        return Check(name, why, f">= {form.format(wanted)}", None)
    ratio = found[1][1] / found[0][1]
    return Check(name, form.format(ratio), f">= {form.format(wanted)}", ratio >= wanted)
