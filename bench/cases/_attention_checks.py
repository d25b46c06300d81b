"""The thresholds that attention must meet, evaluated from the rows of one run."""

from __future__ import annotations

from collections.abc import Sequence

from bench.cases import Check
from bench.cases._checks import find
from bench.rows import Row

SDPA, FLEX, PLANNED = "torch SDPA, dense", "torch FlexAttention, compiled", "saccade with its plan (top_k)"
BF16, FP32 = "bfloat16", "float32"


def _times(rows: Sequence[Row], case: str, mode: str, dtype: str, *providers: str) -> tuple[list[Row], str]:
    """The rows, or why one has no time."""
    found = [find(rows, case, mode, dtype, provider) for provider in providers]
    for provider, row in zip(providers, found, strict=True):
        if row is None or row.status != "ok" or not row.value:
            return [], f"{provider}: {'not measured' if row is None else f'{row.status}: {row.reason}'}"
    return [row for row in found if row is not None], ""


def _share(name: str, rows: Sequence[Row], case: str, mode: str, dtype: str, ours: str, limit: float) -> Check:
    """Our time over dense SDPA's, divided by the density: 1 is time in proportion to work."""
    found, why = _times(rows, case, mode, dtype, ours, SDPA)
    wanted = f"<= {limit:.2f} x density x SDPA"
    if not found:
        return Check(name, why, wanted, None)
    mine, dense = found
    assert mine.flops and mine.dense_flops and mine.value and dense.value
    share = mine.value / dense.value / (mine.flops / mine.dense_flops)
    return Check(name, f"{share:.2f} x density x SDPA", wanted, share <= limit)


def _faster(
    name: str, rows: Sequence[Row], case: str, mode: str, dtype: str, ours: str, peer: str, wanted: float
) -> Check:
    found, why = _times(rows, case, mode, dtype, ours, peer)
    if not found:
        return Check(name, why, f">= {wanted:.1f}x", None)
    assert found[0].value and found[1].value
    ratio = found[1].value / found[0].value
    return Check(name, f"{ratio:.2f}x", f">= {wanted:.1f}x", ratio >= wanted)


def cpu_checks(rows: Sequence[Row]) -> list[Check]:
    """CPU: time in proportion to density, FlexAttention, planning, axial attention, importance."""
    from bench.cases._axial_calls import checks as axial_checks
    from bench.cases._plan_calls import checks as plan_checks

    found = []
    for mode, limit in (("forward", 1.1), ("backward", 1.3)):
        for shape in ("8 heads of 64", "4 heads of 128"):
            for density in ("1", "0.5", "0.25", "0.1"):
                case = f"{shape} at {density}"
                found.append(_share(f"{mode}, {case}", rows, case, mode, FP32, "saccade cpu", limit))
    for shape in ("8 heads of 64", "4 heads of 128"):
        case = f"{shape} at 0.25"
        name = f"{case}: against FlexAttention"
        found.append(_faster(name, rows, case, "forward", FP32, "saccade cpu", FLEX, 2.5))
    return [*found, *plan_checks(rows), *axial_checks(rows)]


def cuda_checks(rows: Sequence[Row]) -> list[Check]:
    """GPU: executed rate against dense SDPA's at every density, FlexAttention, and planning."""
    ours, found = "saccade cuda", []
    for model in ("Wan 1.3B", "Wan 14B", "HunyuanVideo"):
        for density in ("1", "0.5", "0.25", "0.1"):
            case = f"{model} at {density}"
            found.append(_share(f"forward, {case}", rows, case, "forward", BF16, ours, 1 / 0.6))
        case = f"{model} at 0.25"
        found.append(_faster(f"{case}: FlexAttention", rows, case, "forward", BF16, ours, FLEX, 1.3))
        found.append(_faster(f"{case}: plan + attention", rows, case, "forward", BF16, PLANNED, ours, 0.8))
    for density in ("1", "0.5", "0.25", "0.1"):
        case = f"Wan 1.3B at {density}"
        found.append(_share(f"backward, {case}", rows, case, "backward", BF16, ours, 1 / 0.55))
    return found
