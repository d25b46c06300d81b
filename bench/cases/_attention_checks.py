"""The thresholds that attention must meet, evaluated from the rows of one run."""

from __future__ import annotations

from collections.abc import Sequence

from bench.cases import Check
from bench.cases._axial_calls import checks as axial_checks
from bench.cases._checks import faster, measured
from bench.cases._plan_calls import checks as plan_checks
from bench.rows import Row

SDPA, FLEX, PLANNED = "torch SDPA, dense", "torch FlexAttention, compiled", "saccade with its plan (top_k)"
BF16, FP32 = "bfloat16", "float32"


def _share(name: str, rows: Sequence[Row], case: str, mode: str, dtype: str, ours: str, limit: float) -> Check:
    """Our time over dense SDPA's, divided by the density: 1 is time in proportion to work."""
    found, why = measured(rows, case, mode, dtype, ours, SDPA)
    wanted = f"<= {limit:.2f} x density x SDPA"
    if not found:
        return Check(name, why, wanted, None)
    (row, mine), (_, dense) = found
    assert row.flops and row.dense_flops
    share = mine / dense / (row.flops / row.dense_flops)
    return Check(name, f"{share:.2f} x density x SDPA", wanted, share <= limit)


def cpu_checks(rows: Sequence[Row]) -> list[Check]:
    """CPU: time in proportion to density, FlexAttention, planning, axial attention, importance."""
    found = []
    for mode, limit in (("forward", 1.1), ("backward", 1.3)):
        for shape in ("8 heads of 64", "4 heads of 128"):
            for density in ("1", "0.5", "0.25", "0.1"):
                case = f"{shape} at {density}"
                found.append(_share(f"{mode}, {case}", rows, case, mode, FP32, "saccade cpu", limit))
    for shape in ("8 heads of 64", "4 heads of 128"):
        case = f"{shape} at 0.25"
        name = f"{case}: against FlexAttention"
        found.append(faster(name, rows, case, "saccade cpu", FLEX, 2.5, FP32, "{:.1f}x"))
    return [*found, *plan_checks(rows), *axial_checks(rows)]


def cuda_checks(rows: Sequence[Row]) -> list[Check]:
    """GPU: executed rate against dense SDPA's at every density, FlexAttention, and planning."""
    ours, found = "saccade cuda", []
    for model in ("Wan 1.3B", "Wan 14B", "HunyuanVideo"):
        for density in ("1", "0.5", "0.25", "0.1"):
            case = f"{model} at {density}"
            found.append(_share(f"forward, {case}", rows, case, "forward", BF16, ours, 1 / 0.6))
        case = f"{model} at 0.25"
        found.append(faster(f"{case}: FlexAttention", rows, case, ours, FLEX, 1.3, BF16))
        found.append(faster(f"{case}: plan + attention", rows, case, PLANNED, ours, 0.8, BF16))
    for density in ("1", "0.5", "0.25", "0.1"):
        case = f"Wan 1.3B at {density}"
        found.append(_share(f"backward, {case}", rows, case, "backward", BF16, ours, 1 / 0.55))
    return found
