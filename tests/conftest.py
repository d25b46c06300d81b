"""Fixtures and the report of what could not run here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from interpreted import Worker

from saccade._load import BINARY

_NOT_RUN: list[tuple[str, str]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU; they are listed at the end, never counted as passed."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="not run: no CUDA GPU"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect what was skipped, with its reason."""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _NOT_RUN.append((report.nodeid, reason.removeprefix("Skipped: ")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name everything that was not covered on this machine, tests of one function and reason on one line."""
    if not _NOT_RUN:
        return
    groups: dict[tuple[str, str], list[str]] = {}
    for nodeid, reason in _NOT_RUN:
        function, _, parameters = nodeid.partition("[")
        groups.setdefault((function, reason), []).append(parameters.rstrip("]"))
    terminalreporter.section("not covered on this machine")
    for (function, reason), cases in sorted(groups.items()):
        terminalreporter.write_line(f"{function}: {len(cases)} case(s): {reason}")


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
        "cpu",
    ]
)
def implementation(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(impl, device) of every fast implementation; those that need a GPU are skipped without one."""
    if request.param != "cpu":
        return request.param, "cuda"
    assert BINARY.problem is None, BINARY.problem
    return "cpu", "cpu"


@pytest.fixture(scope="module")
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    """The interpreting process of the test module's `cases`."""
    worker = Worker(Path(request.module.cases.__file__))
    yield worker
    worker.close()
