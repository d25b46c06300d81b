"""Argument checks shared by the merging ops. Nothing is computed before all of them pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from saccade._tensors import dense_columns, names

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_values(name: str, x: Any, form: str = "[B, N, D]") -> torch.Tensor:
    """`x` as it came, a float tensor of the dimensions of `form` whose last stride is 1 (a copy where it is not)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {form}, got {type(x).__name__}")
    dims = form.count(",") + 1
    if x.ndim != dims:
        raise ValueError(f"{name}: expected {dims} dimensions {form}, got shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected dtype {names(*DTYPES)}, got {names(x.dtype)}")
    return dense_columns(x)


def check_like(name: str, x: Any, like: torch.Tensor, of: str, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of `shape`, with the dtype and device of `like`, which is argument `of`."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {list(shape)}, got {type(x).__name__}")
    if list(x.shape) != list(shape):
        raise ValueError(f"{name}: expected {list(shape)}, got {list(x.shape)}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected the dtype of {of}, {names(like.dtype)}, got {names(x.dtype)}")
    check_device(name, x, like, of)
    return dense_columns(x)


def check_device(name: str, x: torch.Tensor, like: torch.Tensor, of: str) -> None:
    """`x` is where `like` is."""
    if x.device != like.device:
        raise ValueError(f"{name}: expected the device of {of}, {like.device}, got {x.device}")


def check_weights(name: str, x: Any, plan_batch: int, tokens: int, like: torch.Tensor, of: str) -> torch.Tensor:
    """Weights or sizes [B, N] or [B, N, 1] as a contiguous fp32 (fp64 beside fp64) tensor [1|B, N]."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor [B, N, 1] or None, got {type(x).__name__}")
    given = list(x.shape)
    if x.ndim == 3 and x.shape[2] == 1:
        x = x[..., 0]
    if x.ndim != 2 or x.shape[1] != tokens or x.shape[0] not in (1, plan_batch):
        raise ValueError(f"{name}: expected [{plan_batch}, {tokens}, 1] or [{plan_batch}, {tokens}], got {given}")
    if not x.dtype.is_floating_point and x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected a float or whole-number dtype, got {names(x.dtype)}")
    check_device(name, x, like, of)
    weights: torch.Tensor = x.detach().to(torch.float64 if like.dtype == torch.float64 else torch.float32)
    return weights.contiguous()
