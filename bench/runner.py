"""Runs a case: prepare every provider, hold each against float64, then time those that passed, interleaved."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import gate, memory
from bench.cases import Call, Case, Expected, Provider, Refused, Request
from bench.environment import Nvml
from bench.roofline import Roofs
from bench.rows import Row, complete
from bench.timing import CudaTimer, Effort, Sample, time_cpu


@dataclass
class Session:
    """What stays the same over the cases of one run."""

    request: Request
    roofs: Roofs
    stamp: dict[str, Any]
    run: str
    device_name: str
    effort: Effort = field(default_factory=Effort)
    timer: CudaTimer | None = None
    nvml: Nvml | None = None

    def row(self, case: Case, provider: Provider | None = None, **values: Any) -> Row:
        """A row with everything that the session and the case know."""
        counts = (provider.counts if provider else None) or case.counts
        git, versions = self.stamp["git"], self.stamp["versions"]
        return Row(
            **{
                "run": self.run,
                "time": self.stamp["time"],
                "family": case.family,
                "case": case.name,
                "op": case.op,
                "mode": case.mode,
                "dtype": case.dtype,
                "shape": case.shape,
                "provider": provider.name if provider else "",
                "role": provider.role if provider else "",
                "provider_version": provider.version if provider else "",
                "device": self.device_name,
                "threads": self.request.threads,
                "metric": "time",
                "unit": "ms",
                "bytes": counts.bytes,
                "flops": counts.flops,
                "dense_flops": counts.dense_flops,
                "floor_ms": self.roofs.floor_ms(counts),
                "git_sha": git["sha"],
                "git_dirty": None if git["dirty"] is None else int(git["dirty"]),
                "saccade": versions["saccade"],
                "torch": versions["torch"],
                **values,
            }
        )


def _reason(error: BaseException) -> str:
    """First line, without anything that looks like a path."""
    lines = str(error).strip().splitlines()
    words = " ".join(w for w in (lines[0] if lines else "").split() if not w.lstrip("('\"").startswith("/"))
    return (f"{type(error).__name__}: {words}" if words else type(error).__name__)[:200]


def failure(error: BaseException) -> tuple[str, str]:
    """Status and reason of a provider that did not run: an OOM or a refusal is a row, not a blank."""
    if isinstance(error, Refused):
        return "refused", str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower():
        return "oom", _reason(error)
    if isinstance(error, ImportError):
        return "refused", f"not installed: {_reason(error)}"
    return "error", _reason(error)


def _check(call: Call, expected: Expected, level: str) -> gate.Verdict:
    if call.outputs is None:
        return gate.Verdict(0.0, 0.0)
    outputs = call.outputs()
    return gate.judge(outputs, expected, level)


def _cache(case: Case, request: Request, last_level: int) -> str:
    if request.device == "cuda":
        return ""
    return "streaming (beyond the last-level cache)" if case.counts.bytes > 2 * last_level else "warm"


def run_case(case: Case, session: Session) -> list[Row]:
    """All rows of a case. Never raises for what a provider does."""
    if hasattr(torch, "_dynamo"):
        torch._dynamo.reset()  # no recompilation limits or leftovers from the case before
    try:
        problem = case.build()
        expected = problem.expected()
    except Exception as error:
        status, reason = failure(error)
        return [session.row(case, status=status, reason=f"inputs: {reason}")]
    rows: list[Row] = []
    ready: list[tuple[Row, Provider, Call]] = []
    for provider in problem.providers:
        row = session.row(case, provider)
        rows.append(row)
        call = _prepare(row, provider, expected)
        if call is not None:
            ready.append((row, provider, call))
        _release(session)  # outside the handler: a caught exception holds the memory of its frames
    sets = problem.sets
    del expected
    _release(session)
    try:
        states, samples = _time(case, [c for _, _, c in ready], session, sets)
    except Exception as error:
        for row, _, _ in ready:
            row.status, row.reason = failure(error)
        return rows
    throttled = [s["throttle"] for s in states if s["throttle"] is not None]
    for (row, provider, call), sample in zip(ready, samples, strict=True):
        row.value, row.p20, row.p80 = (sample.quantile(q) for q in (0.5, 0.2, 0.8))
        row.n, row.timer, row.cache = len(sample.times), sample.timer, sample.cache
        row.throttled = int(any(throttled)) if throttled else None
        rows.append(_memory(case, provider, call, session))
    complete(rows, session.roofs.copy_gbps)
    return rows


def _prepare(row: Row, provider: Provider, expected: Expected) -> Call | None:
    """A warm call that passed the gate; None with the reason in its row."""
    try:
        call = provider.make()
        verdict = _check(call, expected, provider.level)
        if call.outputs is not None:
            row.max_error, row.allowed_error = verdict.max_error, verdict.allowed
        if not verdict.ok:
            row.status, row.reason = "wrong", verdict.problem
            return None
        for run in call.runs[:2]:
            run()
        return call
    except Exception as error:
        row.status, row.reason = failure(error)
        return None


def _time(case: Case, calls: Sequence[Call], session: Session, sets: int) -> tuple[list[dict[str, Any]], list[Sample]]:
    """Samples of the calls, and the GPU's states while they ran."""
    states: list[dict[str, Any]] = []
    nvml = session.nvml
    probe = None if nvml is None else (lambda: states.append(nvml.state()))
    if session.timer is not None:
        return states, session.timer.time(calls, session.effort, sets=sets, probe=probe)
    cache = _cache(case, session.request, session.stamp["cpu"]["last_level_cache_bytes"])
    return states, time_cpu(calls, session.effort, cache=cache)


def _memory(case: Case, provider: Provider, call: Call, session: Session) -> Row:
    row = session.row(case, provider, metric="peak_extra_memory", unit="bytes", floor_ms=None)
    try:
        peak = memory.peak_extra(call.runs[0], session.request.device)
    except Exception as error:
        row.status, row.reason = failure(error)
        return row
    if peak is None:
        row.status, row.reason = "refused", "the system does not tell"
    else:
        row.value, row.n = float(peak), 1
    return row


def _release(session: Session) -> None:
    gc.collect()
    if session.request.device == "cuda":
        torch.cuda.empty_cache()
