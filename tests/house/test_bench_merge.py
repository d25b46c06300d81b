"""The merging cases of the benchmark: peers agree, a wrong op is refused, thresholds fail without a measurement."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench import gate
from bench.cases import Problem, Request
from bench.cases import _merge_calls as calls
from bench.cases import _merge_checks as checks
from saccade.merge import Alternate, Grid, MergePlan

R = Request()
SMALL = {
    "match": partial(calls.match, 2, 96, 16, Alternate(), 24, "float32", R),
    "match bf16": partial(calls.match, 1, 96, 16, Alternate(), 24, "bfloat16", R),
    "cells": partial(calls.match, 2, 64, 16, Grid((8, 8), (2, 2)), 24, "float32", R),
    "merge": partial(calls.merge, 2, 96, 24, 24, "float32", "forward", R),
    "merge bf16": partial(calls.merge, 2, 96, 24, 24, "bfloat16", "forward", R),
    "merge backward": partial(calls.merge, 2, 96, 24, 24, "float32", "backward", R),
    "merge + unmerge": partial(calls.there_and_back, 2, 8, 24, 32, "float32", R),
    "pool": partial(calls.pool, (4, 6, 6), (2, 3, 3), 24, "bfloat16", R),
    "frames": partial(calls.frames, 4, 12, 24, "bfloat16", R),
}


def verdicts(problem: Problem, role: str) -> list[bool]:
    expected = problem.expected()
    found = []
    for provider in problem.providers:
        call = provider.make() if provider.role == role else None
        if call is not None and call.outputs is not None:
            found.append(gate.judge(call.outputs(), expected, provider.level).ok)
    return found


@pytest.mark.parametrize("name", SMALL)
def test_ours_and_every_peer_pass_the_gate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    problem = SMALL[name]()
    assert verdicts(problem, "ours") == [True]
    assert all(ok for role in ("eager", "compile", "peer") for ok in verdicts(problem, role))
    for provider in problem.providers:
        for run in provider.make().runs:
            run()


def test_a_wrong_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sends every token to the row beside its own."""
    true = calls.m.merge

    def shifted(x: torch.Tensor, plan: MergePlan, *rest: object, **options: object) -> object:
        return true(x.roll(1, 1), plan, *rest, **options)  # type: ignore[arg-type]

    problem = SMALL["merge"]()
    monkeypatch.setattr(calls.m, "merge", shifted)
    assert verdicts(problem, "ours") == [False]


def test_thresholds_fail_without_a_measurement() -> None:
    for found in (checks.cpu_checks([], {}, lambda *_: None, R), checks.cuda_checks([])):
        assert found and all(c.ok is None for c in found)
