"""Argument checks shared by apply_rope and qk_norm_rope. Nothing is written before all of them pass."""

from __future__ import annotations

import torch

from saccade._tensors import names
from saccade.rope.spec import RopeSpec

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_POSITION_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


def check_heads(name: str, x: torch.Tensor, spec: RopeSpec) -> None:
    """Check q or k [B, H, S, D] on its own."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor [B, H, S, D], got {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"{name}: expected 4 dimensions [B, H, S, D], got shape {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected dtype {names(*_DTYPES)}, got {names(x.dtype)}")
    if x.shape[3] != spec.head_dim:
        raise ValueError(f"{name}: expected head_dim {spec.head_dim} (spec), got {x.shape[3]}")
    if x.stride(3) != 1 and x.numel() > 0 and x.shape[3] > 1:
        raise ValueError(f"{name}: expected a last dimension of stride 1, got stride {x.stride(3)}; call .contiguous()")
    if x.shape[1] % spec.groups:
        raise ValueError(f"{name}: the spec has {spec.groups} head groups, which do not divide {x.shape[1]} heads")


def check_pair(q: torch.Tensor, k: torch.Tensor | None, spec: RopeSpec) -> None:
    """Check q, and k against q."""
    if not isinstance(spec, RopeSpec):
        raise TypeError(f"spec: expected a RopeSpec, got {type(spec).__name__}")
    check_heads("q", q, spec)
    if k is None:
        return
    check_heads("k", k, spec)
    if k.dtype != q.dtype:
        raise TypeError(f"k: expected the dtype of q, {q.dtype}, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"k: expected the device of q, {q.device}, got {k.device}")
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"k: expected batch and length of q, [{q.shape[0]}, *, {q.shape[2]}, *], got {list(k.shape)}")


def check_positions(positions: torch.Tensor, q: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Check positions and return them as [A, B|1, S]."""
    accepted = f"[{spec.axes}, S] or [{spec.axes}, B, S]" + (" or [S]" if spec.axes == 1 else "")
    if not isinstance(positions, torch.Tensor):
        raise TypeError(f"positions: expected a tensor {accepted}, got {type(positions).__name__}")
    if positions.dtype not in _POSITION_DTYPES:
        raise TypeError(f"positions: expected dtype {names(*_POSITION_DTYPES)}, got {positions.dtype}")
    if positions.requires_grad:
        raise ValueError("positions: gradients of positions are not computed; pass positions.detach()")
    if positions.device != q.device:
        raise ValueError(f"positions: expected the device of q, {q.device}, got {positions.device}")
    given = list(positions.shape)
    if positions.ndim == 1 and spec.axes == 1:
        positions = positions[None]
    if positions.ndim == 2:
        positions = positions[:, None]
    batch, tokens = q.shape[0], q.shape[2]
    if (
        positions.ndim != 3
        or positions.shape[0] != spec.axes
        or positions.shape[1] not in (1, batch)
        or positions.shape[2] != tokens
    ):
        raise ValueError(f"positions: expected {accepted} with B = {batch}, S = {tokens}, got {given}")
    return positions


def _overlaps(x: torch.Tensor) -> bool:
    """Whether two elements may share memory: sorted by stride, each dimension must step over all smaller ones."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def _same_memory(q: torch.Tensor, k: torch.Tensor) -> bool:
    if q.device.type == "meta" or torch.compiler.is_compiling():
        return False
    return q.data_ptr() == k.data_ptr()


def check_inplace(q: torch.Tensor, k: torch.Tensor | None) -> None:
    """Check that q and k may be written."""
    for name, x in (("q", q), ("k", k)):
        if x is None or x.numel() == 0:
            continue
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"inplace: {name} requires grad, and its values are needed for the gradient; use inplace=False or torch.no_grad()"
            )
        if _overlaps(x):
            raise ValueError(
                f"{name}: in place needs elements that do not share memory, got shape {list(x.shape)} with strides {list(x.stride())}"
            )
    if k is not None and q.numel() and k.numel() and _same_memory(q, k):
        raise ValueError("k: in place needs q and k in different memory, they start at the same address")
