"""The pass rule: an error is allowed to be twice that of torch in the same precision (three times for gradients).

Both are measured against the same float64 computation, so no tolerance is ever guessed. NaN in a place where the float64 result
has none never passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Budget:
    """Largest error of an implementation, what it may be, and the verdict."""

    error: float
    allowed: float
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the result passes."""
        return self.problem is None and self.error <= self.allowed


def error_budget(
    out: torch.Tensor, same_precision: torch.Tensor, exact: torch.Tensor, *, factor: float = 2.0
) -> Budget:
    """Measure `out` against `exact` (float64), allowing `factor` times the error of `same_precision`.

    Where torch in the same precision is exact (its error is 0), half a unit in the last place of the largest value is allowed:
    a result cannot be told from a correct rounding there.
    """
    if out.shape != exact.shape:
        return Budget(float("inf"), 0.0, f"shape {list(out.shape)}, expected {list(exact.shape)}")
    if exact.dtype != torch.float64:
        raise TypeError(f"exact: expected float64, got {exact.dtype}")
    if out.numel() == 0:
        return Budget(0.0, 0.0)
    got, peer = out.detach().double().cpu(), same_precision.detach().double().cpu()
    exact = exact.detach().cpu()
    if not torch.equal(got.isnan(), exact.isnan()):
        return Budget(
            float("inf"),
            0.0,
            f"{int((got.isnan() != exact.isnan()).sum())} NaN where float64 has none, or none where it has",
        )
    infinite = exact.isinf() | got.isinf()
    if not torch.equal(got[infinite], exact[infinite]):
        return Budget(float("inf"), 0.0, "infinities differ")
    finite = ~(infinite | exact.isnan())
    got, peer, exact = got[finite], peer[finite], exact[finite]
    if exact.numel() == 0:
        return Budget(0.0, 0.0)
    error = float((got - exact).abs().max())
    spacing = float(exact.abs().max()) * torch.finfo(out.dtype).eps / 2
    return Budget(error, factor * max(float((peer - exact).abs().max()), spacing))


def check_budget(
    name: str, out: torch.Tensor, same_precision: torch.Tensor, exact: torch.Tensor, *, factor: float = 2.0
) -> Budget:
    """Raise AssertionError with the figures where `error_budget` does not pass."""
    budget = error_budget(out, same_precision, exact, factor=factor)
    if not budget.ok:
        raise AssertionError(f"{name}: {budget.problem or f'error {budget.error:.3e}, allowed {budget.allowed:.3e}'}")
    return budget


def poison(like: torch.Tensor) -> torch.Tensor:
    """A tensor of NaN shaped like `like`: what an output holds before a test."""
    return torch.full_like(like, float("nan"))
