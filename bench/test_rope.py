"""pytest-benchmark of the rotary ops at small sizes, where the cost of a call shows: `pytest bench/test_rope.py`.

The plain test command does not collect this. For the kernels at full size, against their peers: `python -m bench`.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench.cases._rope_calls import heads
from saccade.rope import apply_rope, presets, qk_norm_rope
from saccade.rope.positions import grid_positions

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SPECS = {"M-RoPE": presets.mrope(128, 1e6, (16, 24, 24)), "HoPE": presets.hope(128, 1e6), "Wan": presets.wan(128)}
GRIDS = {"1": (1, 1, 1), "256": (1, 16, 16), "1024": (4, 16, 16)}


def _timer() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _inputs(grid: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    tokens = grid[0] * grid[1] * grid[2]
    q, k = (heads((1, n, tokens, 128), dtype, device, "bshd", n) for n in (28, 4))
    return [q, k, grid_positions(grid).to(device)]


def _measure(benchmark: Any, run: Any, moved: int, **facts: Any) -> None:
    benchmark.pedantic(run, rounds=30, iterations=5, warmup_rounds=3)
    benchmark.extra_info.update(facts, bytes=moved)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["gbps"] = moved / benchmark.stats.stats.median / 1e9


@pytest.mark.benchmark(timer=_timer)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "functional"])
def test_apply_rope(benchmark: Any, name: str, grid: Any, dtype: torch.dtype, device: str, inplace: bool) -> None:
    q, k, positions = _inputs(grid, dtype, device)
    moved = 2 * (q.nbytes + k.nbytes)
    _measure(
        benchmark,
        lambda: apply_rope(q, k, positions, SPECS[name], inplace=inplace),
        moved,
        op="apply_rope",
        spec=name,
        shape=list(q.shape),
        dtype=str(dtype).removeprefix("torch."),
        device=device,
    )


@pytest.mark.benchmark(timer=_timer)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("norm", ["head", "row"])
def test_qk_norm_rope(benchmark: Any, norm: str, grid: Any, dtype: torch.dtype, device: str) -> None:
    q, k, positions = _inputs(grid, dtype, device)
    weights = [torch.ones(n if norm == "row" else 128, dtype=dtype, device=device) for n in (28 * 128, 4 * 128)]
    _measure(
        benchmark,
        lambda: qk_norm_rope(q, k, positions, SPECS["M-RoPE"], *weights, norm=norm),  # type: ignore[arg-type]
        2 * (q.nbytes + k.nbytes),
        op="qk_norm_rope",
        norm=norm,
        shape=list(q.shape),
        dtype=str(dtype).removeprefix("torch."),
        device=device,
    )
