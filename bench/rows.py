"""The rows of a result: one per case, provider and metric, and their files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One measured (or refused) number. New columns are only ever added at the end."""

    run: str
    time: str
    family: str
    case: str
    op: str
    mode: str
    dtype: str
    shape: str
    provider: str
    role: str
    provider_version: str
    device: str
    threads: int
    metric: str  # "time" or "peak_extra_memory"
    unit: str  # "ms" or "bytes"
    value: float | None = None  # the median
    p20: float | None = None
    p80: float | None = None
    n: int = 0
    status: str = "ok"  # ok, wrong, oom, refused, error, not run
    reason: str = ""
    bytes: int = 0
    flops: int = 0
    dense_flops: int | None = None
    gbps: float | None = None
    tflops: float | None = None
    copy_fraction: float | None = None  # of the bandwidth of the copy in the same case, else of the copy roof
    floor_ms: float | None = None
    speedup_eager: float | None = None
    speedup_compile: float | None = None
    max_error: float | None = None
    allowed_error: float | None = None
    timer: str = ""
    cache: str = ""
    throttled: int | None = None
    git_sha: str | None = None
    git_dirty: int | None = None
    saccade: str = ""
    torch: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Which case it belongs to."""
        return (self.family, self.case, self.mode, self.dtype)


COLUMNS = tuple(f.name for f in fields(Row))


def complete(rows: Sequence[Row], copy_gbps: float) -> None:
    """Fill in what compares the rows of one case with each other: bandwidth, speed-ups, fraction of the copy.

    Only rows that passed the gate and were timed have any of it.
    """
    timed = [r for r in rows if r.metric == "time" and r.status == "ok" and r.value]
    base: dict[str, float] = {}
    for row in timed:
        assert row.value is not None
        row.gbps = row.bytes / row.value / 1e6
        row.tflops = row.flops / row.value / 1e9 if row.flops else None
        if row.role in ("eager", "compile", "copy") and row.role not in base:
            base[row.role] = row.gbps if row.role == "copy" else row.value
    for row in timed:
        assert row.value is not None and row.gbps is not None
        row.copy_fraction = row.gbps / base.get("copy", copy_gbps)
        if row.role != "copy":
            row.speedup_eager = base["eager"] / row.value if "eager" in base else None
            row.speedup_compile = base["compile"] / row.value if "compile" in base else None


def append_csv(path: Path, rows: Iterable[Row]) -> None:
    """Append to a long-form CSV. An older file with fewer columns gets the new ones, empty; other columns are an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.reader(file))
        if old and tuple(old[0]) != COLUMNS:
            if tuple(old[0]) != COLUMNS[: len(old[0])]:
                raise ValueError(f"{path.name}: its columns are not those of this version, move it away")
            padded = [[*line, *[""] * (len(COLUMNS) - len(line))] for line in old[1:]]
            with path.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *padded])
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if v is None else v for k, v in asdict(row).items()})


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, stamp: dict[str, Any], roofs: Any, rows: Iterable[Row], checks: Iterable[Any] = ()) -> None:
    """One file per run: the stamp, the measured roofs, all rows, the verdicts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "stamp": stamp,
        "roofs": asdict(roofs),
        "rows": [asdict(r) for r in rows],
        "checks": [asdict(c) for c in checks],
    }
    path.write_text(json.dumps(_finite(content), indent=1) + "\n")
