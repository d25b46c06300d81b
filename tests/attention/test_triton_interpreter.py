"""The sparse-attention Triton kernels in Triton's interpreter, on the CPU: see triton_cases.py for the checks."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="not run: Triton is not installed")

from attention import triton_cases as cases
from interpreted import Worker


@pytest.mark.parametrize("name", cases.CHECKS)
def test_interpreted(worker: Worker, name: str) -> None:
    problem = worker.run(name)
    assert problem is None, problem
