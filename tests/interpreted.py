"""A process in which Triton interprets: the choice is made when Triton is first imported, so the checks run apart from pytest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


class Worker:
    """Runs a script that reads the name of a check per line and answers with a JSON line, `{"problem": ...}`."""

    def __init__(self, script: Path) -> None:
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

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)
