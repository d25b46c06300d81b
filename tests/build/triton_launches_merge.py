"""The launches of the token-merging kernels that are cross-compiled: real shapes, and every mode that makes another kernel."""

from __future__ import annotations

import torch
from triton_launches import Launch, recording

from saccade._triton import (
    keep_top,
    knn_density,
    match,
    merge,
    merge_bwd,
    merge_plan,
    prompt_pool3d,
    prompt_pool3d_bwd,
    row_similarity,
    unmerge,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
MEAN, SUM, MAX, REPLACE = range(4)


def _match(found: list[Launch]) -> None:
    index = torch.zeros(1, 64, dtype=torch.int32)
    bounds, protect = torch.zeros(1, 64, 2, 2, dtype=torch.int32), torch.zeros(1, 128, dtype=torch.bool)
    for label, channels, dtype, score, ranges, mask in (
        ("c64", 64, F16, 0, None, None),  # ViT, the mean of the heads
        ("c80-protect", 80, BF16, 0, None, protect),  # AuroraCap
        ("c128-ranges", 128, BF16, 0, bounds, None),
        ("c320", 320, F16, 1, None, None),  # diffusion, many blocks of columns
        ("c1408-l2-ranges", 1408, BF16, 2, bounds, protect),
        ("c64-dot-fp32", 64, F32, 1, None, None),
        ("c768-fp32", 768, F32, 0, bounds, None),
        ("c7", 7, F16, 2, None, None),
    ):
        with recording(found, label):
            match.match(torch.empty(1, 128, channels, dtype=dtype), index, index, ranges, mask, score)


def _plans(found: list[Launch]) -> None:
    for tokens, whole in ((197, False), (730, True), (4096, False), (4096, True)):
        with recording(found, f"n{tokens}" + ("-whole" if whole else "")):
            score, target = torch.zeros(2, tokens), torch.zeros(2, tokens, dtype=torch.int32)
            merge_plan.merge_plan(score, target, tokens, 8, -1.0, whole)
            if not whole:
                keep_top.keep_top(score, 8)


def _merges(found: list[Launch]) -> None:
    inverse, ptr, members, head = (torch.zeros(1, n, dtype=torch.int32) for n in (128, 65, 128, 64))
    for label, width, dtype, mode, weight in (
        ("d1280-mean", 1280, BF16, MEAN, None),
        ("d1280-mean-weighted", 1280, BF16, MEAN, torch.ones(1, 128)),
        ("d1280-sum-weighted", 1280, BF16, SUM, torch.ones(1, 128)),
        ("d1280-max", 1280, BF16, MAX, None),
        ("d1280-replace-weighted", 1280, BF16, REPLACE, torch.ones(1, 128)),
        ("d768-fp32-mean-weighted", 768, F32, MEAN, torch.ones(1, 128)),
        ("d768-fp32-max-weighted", 768, F32, MAX, torch.ones(1, 128)),
        ("d7-max-weighted", 7, BF16, MAX, torch.ones(1, 128)),
        ("d7-mean", 7, F16, MEAN, None),
    ):
        x, y = torch.empty(1, 128, width, dtype=dtype), torch.empty(1, 64, width, dtype=dtype)
        with recording(found, label):
            _, total, _ = merge.merge(x, weight, ptr, members, head, mode)
            merge_bwd.merge_bwd(y, x, weight, total, inverse, ptr, members, head, mode)
    for label, width, dtype, residual, gate in (
        ("d1280", 1280, BF16, False, False),
        ("d1280-residual", 1280, BF16, True, False),
        ("d1280-gate", 1280, BF16, True, True),
        ("d768-fp32-gate", 768, F32, True, True),
        ("d7-gate", 7, F16, True, True),
    ):
        x, y = torch.empty(1, 128, width, dtype=dtype), torch.empty(1, 64, width, dtype=dtype)
        with recording(found, label):
            unmerge.unmerge(y, inverse, x if residual else None, x[:, :1] if gate else None)


def _rows(found: list[Launch]) -> None:
    for label, width, dtype in (("d3584", 3584, BF16), ("d768-fp32", 768, F32), ("d7", 7, F16)):
        with recording(found, label):
            x, weights = torch.empty(1, 4, 4, 4, width, dtype=dtype), torch.empty(1, 4, 4, 4)
            window = 2, 2, 2, 2, 2, 2, 0.01
            y = prompt_pool3d.prompt_pool3d(x, weights, *window)
            prompt_pool3d_bwd.prompt_pool3d_bwd(y, x, weights, *window)
            row_similarity.row_similarity(x.view(1, 64, width), x.view(1, 64, width))
    for label, width, tokens, dtype in (
        ("d1024", 1024, 576, BF16),
        ("d64-many", 64, 5000, F16),
        ("d64-fp32", 64, 200, F32),
    ):
        with recording(found, label):
            knn_density.knn_density(torch.empty(1, tokens, width, dtype=dtype), 5)


def launches() -> list[Launch]:
    """Every launch to compile, each kernel once."""
    found: list[Launch] = []
    for record in (_match, _plans, _merges, _rows):
        record(found)
    kernels = {repr((e.kernel, e.signature, e.constants, e.aligned, e.options)): e for e in reversed(found)}
    return list(reversed(kernels.values()))
