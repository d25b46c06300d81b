"""The Triton kernels in Triton's interpreter, on the CPU: see triton_cases.py for the checks.

The interpreter is chosen when Triton is first imported, so the checks run in a process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="not run: Triton is not installed")

from rope import triton_cases


class Worker:
    """A process that interprets Triton."""

    def __init__(self) -> None:
        script = Path(triton_cases.__file__)
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, name: str) -> str | None:
        """The problem of a check, None if it passed."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            return f"the interpreting process ended with status {self.process.wait()}"
        problem: str | None = json.loads(line)["problem"]
        return problem


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    assert worker.process.stdin
    worker.process.stdin.close()
    worker.process.wait(timeout=30)


@pytest.mark.parametrize("name", triton_cases.CHECKS)
def test_interpreted(worker: Worker, name: str) -> None:
    problem = worker.run(name)
    assert problem is None, problem


def test_worker_reports_problems(worker: Worker) -> None:
    assert "KeyError" in (worker.run("no such check") or "")
