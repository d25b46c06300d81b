"""Fake (shape-only) implementations of the rotary ops, for torch.compile and opcheck."""

from __future__ import annotations

from typing import Any

import torch

import saccade._load  # noqa: F401  (defines the ops that the fakes attach to)


def _like(x: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other.new_empty(0) if x is None else torch.empty_like(x)


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def apply_rope(q: torch.Tensor, k: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), _like(k, q)


def apply_rope_(q: torch.Tensor, k: torch.Tensor | None, *_: Any) -> None:
    return None


def rope_freq_grad(q, k, dq, dk, positions, groups, pairs, interleaved):  # type: ignore[no-untyped-def]
    return q.new_empty((positions.shape[0], groups, pairs), dtype=_sum_dtype(q))


def qk_norm_rope(q: torch.Tensor, k: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), _like(k, q)


def qk_norm_rope_(q: torch.Tensor, k: torch.Tensor | None, *_: Any) -> None:
    return None


def qk_norm_rope_bwd(dq, dk, q, k, q_weight, k_weight, *_):  # type: ignore[no-untyped-def]
    weights = (q.new_empty(0 if w is None else w.shape[0], dtype=_sum_dtype(q)) for w in (q_weight, k_weight))
    return torch.empty_like(q), _like(k, q), *weights


FAKES = {
    f.__name__: f for f in (apply_rope, apply_rope_, rope_freq_grad, qk_norm_rope, qk_norm_rope_, qk_norm_rope_bwd)
}

for _name, _fake in FAKES.items():
    torch.library.register_fake(f"saccade::{_name}")(_fake)
