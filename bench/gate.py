"""The correctness gate: no result is timed before it passes, and none that fails gets a speed-up.

The rule is `saccade.testing.error_budget`'s, evaluated in pieces on the tensors' own device, because full-size float64 results
would not fit a second time: max|out - exact| <= factor x max|torch in the same precision - exact|.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.cases import Expected

_PIECE = 1 << 24  # elements compared at once


@dataclass(frozen=True)
class Verdict:
    """Largest error of the worst output, what it may be, and why it fails if it does."""

    max_error: float
    allowed: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the result passes; NaN does not."""
        return not self.problem and self.max_error <= self.allowed


def _pieces(out: torch.Tensor, exact: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Matching parts of both along their longest dimension."""
    if out.ndim == 0 or out.numel() <= _PIECE:
        yield out.double(), exact
        return
    dim = max(range(out.ndim), key=lambda d: out.shape[d])
    step = max(1, _PIECE * out.shape[dim] // out.numel())
    for part, truth in zip(out.split(step, dim), exact.split(step, dim), strict=True):
        yield part.double(), truth


def largest_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """max|out - exact|; NaN where either has one. Inputs of benchmarks are finite, so that a NaN is always wrong."""
    worst = torch.zeros((), dtype=torch.float64, device=out.device)
    for part, truth in _pieces(out.detach(), exact):
        worst = torch.maximum(worst, (part - truth).abs().max())  # maximum keeps NaN
    return float(worst)


def half_spacing(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest value: no result can be told from a correct rounding below it."""
    return float(exact.abs().max()) * torch.finfo(dtype).eps / 2


def judge(outputs: Sequence[torch.Tensor], expected: Expected, level: str) -> Verdict:
    """Hold all outputs against the float64 results; the worst of them, relative to its budget, is reported."""
    if len(outputs) != len(expected.exact):
        return Verdict(float("inf"), 0.0, f"{len(outputs)} outputs, expected {len(expected.exact)}")
    worst = Verdict(0.0, 0.0)
    worst_ratio = -1.0
    for name, out, exact, error in zip(expected.names, outputs, expected.exact, expected.errors[level], strict=True):
        if out.shape != exact.shape:
            return Verdict(float("inf"), 0.0, f"{name}: shape {list(out.shape)}, expected {list(exact.shape)}")
        allowed = expected.factor * max(error, half_spacing(exact, out.dtype))
        got = largest_error(out, exact)
        if not got <= allowed:
            why = "NaN or infinity" if got != got or got == float("inf") else f"error {got:.3e}, allowed {allowed:.3e}"
            return Verdict(got, allowed, f"{name}: {why}")
        if allowed and got / allowed > worst_ratio:
            worst, worst_ratio = Verdict(got, allowed), got / allowed
    return worst
