"""Token merging: the sizes of the models that use it, against ToMe's semantics in plain torch (eager and compiled) and tomesd.

FLOPs: 2 for every source, destination and channel of a match; 1 for every element of a merge. Bytes: the metric read once, lists and
scores written once; for a merge x read once, the rows written once; an unmerge the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from bench import memory
from bench.cases import Case, Check, Counts, Request
from bench.cases import _merge_calls as call
from bench.cases._merge_sanitize import calls
from bench.rows import Row
from saccade.merge import Alternate, Grid, Partition

BF16, FP32 = "bfloat16", "float32"


def _match(
    name: str, batch: int, tokens: int, channels: int, partition: Partition, share: float, dtype: str, request: Request
) -> Case:
    sources, chosen = partition.sources(tokens), partition.destinations(tokens)
    r = int(tokens * share)
    size = getattr(torch, dtype).itemsize
    counts = Counts(batch * tokens * (channels * size + 24), 2 * batch * sources * chosen * channels, unit=dtype)
    build = partial(call.match, batch, tokens, channels, partition, r, dtype, request)
    return Case("merge", name, "match", "forward", dtype, f"{batch}x{tokens}x{channels}, r {r}", counts, build)


def _merge(name: str, batch: int, tokens: int, width: int, r: int, dtype: str, mode: str, request: Request) -> Case:
    size = getattr(torch, dtype).itemsize
    counts = Counts(batch * (2 * tokens - r) * width * size, batch * tokens * width)
    build = partial(call.merge, batch, tokens, width, r, dtype, mode, request)
    return Case("merge", name, "merge", mode, dtype, f"{batch}x{tokens}x{width}, r {r}", counts, build)  # type: ignore[arg-type]


def _both(batch: int, side: int, width: int, dtype: str, request: Request) -> Case:
    tokens = side * side
    size = getattr(torch, dtype).itemsize
    counts = Counts(batch * 3 * tokens * width * size, batch * tokens * width)
    build = partial(call.there_and_back, batch, side, width, tokens // 2, dtype, request)
    return Case(
        "merge",
        "Stable Diffusion merge + unmerge",
        "unmerge",
        "forward",
        dtype,
        f"{batch}x{tokens}x{width}",
        counts,
        build,
    )


def _whole(tokens: int, channels: int, width: int, dtype: str, request: Request) -> Case:
    size = getattr(torch, dtype).itemsize
    counts = Counts(tokens * channels * size + 3 * tokens * width * size, tokens * tokens // 2 * channels, unit=dtype)
    build = partial(call.whole, tokens, channels, width, tokens // 4, dtype, request)
    return Case("merge", "match + merge + unmerge", "match", "forward", dtype, f"1x{tokens}x{width}", counts, build)


def _pool(width: int, dtype: str, request: Request) -> Case:
    grid, kernel = (32, 24, 24), (2, 3, 3)
    tokens = grid[0] * grid[1] * grid[2]
    size = getattr(torch, dtype).itemsize
    counts = Counts(tokens * width * size * 19 // 18 + tokens * 4, 2 * tokens * width)
    build = partial(call.pool, grid, kernel, width, dtype, request)
    return Case("merge", "PPLLaVA pooling", "prompt_pool3d", "forward", dtype, f"1x{grid}x{width}", counts, build)


def _frames(frames: int, places: int, channels: int, dtype: str, request: Request) -> Case:
    size = getattr(torch, dtype).itemsize
    counts = Counts(frames * places * channels * size, 6 * (frames - 1) * places * channels)
    build = partial(call.frames, frames, places, channels, dtype, request)
    shape = f"1x{frames}x{places}x{channels}"
    return Case("merge", "frame similarity", "row_similarity", "forward", dtype, shape, counts, build)


def cases(request: Request) -> list[Case]:
    """All cases of the family, most important first."""
    alternate, cells = Alternate(), Grid((64, 64), (2, 2))
    if request.quick:
        return [
            _match("ToMe match 1024", 1, 1024, 64, alternate, 0.25, FP32, request),
            _merge("ViT-L merge", 1, 576, 256, 144, FP32, "forward", request),
            _whole(1024, 64, 128, BF16, request),
        ]
    if request.device == "cuda":
        wan = 75600
        return [
            _match("Wan 720p match", 1, wan, 128, alternate, 0.25, BF16, request),
            _whole(4096, 64, 640, BF16, request),
            _merge("Wan 720p merge", 1, wan, 5120, wan // 4, BF16, "forward", request),
            _both(2, 64, 640, BF16, request),
            _match("Stable Diffusion match", 2, 4096, 640, cells, 0.5, BF16, request),
            _match("ToMe match 4096", 1, 4096, 64, alternate, 0.25, BF16, request),
            _match("ToMe match 16384", 1, 16384, 64, alternate, 0.25, BF16, request),
            _merge("Wan 720p merge", 1, wan, 1536, wan // 4, BF16, "backward", request),
            _merge("ViT-L merge", 64, 576, 1024, 144, BF16, "forward", request),
            _pool(4096, BF16, request),
            _frames(32, 196, 3584, BF16, request),
        ]
    return [
        _match("ToMe match 4096", 1, 4096, 64, alternate, 0.25, FP32, request),
        _match("ToMe match 16384", 1, 16384, 64, alternate, 0.25, FP32, request),
        _match("Stable Diffusion match", 2, 4096, 320, cells, 0.5, FP32, request),
        _merge("ViT-L merge", 8, 576, 1024, 144, FP32, "forward", request),
        _both(2, 64, 320, FP32, request),
        _match("ToMe match 4096", 1, 4096, 64, alternate, 0.25, BF16, request),
        _merge("ViT-L merge", 8, 576, 1024, 144, BF16, "forward", request),
        _merge("ViT-L merge", 8, 576, 1024, 144, FP32, "backward", request),
        _pool(1024, FP32, request),
        _pool(1024, BF16, request),
        _frames(32, 196, 3584, FP32, request),
        _frames(32, 196, 3584, BF16, request),
    ]


def checks(rows: Sequence[Row], request: Request) -> list[Check]:
    """The thresholds of the family, from the rows of this run."""
    from bench.cases._merge_checks import cpu_checks, cuda_checks

    if request.device == "cuda":
        return cuda_checks(rows)
    found = {c.name + c.dtype: c for c in cases(request)}
    return cpu_checks(rows, found, memory.peak_extra_fresh, request)


def sanitize(impl: str, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Small awkward calls of every op, for compute-sanitizer."""
    return calls(impl, device)
