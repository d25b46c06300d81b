"""The Triton twins as torch ops: saccade::<op>_triton, with the schema of saccade::<op>."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from saccade._triton.apply_rope import apply_rope, apply_rope_
from saccade._triton.attention_bias_grad import attention_bias_grad
from saccade._triton.attention_columns import attention_columns
from saccade._triton.attention_rows import attention_rows
from saccade._triton.axial_attention import axial_attention
from saccade._triton.axial_attention_bwd import axial_attention_bwd
from saccade._triton.block_pool import block_pool
from saccade._triton.block_select import block_select
from saccade._triton.block_transpose import block_transpose
from saccade._triton.keep_top import keep_top
from saccade._triton.knn_density import knn_density
from saccade._triton.launch import empty_like
from saccade._triton.match import match
from saccade._triton.merge import merge
from saccade._triton.merge_bwd import merge_bwd
from saccade._triton.merge_plan import merge_plan
from saccade._triton.prompt_pool3d import prompt_pool3d
from saccade._triton.prompt_pool3d_bwd import prompt_pool3d_bwd
from saccade._triton.qk_norm_rope import qk_norm_rope, qk_norm_rope_, qk_norm_rope_bwd
from saccade._triton.rope_freq_grad import rope_freq_grad
from saccade._triton.row_similarity import row_similarity
from saccade._triton.sparse_attention import sparse_attention
from saccade._triton.sparse_attention_bwd import sparse_attention_bwd
from saccade._triton.unmerge import unmerge

ROPE = apply_rope, apply_rope_, rope_freq_grad, qk_norm_rope, qk_norm_rope_, qk_norm_rope_bwd
MERGE = (
    match, merge_plan, merge, merge_bwd, unmerge, prompt_pool3d, prompt_pool3d_bwd, row_similarity, keep_top, knn_density,
)  # fmt: skip
ATTENTION = sparse_attention, sparse_attention_bwd, attention_bias_grad, axial_attention, axial_attention_bwd
PLANNING = block_pool, block_select, block_transpose, attention_rows, attention_columns
OPS = {f.__name__: f for f in (*ROPE, *MERGE, *ATTENTION, *PLANNING)}

_library: torch.library.Library | None = None  # ops live as long as it does


def _like(x, other):
    return other.new_empty(0) if x is None else empty_like(x)


def _fake_forward(q, k, *_):
    return empty_like(q), _like(k, q)


def _fake_in_place(q, k, *_):
    return None


def _fake_freq_grad(q, k, dq, dk, positions, groups, pairs, interleaved):
    return q.new_empty((positions.shape[0], groups, pairs), dtype=torch.float32)


def _fake_backward(dq, dk, q, k, q_weight, k_weight, *_):
    weights = (q.new_empty(0 if w is None else w.shape[0], dtype=torch.float32) for w in (q_weight, k_weight))
    return empty_like(q), _like(k, q), *weights


FAKES = {
    "apply_rope": _fake_forward,
    "apply_rope_": _fake_in_place,
    "rope_freq_grad": _fake_freq_grad,
    "qk_norm_rope": _fake_forward,
    "qk_norm_rope_": _fake_in_place,
    "qk_norm_rope_bwd": _fake_backward,
}


def register(fakes: Mapping[str, Callable[..., Any]] | None = None) -> None:
    """Define and implement the ops, once: for CUDA tensors, and for CPU tensors where Triton interprets.

    `fakes` has, by name, those of the ops whose results here are shaped and strided as everywhere else.
    """
    global _library
    if _library is not None:
        return
    from saccade._load import schemas

    table, known = schemas(), {**(fakes or {}), **FAKES}
    library = torch.library.Library("saccade", "FRAGMENT")
    for name, function in OPS.items():
        arguments = table[name].partition("(")[2]
        library.define(f"{name}_triton({arguments}")
        library.impl(f"{name}_triton", function, "CUDA")
        if os.environ.get("TRITON_INTERPRET") == "1":
            library.impl(f"{name}_triton", function, "CPU")
        if name in known:
            torch.library.register_fake(f"saccade::{name}_triton", known[name], lib=library)
    _library = library
