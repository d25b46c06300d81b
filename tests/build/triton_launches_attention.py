"""The launches of the attention kernels that are cross-compiled: head dims of real models, and every mode that makes another kernel."""

from __future__ import annotations

from typing import Any

import torch
from triton_launches import Launch, recording

from saccade._triton import (
    attention_bias_grad,
    attention_columns,
    attention_configs,
    attention_rows,
    axial_attention,
    axial_attention_bwd,
    block_pool,
    block_select,
    block_transpose,
    sparse_attention,
    sparse_attention_bwd,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ARCHITECTURES = 80, 89, 90

# head_dim, dtype, block, how blocks are seen in part, order, bias and key bias
SPARSE: dict[str, tuple[int, torch.dtype, int, str, bool, torch.dtype | None, bool]] = {
    "d128-whole": (128, BF16, 128, "", False, None, False),  # sliding tiles, top-k
    "d128-box": (128, BF16, 128, "box", False, None, False),
    "d128-box-order": (128, BF16, 64, "box", True, None, False),
    "d128-bits-bias": (128, BF16, 64, "bits", False, BF16, True),
    "d64-whole": (64, F16, 64, "", False, None, False),
    "d64-box": (64, BF16, 128, "box", False, None, False),
    "d64-bias": (64, F16, 64, "", False, F32, False),  # SwinBERT
    "d32-bits": (32, F16, 64, "bits", False, None, True),
    "d72-key-bias": (72, BF16, 64, "", False, None, True),
    "d80-bits": (80, F16, 64, "bits", False, None, False),
    "d96-order": (96, BF16, 128, "", True, None, False),
    "d256-whole": (256, BF16, 64, "", False, None, False),
    "d256-box": (256, BF16, 128, "box", False, BF16, False),
    "d64-box-fp32": (64, F32, 64, "box", False, None, False),
    "d128-fp32": (128, F32, 64, "", False, None, False),
    "d128-bits-fp32": (128, F32, 64, "bits", True, F32, True),
    "d256-box-fp32": (256, F32, 128, "box", False, None, False),
}
FORWARD_ONLY = "d64-box", "d32-bits", "d128-fp32"


def _tables(block: int, seen: str, order: bool) -> tuple[Any, ...]:
    """Lists and tables of a layout of two blocks, in the order of the schemas."""
    one = torch.zeros(1, 1, 2, dtype=torch.int32)
    positions = torch.zeros(1, 1, 2 * block, dtype=torch.int32) if order else None
    partial = (one, one, one, one if seen == "bits" else None) if seen else (None,) * 4
    bits = torch.zeros(1, block, block // 32, dtype=torch.int32) if seen == "bits" else None
    box, at = (torch.zeros(1, 1, *axes, 2 * block, dtype=torch.int32) for axes in ((2, 3), (3,)))
    return one, one, one, *partial, bits, *((box, at) if seen == "box" else (None, None)), positions, positions


def _sparse(found: list[Launch], architecture: int) -> None:
    for label, (head_dim, dtype, block, seen, order, bias, key_bias) in SPARSE.items():
        tokens = 2 * block
        q = torch.empty(1, tokens, 4, head_dim, dtype=dtype).transpose(1, 2)
        k = torch.empty(1, tokens, 2, head_dim, dtype=dtype).transpose(1, 2)
        layout = _tables(block, seen, order)
        biases = None if bias is None else torch.empty(1, 4, tokens, tokens, dtype=bias), None
        if key_bias:
            biases = biases[0], torch.empty(1, tokens)
        with recording(found, f"sm{architecture}/{label}"):
            _, lse = sparse_attention.sparse_attention(q, k, k, *layout, *biases, block, block, 0.1)
            if label in FORWARD_ONLY:
                continue
            numbers = *biases, block, block, 0.1
            sparse_attention_bwd.sparse_attention_bwd(q, lse, q, k, k, q, lse, *layout, *layout[:7], *numbers)
            if bias is not None:
                attention_bias_grad.attention_bias_grad(q, q, k, k, lse, lse, *layout, *numbers)


# head_dim, dtype, prefix, grid, box, mean
AXIAL: dict[str, tuple[int, torch.dtype, int, tuple[int, int, int], tuple[int, int, int], bool]] = {
    "d64-time": (64, BF16, 1, (8, 2, 2), (8, 1, 1), False),  # Frozen in Time
    "d64-space": (64, F16, 1, (2, 14, 14), (1, 14, 14), True),  # TimeSformer
    "d128-space": (128, BF16, 77, (2, 16, 16), (1, 16, 16), False),  # frames with text
    "d128-window": (128, BF16, 0, (8, 4, 4), (8, 2, 2), False),
    "d72-window": (72, BF16, 0, (16, 4, 4), (16, 4, 4), False),
    "d80-time": (80, F16, 1, (16, 2, 2), (16, 1, 1), True),
    "d96-space": (96, BF16, 1, (2, 12, 12), (1, 12, 12), True),
    "d256-time": (256, BF16, 1, (8, 2, 2), (8, 1, 1), False),
    "d256-space": (256, BF16, 1, (2, 12, 12), (1, 12, 12), True),
    "d64-time-fp32": (64, F32, 1, (8, 2, 2), (8, 1, 1), False),
    "d64-space-fp32": (64, F32, 1, (2, 14, 14), (1, 14, 14), True),
    "d256-time-fp32": (256, F32, 1, (8, 2, 2), (8, 1, 1), True),
    "d256-space-fp32": (256, F32, 3, (2, 12, 12), (1, 12, 12), False),
}


def _axial(found: list[Launch], architecture: int) -> None:
    for label, (head_dim, dtype, prefix, grid, box, mean) in AXIAL.items():
        tokens = prefix + grid[0] * grid[1] * grid[2]
        q = torch.empty(1, tokens, 2, head_dim, dtype=dtype).transpose(1, 2)
        numbers = (prefix, *grid, *box, mean, 0.1)
        with recording(found, f"sm{architecture}/{label}"):
            outputs = axial_attention.axial_attention(q, q, q, *numbers)
            axial_attention_bwd.axial_attention_bwd(q, q, q, q, *outputs, *numbers)


# head_dim, dtype, rows asked for, key bias, causal
MAPS: dict[str, tuple[int, torch.dtype, bool, bool, bool]] = {
    "map-d32": (32, F16, False, False, True),
    "map-d64": (64, BF16, False, False, False),
    "map-d64-rows": (64, F16, True, True, False),
    "map-d72": (72, BF16, False, True, False),
    "map-d80-rows": (80, BF16, True, False, False),
    "map-d96": (96, BF16, False, False, True),
    "map-d128": (128, BF16, False, False, False),
    "map-d128-rows": (128, BF16, True, True, True),
    "map-d256": (256, BF16, False, True, True),
    "map-d64-fp32": (64, F32, False, True, True),
    "map-d128-fp32": (128, F32, True, False, False),
    "map-d256-fp32": (256, F32, False, False, False),
}


def _maps(found: list[Launch], architecture: int) -> None:
    for label, (head_dim, dtype, some, biased, causal) in MAPS.items():
        q = torch.empty(1, 64, 4, head_dim, dtype=dtype).transpose(1, 2)
        k = torch.empty(1, 64, 2, head_dim, dtype=dtype).transpose(1, 2)
        rows = torch.zeros(4, dtype=torch.int32) if some else None
        rest = rows, torch.empty(1, 64) if biased else None, causal, 0.1
        with recording(found, f"sm{architecture}/{label}"):
            lse, _ = attention_rows.attention_rows(q, k, *rest)
            attention_columns.attention_columns(q, k, lse, *rest)


# head_dim, dtype, order
POOLS: dict[str, tuple[int, torch.dtype, bool]] = {
    "pool-d64": (64, BF16, False),
    "pool-d72-order": (72, BF16, True),
    "pool-d128-order": (128, BF16, True),
    "pool-d256": (256, F16, False),
    "pool-d128-fp32": (128, F32, False),
}


def _planning(found: list[Launch], architecture: int) -> None:
    for label, (head_dim, dtype, order) in POOLS.items():
        x = torch.empty(1, 128, 2, head_dim, dtype=dtype).transpose(1, 2)
        positions = torch.zeros(1, 1, 128, dtype=torch.int32) if order else None
        with recording(found, f"sm{architecture}/{label}"):
            block_pool.block_pool(x, positions, 64)
    for blocks in (64, 600, 2000, 4096):
        for name, mode, classes in (
            ("top", 0, False),
            ("top-classes", 0, True),
            ("share", 1, False),
            ("threshold", 2, True),
        ):
            q, k = torch.empty(1, 2, 1, 128), torch.empty(1, 2, blocks, 128)
            kinds = torch.ones(1, 1, 1, blocks, dtype=torch.uint8) if classes else None
            with recording(found, f"sm{architecture}/select-{name}-{blocks}"):
                block_select.block_select(q, k, kinds, mode, 8, 0.5, 0.1)
    lists = torch.zeros(1, 1, 2, dtype=torch.int32)
    for label, ids in (("lists", None), ("lists-ids", lists)):
        with recording(found, f"sm{architecture}/{label}"):
            block_transpose.block_transpose(lists, lists, lists, ids, 2)


RECORDERS = (_sparse, _axial, _maps, _planning)


def launches(architecture: int) -> list[Launch]:
    """Every launch to compile for an architecture, each kernel once."""
    found: list[Launch] = []
    assumed = attention_configs.ASSUMED
    try:
        attention_configs.ASSUMED = architecture
        for record in RECORDERS:
            record(found, architecture)
    finally:
        attention_configs.ASSUMED = assumed
    kernels = {repr((e.kernel, e.signature, e.constants, e.aligned, e.options)): e for e in reversed(found)}
    return list(reversed(kernels.values()))
