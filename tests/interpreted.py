"""A process in which Triton interprets: the choice is made when Triton is first imported, so the checks run apart from pytest.

A family's checks are a program, `triton_cases*.py`: it fills a table of checks, which needs no Triton to be read, and serves it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

TESTS = Path(__file__).parent


class Worker:
    """Runs a program that serves its checks."""

    def __init__(self, script: Path) -> None:
        places = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
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

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


def serve(checks: Mapping[str, Callable[[], None]]) -> None:
    """Read the name of a check per line and answer with a JSON line, `{"problem": ...}`, until the input ends."""
    for line in sys.stdin:
        try:
            checks[line.strip()]()
            answer = {"problem": None}
        except Exception:
            answer = {"problem": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
