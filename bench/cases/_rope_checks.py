"""The thresholds that the rotary ops must meet, evaluated from the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench.cases import Case, Check, Request
from bench.cases._checks import MEGABYTE, at_least, find
from bench.rows import Row

PLAIN = "Qwen2.5-VL M-RoPE"
NORMS = ("Qwen3-VL norm + M-RoPE", "Wan norm + RoPE")
SPEEDUPS = {"float32": (20.0, 7.0), "bfloat16": (12.0, 6.0)}  # against eager, against torch.compile
IN_PLACE = "saccade cpu, in place"


def cpu_checks(
    rows: Sequence[Row],
    cases: Mapping[str, Case],
    peak: Callable[[Case, str, int], int | None],
    request: Request,
) -> list[Check]:
    """CPU: bandwidth against copy_, speed-ups, and memory in place."""
    found = []
    for dtype, (eager, compiled) in SPEEDUPS.items():
        row = find(rows, PLAIN, "forward", dtype, IN_PLACE)
        what = f"apply_rope in place, {dtype}"
        found.append(at_least(f"{what}: bandwidth of copy_", row, "copy_fraction", 0.8, "{:.0%}"))
        found.append(at_least(f"{what}: against transformers eager", row, "speedup_eager", eager, "{:.1f}x"))
        found.append(at_least(f"{what}: against torch.compile of it", row, "speedup_compile", compiled, "{:.1f}x"))
        for name in NORMS:
            row = find(rows, name, "forward", dtype, IN_PLACE)
            what = f"qk_norm_rope in place, {name.partition(' ')[0]}, {dtype}"
            found.append(at_least(f"{what}: bandwidth of copy_", row, "copy_fraction", 0.65, "{:.0%}"))
        for name in (PLAIN, *NORMS):
            what = f"extra memory in place, {name}, {dtype}"
            case = cases.get(name + "forward" + dtype)
            size = None if case is None else peak(case, IN_PLACE, request.threads)
            measured = "not measured" if size is None else f"{size / 1e6:.3f} MB"
            found.append(Check(what, measured, "< 1 MB", None if size is None else size < MEGABYTE))
    return found


def cuda_checks(rows: Sequence[Row]) -> list[Check]:
    """GPU: 80 % of the copy forward and backward, faster than torch.compile and liger-kernel in the same run."""
    found = []
    for name in ("Qwen2.5-VL-7B M-RoPE", "Wan2.1-14B RoPE"):
        for mode in ("forward", "backward"):
            row = find(rows, name, mode, "bfloat16", "saccade cuda")
            what = f"{name}, {mode}"
            found.append(at_least(f"{what}: bandwidth of copy_", row, "copy_fraction", 0.8, "{:.0%}"))
            found.append(at_least(f"{what}: against torch.compile", row, "speedup_compile", 1.0, "{:.2f}x"))
            liger = find(rows, name, mode, "bfloat16", "liger-kernel")
            if liger is None:
                continue  # it has no op for this pairing
            if row is None or liger.status != "ok" or row.value is None or liger.value is None:
                found.append(Check(f"{what}: against liger-kernel", liger.reason or "not measured", ">= 1.00x", None))
            else:
                ratio = liger.value / row.value
                found.append(Check(f"{what}: against liger-kernel", f"{ratio:.2f}x", ">= 1.00x", ratio >= 1.0))
    return found
