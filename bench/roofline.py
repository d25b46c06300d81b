"""Roofs, measured in the same run as everything else: a large copy and large matrix products. Never a datasheet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bench.cases import Call, Counts
from bench.timing import CudaTimer, Effort, Sample, time_cpu


@dataclass(frozen=True)
class Roofs:
    """Measured ceilings.

    Args:
        copy_gbps: of a large copy, bytes read plus bytes written, 1e9 per second.
        copy_bytes: size of the copied tensor.
        matmul_tflops: by dtype, of a square product (fp32 without TF32).
        matmul_size: its edge, by dtype.
    """

    copy_gbps: float
    copy_bytes: int
    matmul_tflops: dict[str, float]
    matmul_size: dict[str, int]

    def floor_ms(self, counts: Counts) -> float:
        """Time that no implementation beats: the larger of bytes over bandwidth and operations over rate."""
        moving = counts.bytes / (self.copy_gbps * 1e9)
        rate = self.matmul_tflops.get(counts.unit) or math.inf
        return max(moving, counts.flops / (rate * 1e12)) * 1e3


def _median(call: Call, timer: CudaTimer | None, effort: Effort) -> float:
    call.runs[0]()
    sample: Sample = time_cpu([call], effort)[0] if timer is None else timer.events([call], effort)[0]
    return sample.quantile(0.5)


def _matmul(device: str, dtype: torch.dtype, timer: CudaTimer | None, effort: Effort) -> tuple[float, int]:
    """TFLOP/s and size: the edge doubles until one product takes long enough, on random data (zeros run faster)."""
    size, limit_ms = (8192, 0.0) if timer is not None else (256, 60.0)
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        ms = _median(Call([lambda a=a, b=b, out=out: torch.mm(a, b, out=out)]), timer, effort)
        if ms >= limit_ms or size >= 4096:
            return 2.0 * size**3 / ms / 1e9, size
        size *= 2


def _copy(device: str, size: int, timer: CudaTimer | None, effort: Effort) -> float:
    """GB/s of a copy of `size` bytes, read plus written."""
    source, target = torch.ones(size // 4, device=device), torch.empty(size // 4, device=device)
    target.fill_(0.0)  # pages exist before the clock runs
    ms = _median(Call([lambda: target.copy_(source)]), timer, effort)
    return 2 * source.nbytes / ms / 1e6


def measure(device: str, timer: CudaTimer | None = None, *, quick: bool = False) -> Roofs:
    """Measure the roofs of a device; a few seconds, well under one where quick."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        size = min(1 << 32, free // 8)
        effort = Effort(seconds=0.3, least=5, most=20)
    else:
        size = 1 << (27 if quick else 28)
        effort = Effort(seconds=0.3 if quick else 1.0, least=3, most=20)
    gbps = _copy(device, size, timer, effort)
    rates: dict[str, float] = {}
    sizes: dict[str, int] = {}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            rates[name], sizes[name] = _matmul(device, dtype, timer, Effort(seconds=0.2, least=3, most=10))
    finally:
        torch.set_float32_matmul_precision(precision)
    return Roofs(gbps, size, rates, sizes)
