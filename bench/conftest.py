"""pytest-benchmark: stamps its JSON with the environment, without the host name that it would put there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import environment


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Replace what pytest-benchmark found by the stamp."""
    machine_info.clear()
    machine_info.update(environment.stamp())
