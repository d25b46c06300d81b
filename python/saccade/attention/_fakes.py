"""Fake (shape-only) implementations of the attention ops, for torch.compile and opcheck."""

from __future__ import annotations

from typing import Any

import torch

import saccade._load  # noqa: F401  (defines the ops that the fakes attach to)

Tensor = torch.Tensor


def _like(x: Tensor) -> Tensor:
    """Laid out as x, with a last stride of 1."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 or y.shape[-1] <= 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _floats(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def sparse_attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q), _floats(q, *q.shape[:3])


def sparse_attention_bwd(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    key_bias = rest[-4]
    dkey_bias = _floats(q, 0) if key_bias is None else _floats(q, q.shape[0], q.shape[1], k.shape[2])
    return _like(q), _like(k), _like(v), dkey_bias, _floats(q, *q.shape[:3])


def attention_bias_grad(*arguments: Any) -> Tensor:
    bias: Tensor = arguments[-5]
    return bias.new_empty(bias.shape)


def block_pool(x: Tensor, order: Tensor | None, block: int) -> Tensor:
    blocks = -(-x.shape[2] // block) if order is None else order.shape[2] // block
    return _floats(x, x.shape[0], x.shape[1], blocks, x.shape[3])


def block_select(q: Tensor, k: Tensor, classes: Tensor | None, mode: int, keep: int, *_: Any) -> tuple[Tensor, ...]:
    width = min(keep, k.shape[2]) if classes is None and mode == 0 else k.shape[2]
    counts, rows = q.shape[:3], (*q.shape[:3], width)
    partial = ((0,), (0,)) if classes is None else (counts, rows)
    shapes = (counts, rows, *partial)
    return tuple(q.new_empty(shape, dtype=torch.int32) for shape in shapes)


def block_transpose(
    starts: Tensor, counts: Tensor, indices: Tensor, ids: Tensor | None, columns: int
) -> tuple[Tensor, ...]:
    lists = starts.new_empty((*starts.shape[:2], columns))
    entries = starts.new_empty(indices.numel())
    return lists, torch.empty_like(lists), entries, starts.new_empty(0 if ids is None else indices.numel())


def attention_rows(q: Tensor, k: Tensor, rows: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], q.shape[2] if rows is None else rows.shape[0])
    return _floats(q, *shape), _floats(q, *shape)


def attention_columns(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return _floats(q, *q.shape[:2], k.shape[2])


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: int,
    t: int,
    h: int,
    w: int,
    bt: int,
    bh: int,
    bw: int,
    mean: bool,
    _: float,
) -> tuple[Tensor, ...]:
    boxes = -(-t // bt) * -(-h // bh) * -(-w // bw)
    terms = (*q.shape[:2], boxes, prefix) if mean else (0,)
    group_out = _floats(q, *terms, q.shape[3]) if mean else _floats(q, 0)
    return _like(q), _floats(q, *q.shape[:3]), group_out, _floats(q, *terms)


def axial_attention_bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


_ATTENTION = sparse_attention, sparse_attention_bwd, attention_bias_grad
_PLANNING = block_pool, block_select, block_transpose
_AXIAL = axial_attention, axial_attention_bwd
_MAPS = attention_rows, attention_columns
FAKES = {f.__name__: f for f in (*_ATTENTION, *_PLANNING, *_AXIAL, *_MAPS)}

for _name, _fake in FAKES.items():
    torch.library.register_fake(f"saccade::{_name}")(_fake)
