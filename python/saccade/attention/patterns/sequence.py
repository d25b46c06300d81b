"""Patterns along one sequence: dense, causal, packed segments, media before text."""

from __future__ import annotations

from typing import Any

import torch

from saccade._arguments import choice, whole
from saccade._tensors import names
from saccade.attention._check import check_block
from saccade.attention.boxes import LOW, fill, from_intervals
from saccade.attention.layout import BlockLayout
from saccade.attention.patterns._tokens import check_flag

__all__ = ["causal", "dense", "media_time", "packed"]

Tensor = torch.Tensor
Block = int | tuple[int, int]


def _numbers(length: int, block: int, device: Any) -> Tensor:
    """[1, 1, P] int32: position."""
    positions = -(-length // block) * block
    return torch.arange(positions, dtype=torch.int32, device=device)[None, None]


def dense(q_len: int, k_len: int | None = None, *, block: Block = 64, device: Any = None) -> BlockLayout:
    """Every query sees every key.

    Args:
        q_len, k_len: Sq and Sk; Sk = Sq where None.
        block: 64 or 128, or (of queries, of keys).
        device: of the layout.

    Example:
        >>> float(dense(200).density)
        1.0
    """
    q_block, k_block = check_block(block)
    keys = q_len if k_len is None else k_len
    return BlockLayout.dense(q_len, keys, q_block=q_block, k_block=k_block, device=device or "cpu")


def causal(
    q_len: int, k_len: int | None = None, *, window: int | None = None, block: Block = 64, device: Any = None
) -> BlockLayout:
    """Query i sees keys up to i + Sk - Sq, so that the last query sees the last key; with `window` the last `window` of them.

    Args:
        q_len, k_len: Sq and Sk; Sk = Sq where None. With Sq > Sk the first Sq - Sk queries see nothing.
        window: how many keys a query sees at most (itself included), or None: all.
        block, device: as in `dense`.

    Example:
        >>> causal(3).to_mask()[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    sizes = check_block(block)
    queries = whole(q_len, "q_len", 0)
    keys = queries if k_len is None else whole(k_len, "k_len", 0)
    high = _numbers(queries, sizes[0], device) + (keys - queries + 1)
    low = torch.full_like(high, LOW) if window is None else high - whole(window, "window", 1)
    return from_intervals(low, high, _numbers(keys, sizes[1], device), queries, keys, sizes)


def _offsets(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int32 or int64 tensor [segments + 1], got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {str(value.dtype).removeprefix('torch.')}")
    if value.ndim != 1 or value.numel() < 1:
        raise ValueError(f"{name}: expected [segments + 1] offsets, got shape {list(value.shape)}")
    return value.to(torch.int32).contiguous()


def packed(
    cu_seqlens: Tensor,
    q_len: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    k_len: int | None = None,
    causal: bool = False,
    block: Block = 64,
) -> BlockLayout:
    """Sequences one after another in one row of tokens: each query sees the keys of its own sequence.

    Nothing is read from the device: the offsets may come from a data loader or a kernel, and change inside a CUDA graph.

    Args:
        cu_seqlens: int32 or int64 [n + 1], on the device of the layout: sequence s has queries cu_seqlens[s] to cu_seqlens[s + 1] - 1.
            Ascending, from 0; a sequence may be empty. Queries behind the last one see nothing.
        q_len: Sq, the tokens of the row.
        cu_seqlens_k, k_len: the same for keys; those of the queries where None.
        causal: query i of a sequence of n queries and m keys sees its keys up to i + m - n.
        block: as in `dense`.

    Example:
        >>> packed(torch.tensor([0, 1, 3]), 3).to_mask()[0, 0].int().tolist()
        [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    """
    sizes = check_block(block)
    starts = _offsets(cu_seqlens, "cu_seqlens")
    keys = starts if cu_seqlens_k is None else _offsets(cu_seqlens_k, "cu_seqlens_k")
    if keys.shape != starts.shape:
        raise ValueError(
            f"cu_seqlens_k: expected the shape of cu_seqlens, {list(starts.shape)}, got {list(keys.shape)}"
        )
    if keys.device != starts.device:
        raise ValueError(f"cu_seqlens_k: expected the device of cu_seqlens, {starts.device}, got {keys.device}")
    if (cu_seqlens_k is None) != (k_len is None):
        raise ValueError("k_len: expected together with cu_seqlens_k, or neither of them")
    queries = whole(q_len, "q_len", 0)
    key_count = queries if k_len is None else whole(k_len, "k_len", 0)
    place = _numbers(queries, sizes[0], starts.device)
    segment = torch.searchsorted(starts, place[0, 0].contiguous(), right=True) - 1
    inside = segment < starts.numel() - 1
    segment = segment.clamp(0, max(starts.numel() - 2, 0))
    last = (segment + 1).clamp(max=starts.numel() - 1)
    low, high = keys[segment], keys[last]
    if check_flag(causal, "causal"):
        reach = place[0, 0] - starts[last] + keys[last] + 1
        high = torch.minimum(high, reach)
    low, high = (torch.where(inside, x, 0).to(torch.int32)[None, None] for x in (low, high))
    return from_intervals(low, high, _numbers(key_count, sizes[1], starts.device), queries, key_count, sizes)


def media_time(
    media: Tensor,
    count: int,
    tokens: int,
    *,
    see: str = "latest",
    block: Block = 64,
) -> BlockLayout:
    """Cross-attention from text to the media before it (Alayrac et al. 2022, Flamingo, section 2.3; COSMO).

    Text token i has media time m_i, the number of media markers up to and with it. With see="latest" it sees the tokens of medium m_i
    alone, with see="previous" those of media 1 to m_i. Text before any marker sees nothing: its attention is 0 and its lse -inf.
    Published code fills its row with the mean of all values and sets it to 0 afterwards; and where a text has more markers than media,
    it sees the mean of all. Here it sees nothing.

    Args:
        media: bool [B, Sq] or [Sq], True at the marker of each medium.
        count: media M; the keys are M * tokens, medium by medium.
        tokens: tokens of a medium (Flamingo's resampler gives 64).
        see: "latest" or "previous".
        block: as in `dense`.

    Example:
        >>> media_time(torch.tensor([False, True, False, True]), 2, 1).to_mask()[0, 0].int().tolist()
        [[0, 0], [1, 0], [1, 0], [0, 1]]
    """
    sizes = check_block(block)
    if not isinstance(media, Tensor) or media.dtype != torch.bool:
        what = type(media).__name__ if not isinstance(media, Tensor) else names(media.dtype)
        raise TypeError(f"media: expected a bool tensor [Sq] or [B, Sq], got {what}")
    if media.ndim not in (1, 2):
        raise ValueError(f"media: expected [Sq] or [B, Sq], got shape {list(media.shape)}")
    each, keys = whole(tokens, "tokens", 1), whole(count, "count", 0) * whole(tokens, "tokens", 1)
    time = (media if media.ndim == 2 else media[None]).cumsum(1, dtype=torch.int32)[:, None]
    high = fill(time * each, sizes[0])
    low = (
        (high - each).clamp(min=0) if choice(see, "see", ("latest", "previous")) == "latest" else torch.zeros_like(high)
    )
    return from_intervals(low, high, _numbers(keys, sizes[1], media.device), media.shape[-1], keys, sizes)
