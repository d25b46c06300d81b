"""The specification is tested like an implementation, against brute force that is not ours."""

from __future__ import annotations

import pytest

from saccade._load import BINARY


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
        "cpu",
        "reference",
    ]
)
def every(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(impl, device) of every implementation, the reference too."""
    if request.param in ("cuda", "triton"):
        return request.param, "cuda"
    if request.param == "cpu":
        assert BINARY.problem is None, BINARY.problem
    return request.param, "cpu"
