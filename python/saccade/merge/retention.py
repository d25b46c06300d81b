"""Exactly so many tokens kept, in order of position: static shapes, which serving engines and CUDA graphs need."""

from __future__ import annotations

from typing import Any

import torch

from saccade import _dispatch
from saccade._arguments import number, whole
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import float64_refusals, names
from saccade.merge._check import DTYPES
from saccade.merge.similarity import by_frame, cosines, frame_similarity
from saccade.reference import keep_top as reference

__all__ = ["keep_top", "prune_pairs", "retain", "select"]


def _case(scores: torch.Tensor, *_: Any, **__: Any) -> Case:
    return _dispatch.case_of(scores.detach(), refused=float64_refusals(scores))


@_dispatch.public_op(_case)
def keep_top(scores: torch.Tensor, k: int, *, impl: Impl = "auto") -> torch.Tensor:
    """Indices of the k largest scores of each sample, in order of position.

    Ties go to the lowest index, so the result is one and the same everywhere (`torch.topk` promises neither); NaN counts as less than
    every number. Scores get no gradient.

    Args:
        scores: [B, N], fp32, fp16, bf16 (fp64 by the reference).
        k: how many are kept, 0 to N.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        [B, k] int64, ascending.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> merge.keep_top(torch.tensor([[0.5, 2.0, 0.5, 3.0]]), 3).tolist()
        [[0, 1, 3]]
    """
    if not isinstance(scores, torch.Tensor):
        raise TypeError(f"scores: expected a tensor [B, N], got {type(scores).__name__}")
    if scores.ndim != 2:
        raise ValueError(f"scores: expected 2 dimensions [B, N], got shape {list(scores.shape)}")
    if scores.dtype not in DTYPES:
        raise TypeError(f"scores: expected dtype {names(*DTYPES)}, got {names(scores.dtype)}")
    if whole(k, "k", 0) > scores.shape[1]:
        raise ValueError(f"k: expected at most {scores.shape[1]}, the number of scores of a sample, got {k}")
    chosen = _dispatch.select("keep_top", impl, _case(scores))
    op = reference.keep_top if chosen == "reference" else raw("keep_top", chosen)
    values = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    kept: torch.Tensor = op(values if values.stride(-1) == 1 else values.contiguous(), int(k))
    return kept


def select(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The tokens at `indices`. Differentiable in x (each token is there once, so the gradient has the same bits every time).

    Args:
        x: [B, N, ...], any dtype: features, or positions [B, N].
        indices: [B, K] or [1, K] int64, of `keep_top`, `retain` or `prune_pairs`.

    Returns:
        [B, K, ...].

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> merge.select(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[0, 2]])).tolist()
        [[[1.0], [3.0]]]
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor [B, N, ...], got {type(x).__name__}")
    if x.ndim < 2:
        raise ValueError(f"x: expected 2 dimensions [B, N, ...] or more, got shape {list(x.shape)}")
    if not isinstance(indices, torch.Tensor) or indices.dtype != torch.int64:
        got = names(indices.dtype) if isinstance(indices, torch.Tensor) else type(indices).__name__
        raise TypeError(f"indices: expected a tensor [B, K] int64, got {got}")
    if indices.ndim != 2 or indices.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"indices: expected [{x.shape[0]} or 1, K], got {list(indices.shape)}")
    if indices.device != x.device:
        raise ValueError(f"indices: expected the device of x, {x.device}, got {indices.device}")
    rest = x.shape[2:]
    index = indices.reshape(*indices.shape, *(1,) * len(rest)).expand(x.shape[0], -1, *rest)
    return x.gather(1, index)


def _share(value: Any, name: str) -> float:
    share = float(number(value, name))
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: expected the share of tokens to drop, 0 to 1, got {value}")
    return share


