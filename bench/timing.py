"""Clocks. All competitors of a case are timed in one run, interleaved: A B C A B C ..., so that drift hits them alike.

CPU: `time.perf_counter` around each call. CUDA: events around each call, the L2 cache emptied before it by reading a large
buffer (reading leaves clean lines; writing would leave the timed kernel their write-back). Kernels under ~100 us: a CUDA graph
of many calls over rotated buffers, timed as a whole, because events and launches cost microseconds themselves.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.cases import Call

GRAPH_BELOW_MS = 0.1
GRAPH_CALLS = 20


@dataclass
class Sample:
    """Times of one competitor in milliseconds, and how they were taken."""

    timer: str
    cache: str
    times: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        """Quantile with linear interpolation; NaN without times."""
        if not self.times:
            return float("nan")
        ordered = sorted(self.times)
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Effort:
    """How long to measure a case: rounds that fit `seconds`, within limits."""

    seconds: float = 6.0
    least: int = 7
    most: int = 100

    def rounds(self, round_seconds: float) -> int:
        """Number of rounds for a measured duration of one."""
        return max(self.least, min(self.most, int(self.seconds / max(round_seconds, 1e-9))))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def time_cpu(
    calls: Sequence[Call],
    effort: Effort,
    *,
    cache: str = "",
    clock: Callable[[], float] = time.perf_counter,
    probe: Callable[[], Any] | None = None,
) -> list[Sample]:
    """Time calls on the CPU; they are expected to be warm. Results are released outside the clock."""
    samples = [Sample("perf_counter", cache) for _ in calls]
    with _no_garbage_collection():
        start = clock()
        rounds, done = 1, 0
        while done < rounds:
            for call, sample in zip(calls, samples, strict=True):
                run = call.runs[done % len(call.runs)]
                begin = clock()
                result = run()
                sample.times.append((clock() - begin) * 1e3)
                del result
            done += 1
            if done == 1:
                rounds = effort.rounds(clock() - start)
            if probe is not None and done in (1, rounds // 2):
                probe()
    return samples


class CudaTimer:
    """Times calls on the current CUDA device."""

    def __init__(self) -> None:
        self.l2_bytes = int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
        # Long enough to hide the launch of the call behind it, large enough to empty the cache.
        self._buffer = torch.ones(max(4 * self.l2_bytes, 1 << 29) // 4, device="cuda")
        self._sink: torch.Tensor | None = None

    def flush(self) -> None:
        """Empty the L2 cache, leaving clean lines of the buffer."""
        self._sink = self._buffer.sum()

    def events(
        self, calls: Sequence[Call], effort: Effort, *, probe: Callable[[], Any] | None = None, least: int | None = None
    ) -> list[Sample]:
        """Cold times of single calls, by events."""
        marks: list[list[tuple[Any, Any]]] = [[] for _ in calls]
        torch.cuda.synchronize()
        with _no_garbage_collection():
            start = time.perf_counter()
            rounds, done = least or 1, 0
            while done < rounds:
                for call, own in zip(calls, marks, strict=True):
                    run = call.runs[done % len(call.runs)]
                    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    self.flush()
                    before.record()
                    result = run()
                    after.record()
                    own.append((before, after))
                    del result
                done += 1
                if done == 1 and least is None:
                    torch.cuda.synchronize()
                    rounds = effort.rounds(time.perf_counter() - start)
                if probe is not None and done in (1, rounds // 2):
                    probe()  # the device is still busy with this round
        torch.cuda.synchronize()
        return [Sample("cuda events", "cold (flushed)", [a.elapsed_time(b) for a, b in own]) for own in marks]

    def capture(self, call: Call) -> tuple[Any, int]:
        """A CUDA graph of `GRAPH_CALLS` or more calls over all buffer sets in turn, and their number."""
        count = max(GRAPH_CALLS, len(call.runs))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for run in call.runs[:2]:
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call.runs[i % len(call.runs)]() for i in range(count)]  # alive: outputs rotate too
        del kept
        graph.replay()
        torch.cuda.synchronize()
        return graph, count

    def graphs(
        self,
        captured: Sequence[tuple[Any, int]],
        effort: Effort,
        *,
        sets: int = 1,
        probe: Callable[[], Any] | None = None,
    ) -> list[Sample]:
        """Times per call of captured graphs, replayed in turn."""
        cache = f"cold (rotated over {sets} sets)" if sets > 1 else "hot"
        marks: list[list[tuple[Any, Any]]] = [[] for _ in captured]
        torch.cuda.synchronize()
        with _no_garbage_collection():
            start = time.perf_counter()
            rounds, done = 1, 0
            while done < rounds:
                for (graph, _), own in zip(captured, marks, strict=True):
                    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    if sets > 1:
                        self.flush()
                    else:
                        graph.replay()  # unclocked: warms the cache and hides the launch
                    before.record()
                    graph.replay()
                    after.record()
                    own.append((before, after))
                done += 1
                if done == 1:
                    torch.cuda.synchronize()
                    rounds = effort.rounds(time.perf_counter() - start)
                if probe is not None and done in (1, rounds // 2):
                    probe()
        torch.cuda.synchronize()
        return [
            Sample(f"cuda graph of {count}", cache, [a.elapsed_time(b) / count for a, b in own])
            for (_, count), own in zip(captured, marks, strict=True)
        ]

    def time(
        self,
        calls: Sequence[Call],
        effort: Effort,
        *,
        sets: int = 1,
        probe: Callable[[], Any] | None = None,
    ) -> list[Sample]:
        """Events; where the fastest call is short, graphs for all that can be captured, events for the others."""
        first = self.events(calls, effort, least=3)
        if not first or min(s.quantile(0.5) for s in first) >= GRAPH_BELOW_MS:
            return self.events(calls, effort, probe=probe)
        graphs: dict[int, tuple[Any, int]] = {}
        for i, call in enumerate(calls):
            if not call.capturable:
                continue
            try:
                graphs[i] = self.capture(call)
            except RuntimeError:  # an operation that must not be captured: it keeps its events, and its label says so
                torch.cuda.synchronize()
        by_graph = self.graphs(list(graphs.values()), effort, sets=sets, probe=probe) if graphs else []
        others = [i for i in range(len(calls)) if i not in graphs]
        by_events = self.events([calls[i] for i in others], effort) if others else []
        found = dict(zip(graphs, by_graph, strict=True)) | dict(zip(others, by_events, strict=True))
        return [found[i] for i in range(len(calls))]
