"""The Triton kernels in Triton's interpreter, on the CPU: see triton_cases.py for the checks.

The interpreter is chosen when Triton is first imported, so the checks run in a process of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="not run: Triton is not installed")

from interpreted import Worker
from rope import triton_cases


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(Path(triton_cases.__file__))
    yield worker
    worker.close()


@pytest.mark.parametrize("name", triton_cases.CHECKS)
def test_interpreted(worker: Worker, name: str) -> None:
    problem = worker.run(name)
    assert problem is None, problem


def test_worker_reports_problems(worker: Worker) -> None:
    assert "KeyError" in (worker.run("no such check") or "")
