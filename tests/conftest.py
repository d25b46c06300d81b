"""Fixtures and the report of what could not run here."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade import _dispatch

_NOT_RUN: list[str] = []


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
        _NOT_RUN.append(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name everything that was not covered on this machine."""
    if not _NOT_RUN:
        return
    terminalreporter.section("not covered on this machine")
    for line in _NOT_RUN:
        terminalreporter.write_line(line)


def available(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """Fast implementations that can run here on plain tensors of `device`."""
    index = torch.cuda.current_device() if device == "cuda" else 0
    case = _dispatch.Case(device, dtype, 128, _dispatch.capability(index) if device == "cuda" else None)
    return [name for name in ("cuda", "triton", "cpu") if _dispatch.PREDICATES[name](case) is None]


@pytest.fixture(params=["cuda", "triton", "cpu", "reference"])
def implementation(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(impl, device) of every implementation; those that need a GPU are skipped without one."""
    name = request.param
    device = "cuda" if name in ("cuda", "triton") else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name} not run: no CUDA GPU")
    if name == "cpu":
        assert saccade._load.BINARY.problem is None, saccade._load.BINARY.problem
    return name, device
