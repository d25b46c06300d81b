"""Sparse attention: video models' shapes at densities 1, 0.5, 0.25 and 0.1, against dense SDPA and compiled FlexAttention.

FLOPs: 4 for every query, visible key and column forward, 10 backward (five products); those of the dense computation beside them.
Bytes: q, k, v read once and out written once; backward those, dout and lse read and three gradients written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from bench.cases import Case, Check, Counts, Request
from bench.cases import _attention_calls as call
from bench.cases._attention_checks import cpu_checks, cuda_checks
from bench.cases._attention_sanitize import calls
from bench.cases._axial_calls import cases as axial_cases
from bench.cases._plan_calls import cases as plan_cases
from bench.cases._tile_calls import cases as tile_cases
from bench.rows import Row

BF16, FP32 = "bfloat16", "float32"
DENSITIES = (1.0, 0.5, 0.25, 0.1)


def _attention(
    name: str, heads: int, tokens: int, head_dim: int, density: float, dtype: str, mode: str, request: Request
) -> Case:
    blocks = -(-tokens // 64)
    real = call.kept_blocks(blocks, density) / blocks
    size = 4 if dtype == FP32 else 2
    dense = (4 if mode == "forward" else 10) * heads * tokens * tokens * head_dim
    moved = (4 if mode == "forward" else 8) * heads * tokens * head_dim * size + 4 * heads * tokens
    counts = Counts(moved, int(dense * real), dense, dtype)
    build = partial(call.attention, heads, tokens, head_dim, density, dtype, mode, request)
    shape = f"1x{heads}x{tokens}x{head_dim}, density {density:g}"
    return Case("attention", f"{name} at {density:g}", "sparse_attention", mode, dtype, shape, counts, build)  # type: ignore[arg-type]


def cases(request: Request) -> list[Case]:
    """All cases of the family, most important first."""
    if request.quick:
        return [
            _attention("1024", 2, 1024, 64, d, FP32, m, request) for d in (1.0, 0.25) for m in ("forward", "backward")
        ]
    if request.device == "cuda":
        shapes = (("Wan 1.3B", 12, 32760, 128), ("Wan 14B", 40, 75600, 128), ("HunyuanVideo", 24, 118800, 128))
        found = [_attention(*shape, d, BF16, "forward", request) for shape in shapes for d in DENSITIES]
        found += [_attention(*shapes[0], d, BF16, "backward", request) for d in DENSITIES]
    else:
        shapes = (("8 heads of 64", 8, 8192, 64), ("4 heads of 128", 4, 8192, 128))
        found = [
            _attention(*shape, d, FP32, mode, request)
            for mode in ("forward", "backward")
            for shape in shapes
            for d in DENSITIES
        ]
        found.append(_attention("8 heads of 64", 8, 8192, 64, 0.25, BF16, "forward", request))
    return [*found, *tile_cases(request), *plan_cases(request), *axial_cases(request)]


def checks(rows: Sequence[Row], request: Request) -> list[Check]:
    """The thresholds of the family, from the rows of this run."""
    return cuda_checks(rows) if request.device == "cuda" else cpu_checks(rows)


def sanitize(impl: str, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Small awkward calls of every op, for compute-sanitizer."""
    return calls(impl, device)