def retain(x: torch.Tensor, frames: int | None = None, *, ratio: float, impl: Impl = "auto") -> torch.Tensor:
    """Keep the tokens that change most from frame to frame (efficient video sampling, EVS, arXiv 2510.14624).

    As serving engines have it, on embeddings; the paper compares pixels, for which give the patches as x. The score of a token is
    1 - cos(it, the token at its place one frame before), infinite in the first frame, which so stays whole. Exactly
    max(P, int(T * P * (1 - ratio))) tokens are kept, whatever the content: the count that placeholders of a prompt are made for. Ties
    go to the earlier token. Tokens that are not finite, or follow one that is not, are the first to go.

    Args:
        x: [B, T * P, C], tokens frame by frame, or [B, T, P, C]; fp32, fp16, bf16 (fp64 by the reference), any strides.
        frames: T; None for x [B, T, P, C].
        ratio: share of the tokens to drop, 0 to 1.
        impl: of the cosines and of the choice.

    Returns:
        [B, K] int64, ascending: for `select`, and for positions along all axes (rotary embeddings keep their meaning).

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 0.0]]])  # the second place changes
        >>> merge.retain(x, 2, ratio=0.25).tolist()
        [[0, 1, 3]]
    """
    x, count = by_frame(x, frames)
    batch, tokens, _ = x.shape
    places = tokens // count
    keep = max(places, int(tokens * (1 - _share(ratio, "ratio"))))
    change = 1 - frame_similarity(x.detach(), count, impl=impl).flatten(1)
    first = change.new_full((batch, places), float("inf"))
    kept: torch.Tensor = keep_top(torch.cat((first, change), 1), keep, impl=impl)
    return kept


def prune_pairs(x: torch.Tensor, frames: int | None = None, *, ratio: float = 0.7, impl: Impl = "auto") -> torch.Tensor:
    """Keep in every second frame what differs from the frame before (DyCoke's token merging over time, arXiv 2411.15024, section 3.2).

    In windows of four frames: frames 4i + 1 and 4i + 3 are compared, place by place, with 4i and 4i + 2, then 4i + 2 with 4i; of each
    such frame the int((1 - ratio) * P) tokens of the lowest cosine are kept (ties: the earlier). All comparisons are of the tokens
    that came. Tokens are dropped, none is averaged.

    DyCoke's published code departs from this in three places: it ranks a frame's tokens by the cosines of another pair, leaves 4i + 2 of
    the last window whole, and drops the last of an odd number of frames.

    Args:
        x: [B, T * P, C], tokens frame by frame, or [B, T, P, C]; fp32, fp16, bf16 (fp64 by the reference), any strides.
        frames: T; None for x [B, T, P, C].
        ratio: share of the tokens of those frames to drop, 0 to 1.
        impl: of the cosines and of the choice.

    Returns:
        [B, K] int64, ascending; K depends on T, P and ratio alone: about 0.475 of all tokens for ratio 0.7. Tokens that are not finite,
        or compared with one that is not, are the first to go.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 0.0]]])  # the second place changes
        >>> merge.prune_pairs(x, 2, ratio=0.5).tolist()
        [[0, 1, 3]]
    """
    x, count = by_frame(x, frames)
    batch, tokens, _ = x.shape
    places = tokens // count
    keep = int((1 - _share(ratio, "ratio")) * places)
    volume = x.detach().unflatten(1, (count, places))
    kept = torch.ones(batch, count, places, device=x.device)
    dropped = 0
    for first, step, apart in ((1, 2, 1), (2, 4, 2)):
        pairs = len(range(first, count, step))
        later, before = volume[:, first::step], volume[:, first - apart :: step][:, :pairs]
        change = -cosines("prune_pairs", later.flatten(0, 1), before.flatten(0, 1), impl)  # views where strides allow
        top = keep_top(change, keep, impl=impl)
        mask = torch.zeros(batch * pairs, places, device=x.device).scatter(1, top, 1.0)
        kept[:, first::step] = mask.unflatten(0, (batch, pairs))
        dropped += pairs * (places - keep)
    result: torch.Tensor = keep_top(kept.flatten(1), tokens - dropped, impl=impl)
    return result
