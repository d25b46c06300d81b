"""The rotary Triton kernels in Triton's interpreter, on the CPU: see triton_cases.py for the checks."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="not run: Triton is not installed")

from interpreted import Worker
from rope import triton_cases as cases


@pytest.mark.parametrize("name", cases.CHECKS)
def test_interpreted(worker: Worker, name: str) -> None:
    problem = worker.run(name)
    assert problem is None, problem


def test_worker_reports_problems(worker: Worker) -> None:
    assert "KeyError" in (worker.run("no such check") or "")
