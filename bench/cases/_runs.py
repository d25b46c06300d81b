"""How a competitor's call runs: without autograd, and with a refusal told from an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.cases import Refused

Run = Callable[[], Any]


def free(run: Run) -> Run:
    """The call without autograd, as in inference; weights that require grad would save their inputs."""

    def without() -> Any:
        with torch.no_grad():
            return run()

    return without


def refusable(run: Run) -> Any:
    """Run; the dispatcher's refusal of an explicit `impl` becomes a row of its own."""
    try:
        return run()
    except ValueError as error:
        if str(error).startswith("impl:"):
            raise Refused(str(error)) from error
        raise
