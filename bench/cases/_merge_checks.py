"""The thresholds that token merging must meet, evaluated from the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench.cases import Case, Check, Request
from bench.cases._checks import MEGABYTE, at_least, faster, find
from bench.rows import Row

PRODUCT = "torch.bmm, the product alone"


def cpu_checks(
    rows: Sequence[Row],
    cases: Mapping[str, Case],
    peak: Callable[[Case, str, int], int | None],
    request: Request,
) -> list[Check]:
    """CPU: against ToMe's semantics in torch, against tomesd, against the product alone, and memory."""
    ours, fp32 = "saccade cpu", "float32"
    found = []
    for case, wanted in (("ToMe match 4096", 1.8), ("ToMe match 16384", 3.0)):
        row = find(rows, case, "forward", fp32, ours)
        found.append(at_least(f"{case}: against torch", row, "speedup_eager", wanted, "{:.2f}x"))
        found.append(faster(f"{case}: rate of the matrix product", rows, case, ours, PRODUCT, 0.7, fp32, "{:.0%}"))
    large = cases.get("ToMe match 16384" + fp32)
    size = None if large is None else peak(large, ours, request.threads)
    measured = "not measured" if size is None else f"{size / 1e6:.1f} MB"
    found.append(
        Check("ToMe match 16384: extra memory", measured, "< 16 MB", None if size is None else size < 16 * MEGABYTE)
    )
    merged = find(rows, "ViT-L merge", "forward", fp32, ours)
    found.append(at_least("ViT-L merge: against torch", merged, "speedup_eager", 5.0, "{:.1f}x"))
    match, both = "Stable Diffusion match", "Stable Diffusion merge + unmerge"
    found.append(faster(f"{match}: against tomesd", rows, match, ours, "tomesd", 1.2, fp32))
    found.append(faster(f"{both}: against tomesd", rows, both, ours, "tomesd", 6.0, fp32))
    return found


def cuda_checks(rows: Sequence[Row]) -> list[Check]:
    """GPU: half the rate of the matrix product, bandwidth of the merge, and the whole path at 4,096 tokens."""
    ours, bf16 = "saccade cuda", "bfloat16"
    found = [
        faster(
            "Wan 720p match: rate of the matrix product", rows, "Wan 720p match", ours, PRODUCT, 0.5, bf16, "{:.0%}"
        ),
        at_least(
            "Wan 720p merge: bandwidth of copy_",
            find(rows, "Wan 720p merge", "forward", bf16, ours),
            "copy_fraction",
            0.8,
            "{:.0%}",
        ),
    ]
    row = find(rows, "match + merge + unmerge", "forward", bf16, ours)
    value = None if row is None or row.status != "ok" or row.value is None else row.value * 1e3
    measured = "not measured" if value is None else f"{value:.1f} us"
    found.append(
        Check("match + merge + unmerge, 4,096 tokens", measured, "< 25 us", None if value is None else value < 25)
    )
    for case in ("Stable Diffusion match", "Stable Diffusion merge + unmerge"):
        found.append(faster(f"{case}: against tomesd", rows, case, ours, "tomesd", 1.0, bf16))
    return found
