"""Argument checks shared by the attention ops. Nothing is computed before all of them pass."""

from __future__ import annotations

from typing import Any

import torch

from saccade._arguments import number, whole
from saccade._tensors import dense_columns, names
from saccade.attention.layout import BLOCKS, BlockLayout

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HEAD_DIMS = range(8, 257, 8)
Tensor = torch.Tensor


def _tensor(name: str, x: Any, form: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {form}, got {type(x).__name__}")
    if x.ndim != form.count(",") + 1:
        raise ValueError(f"{name}: expected {form}, got shape {list(x.shape)}")
    return x


def check_qk(q: Any, k: Any) -> tuple[Tensor, Tensor]:
    """q [B, H, Sq, D] and k [B, Hk, Sk, D] that belong together."""
    q = _tensor("q", q, "[B, H, Sq, D]")
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected dtype {names(*DTYPES)}, got {names(q.dtype)}")
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"q: expected a head_dim that is a multiple of 8 up to 256, got {q.shape[3]}")
    k = _tensor("k", k, "[B, Hk, Sk, D]")
    batch, heads, _, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"k: expected [{batch}, Hk, Sk, {width}] as q has them, got {list(k.shape)}")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides the {heads} of q, got {k.shape[1]}")
    check_like("k", k, q)
    return dense_columns(q), dense_columns(k)


def check_qkv(q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, Sq, D], k and v [B, Hk, Sk, D] that belong together."""
    q, k = check_qk(q, k)
    v = _tensor("v", v, "[B, Hk, Sk, D]")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {list(k.shape)}, got {list(v.shape)}")
    check_like("v", v, q)
    return q, k, dense_columns(v)


def check_like(name: str, x: Tensor, q: Tensor) -> None:
    """`x` has the dtype and device of q."""
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected the dtype of q, {names(q.dtype)}, got {names(x.dtype)}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")


def check_block(block: Any) -> tuple[int, int]:
    """One block for queries and keys, or one for each."""
    pair = block if isinstance(block, (tuple, list)) else (block, block)
    if len(pair) != 2 or any(whole(one, "block") not in BLOCKS for one in pair):
        raise ValueError(
            f"block: expected one of {', '.join(map(str, BLOCKS))}, or one for queries and one for keys, got {block}"
        )
    return int(pair[0]), int(pair[1])


def check_scale(scale: Any, head_dim: int) -> float:
    """`scale`, or 1 / sqrt(head_dim)."""
    return head_dim**-0.5 if scale is None else float(number(scale, "scale"))


def check_bias(bias: Any, q: Tensor, k_len: int) -> Tensor:
    """bias [1|B, 1|H, Sq, Sk] of q's dtype or fp32."""
    bias = _tensor("bias", bias, "[B, H, Sq, Sk]")
    batch, heads, q_len, _ = q.shape
    sizes = list(bias.shape)
    if sizes[0] not in (1, batch) or sizes[1] not in (1, heads) or sizes[2:] != [q_len, k_len]:
        raise ValueError(f"bias: expected [1 or {batch}, 1 or {heads}, {q_len}, {k_len}], got {sizes}")
    if bias.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"bias: expected {names(q.dtype)} or float32, got {names(bias.dtype)}")
    if bias.device != q.device:
        raise ValueError(f"bias: expected the device of q, {q.device}, got {bias.device}")
    return dense_columns(bias)


def check_key_bias(key_bias: Any, q: Tensor, k_len: int) -> Tensor:
    """key_bias [1|B, Sk] as contiguous fp32 (fp64 beside fp64)."""
    key_bias = _tensor("key_bias", key_bias, "[B, Sk]")
    if key_bias.shape[0] not in (1, q.shape[0]) or key_bias.shape[1] != k_len:
        raise ValueError(f"key_bias: expected [1 or {q.shape[0]}, {k_len}], got {list(key_bias.shape)}")
    if not key_bias.dtype.is_floating_point:
        raise TypeError(f"key_bias: expected a float dtype, got {names(key_bias.dtype)}")
    if key_bias.device != q.device:
        raise ValueError(f"key_bias: expected the device of q, {q.device}, got {key_bias.device}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    values: Tensor = key_bias.to(wide)
    return values.contiguous()


def check_layout(layout: Any, q: Tensor, k: Tensor) -> BlockLayout:
    """A layout of the lengths, heads and device of q and k."""
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {type(layout).__name__}")
    if (layout.q_len, layout.k_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"layout: made for {layout.q_len} queries and {layout.k_len} keys, got q with {q.shape[2]} and k with {k.shape[2]}"
        )
    if layout.device != q.device:
        raise ValueError(f"layout: expected the device of q, {q.device}, got {layout.device}; use layout.to(q.device)")
    tables = (layout.full.counts, layout.box, layout.at, layout.q_order)
    for size, axis, what in ((q.shape[0], 0, "samples"), (q.shape[1], 1, "heads")):
        for table in tables:
            if table is not None and table.shape[axis] not in (1, size):
                raise ValueError(f"layout: made for {table.shape[axis]} {what}, expected 1 or the {size} of q")
    order = layout.k_order
    if order is not None and order.shape[0] not in (1, q.shape[0]):
        raise ValueError(f"layout: its k_order is for {order.shape[0]} samples, expected 1 or the {q.shape[0]} of q")
    if order is not None and order.shape[1] not in (1, k.shape[1]):
        raise ValueError(f"layout: its k_order tells {order.shape[1]} heads apart, expected 1 or the {k.shape[1]} of k")
    return layout
