"""The axial-attention Triton kernels in Triton's interpreter, on the CPU: see triton_cases_axial.py for the checks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="not run: Triton is not installed")

from interpreted import Worker

sys.path.insert(0, str(Path(__file__).parent))
import triton_cases_axial


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(Path(triton_cases_axial.__file__))
    yield worker
    worker.close()


@pytest.mark.parametrize("name", triton_cases_axial.CHECKS)
def test_interpreted(worker: Worker, name: str) -> None:
    problem = worker.run(name)
    assert problem is None, problem
