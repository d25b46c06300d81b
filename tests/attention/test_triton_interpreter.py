"""The sparse-attention Triton kernels in Triton's interpreter, on the CPU: see triton_cases.py for the checks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="not run: Triton is not installed")

from interpreted import Worker

sys.path.insert(0, str(Path(__file__).parent))  # as where it runs as a program
from attention import triton_cases


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(Path(triton_cases.__file__))
    yield worker
    worker.close()


@pytest.mark.parametrize("name", triton_cases.CHECKS)
def test_interpreted(worker: Worker, name: str) -> None:
    problem = worker.run(name)
    assert problem is None, problem
