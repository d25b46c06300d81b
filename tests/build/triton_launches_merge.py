"""The launches of the token-merging kernels that are cross-compiled: real shapes, every mode that makes another kernel."""

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
MODES = ("mean", "sum", "max", "replace")


def _plan(tokens: int, rows: int) -> tuple[torch.Tensor, ...]:
    """inverse, ptr, members, head"""
    return tuple(torch.zeros(1, n, dtype=torch.int32) for n in (tokens, rows + 1, tokens, rows))


def _match(found: list[Launch]) -> None:
    index = torch.zeros(1, 64, dtype=torch.int32)
    bounds, protect = torch.zeros(1, 64, 2, 2, dtype=torch.int32), torch.zeros(1, 128, dtype=torch.bool)
    for label, channels, dtype, score, ranges, mask in (
        ("c64", 64, F16, 0, None, None),  # ViT, the mean of the heads
        ("c80-protect", 80, BF16, 0, None, protect),  # AuroraCap
        ("c128-ranges", 128, BF16, 0, bounds, None),
        ("c320", 320, F16, 0, None, None),  # diffusion, many blocks of columns
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
    inverse, ptr, members, head = _plan(128, 64)
    total = torch.zeros(1, 64)
    for label, width, dtype, modes in (
        ("d1280", 1280, BF16, MODES),
        ("d768-fp32", 768, F32, ("mean", "max")),
        ("d40", 40, F16, ("mean",)),
        ("d7", 7, BF16, ("mean", "max")),
    ):
        x, y = torch.empty(1, 128, width, dtype=dtype), torch.empty(1, 64, width, dtype=dtype)
        for name in modes:
            mode = MODES.index(name)
            for weight in (None, torch.ones(1, 128)):
                with recording(found, f"{label}/{name}" + ("" if weight is None else "-weighted")):
                    merge.merge(x, weight, ptr, members, head, mode)
                    if weight is None or mode == 0:
                        merge_bwd.merge_bwd(y, x, weight, total, inverse, ptr, members, head, mode)
        for residual, gate in ((None, None), (x, x[:, :1]), (x, None)):
            with recording(found, label + ("" if residual is None else "/residual") + ("" if gate is None else "-gate")):
                unmerge.unmerge(y, inverse, residual, gate)


def _others(found: list[Launch]) -> None:
    for label, width, dtype in (("d3584", 3584, BF16), ("d768-fp32", 768, F32), ("d7", 7, F16)):
        with recording(found, label):
            x, weights = torch.empty(1, 4, 4, 4, width, dtype=dtype), torch.empty(1, 4, 4, 4)
            window = 2, 2, 2, 2, 2, 2, 0.01
            prompt_pool3d.prompt_pool3d(x, weights, *window)
            prompt_pool3d_bwd.prompt_pool3d_bwd(x[:, ::2, ::2, ::2].contiguous(), x, weights, *window)
            rows = x.view(1, 64, width)
            row_similarity.row_similarity(rows, rows)
            knn_density.knn_density(rows, 5)
    with recording(found, "d64"):
        knn_density.knn_density(torch.empty(1, 5000, 64, dtype=BF16), 5)


def launches() -> list[Launch]:
    """Every launch to compile."""
    found: list[Launch] = []
    for record in (_match, _plans, _merges, _others):
        record(found)
    return found
