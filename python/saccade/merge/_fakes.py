"""Fake (shape-only) implementations of the merging ops, for torch.compile and opcheck."""

from __future__ import annotations

from typing import Any

import torch

import saccade._load  # noqa: F401  (defines the ops that the fakes attach to)

Tensor = torch.Tensor


def match(metric: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = metric.shape[:2]
    return metric.new_empty(shape, dtype=torch.float32), metric.new_empty(shape, dtype=torch.int32)


def merge_plan(score: Tensor, target: Tensor, rows: int, *_: Any) -> tuple[Tensor, ...]:
    b, n = score.shape
    shapes = ((b, n), (b, rows + 1), (b, n), (b, rows), (b,))
    return tuple(score.new_empty(shape, dtype=torch.int32) for shape in shapes)


def merge(
    x: Tensor, weight: Tensor | None, ptr: Tensor, members: Tensor, head: Tensor, mode: int
) -> tuple[Tensor, ...]:
    total = x.new_empty((x.shape[0], head.shape[1]), dtype=torch.float32)
    return x.new_empty((x.shape[0], head.shape[1], x.shape[2])), total, torch.empty_like(total)


def merge_bwd(dy: Tensor, x: Tensor | None, weight: Tensor | None, total: Tensor, inverse: Tensor, *_: Any) -> Tensor:
    return dy.new_empty((dy.shape[0], inverse.shape[1], dy.shape[2]))


def unmerge(y: Tensor, inverse: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
    return y.new_empty((y.shape[0], inverse.shape[1], y.shape[2]))


def prompt_pool3d(x: Tensor, weights: Tensor, kt: int, kh: int, kw: int, st: int, sh: int, sw: int, _: float) -> Tensor:
    b, t, h, w, d = x.shape
    return x.new_empty((b, (t - kt) // st + 1, (h - kh) // sh + 1, (w - kw) // sw + 1, d))


def prompt_pool3d_bwd(dy: Tensor, x: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def row_similarity(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def keep_top(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((scores.shape[0], k), dtype=torch.int64)


def knn_density(x: Tensor, k: int) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


FAKES = {
    f.__name__: f
    for f in (
        match,
        merge_plan,
        merge,
        merge_bwd,
        unmerge,
        prompt_pool3d,
        prompt_pool3d_bwd,
        row_similarity,
        keep_top,
        knn_density,
    )
}

for _name, _fake in FAKES.items():
    torch.library.register_fake(f"saccade::{_name}")(_fake)
