"""Input factories and error budgets, shared by the tests and the benchmarks."""

from saccade.testing.budget import Budget, check_budget, error_budget, poison
from saccade.testing.inputs import heads, layouts, rope_inputs

__all__ = ["Budget", "check_budget", "error_budget", "heads", "layouts", "poison", "rope_inputs"]
