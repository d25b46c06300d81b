"""Input factories, error budgets and whole models, shared by the tests, the benchmarks and the demo."""

from saccade.testing.budget import Budget, check_budget, error_budget, poison
from saccade.testing.inputs import heads, layouts, rope_inputs
from saccade.testing.models import same_state, state_of, twin

__all__ = [
    "Budget", "check_budget", "error_budget", "heads", "layouts", "poison", "rope_inputs", "same_state", "state_of", "twin",
]  # fmt: skip
