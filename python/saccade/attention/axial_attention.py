"""`axial_attention`: attention along one axis of a grid, or inside windows, with tokens in front that every group sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from saccade import _dispatch
from saccade._arguments import choice, grid_sizes, items, whole
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import dense_columns
from saccade.attention import _check
from saccade.attention.sparse_attention import refusals
from saccade.reference import axial_attention as reference

__all__ = ["axial_attention"]

Tensor = torch.Tensor
Axis = Literal["time", "space", "window"]
_AXES = ("time", "space", "window")
_PREFIX_QUERIES = ("global", "mean")
MOST_TOKENS = 2**31 - 1


def _case(q: Tensor, k: Tensor, v: Tensor, grid: Any, axis: Any = "time", **_: Any) -> Case:
    return _dispatch.case_of(q, k, v, refused=refusals(q))


class _AxialAttention(torch.autograd.Function):
    """Keys of a prefix sum their gradients over the boxes in a fixed order: no atomics, the same bits every time."""

    @staticmethod
    def forward(ctx: Any, q, k, v, static, impl):  # type: ignore[no-untyped-def]
        ctx.static, ctx.impl = static, impl
        out, lse, group_out, group_lse = raw("axial_attention", impl)(q, k, v, *static)
        ctx.save_for_backward(q, k, v, out, lse, group_out, group_lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        dout = dense_columns(dout)
        return *raw("axial_attention_bwd", ctx.impl)(dout, *ctx.saved_tensors, *ctx.static), None, None


def box_of(grid: tuple[int, int, int], axis: Any, window: Any) -> tuple[int, int, int]:
    """The box (t, h, w) that an axis or a window means on a grid, each at least 1."""
    axis = choice(axis, "axis", _AXES)
    if axis != "window":
        if window is not None:
            raise ValueError(f'window: only for axis="window", got {window!r} with axis={axis!r}')
        box = (grid[0], 1, 1) if axis == "time" else (1, grid[1], grid[2])
    else:
        if window is None:
            raise ValueError('window: axis="window" needs (t, h, w), or (h, w) for all frames')
        sizes = items(window, "window")
        if len(sizes) not in (2, 3):
            raise ValueError(f"window: expected (t, h, w), or (h, w) for all frames, got {len(sizes)} sizes")
        box = tuple(whole(n, f"window[{i}]", 1) for i, n in enumerate(sizes))  # type: ignore[assignment]
        if len(box) == 2:
            box = (grid[0], *box)
    t, h, w = (max(1, min(n, size)) for n, size in zip(box, grid, strict=True))
    return t, h, w


@_dispatch.public_op(_case)
def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int, int],
    axis: Axis = "time",
    *,
    window: Sequence[int] | None = None,
    prefix: int = 0,
    prefix_query: Literal["global", "mean"] = "global",
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention inside groups of a grid of tokens, read where they lie: nothing is rearranged, repeated or padded.

    A group is a column of the grid through time ("time"), a frame ("space"), or a window of it. A grid token attends to its group and to
    the prefix. Divided space-time attention is one call along each axis (Bertasius et al. 2021, TimeSformer, arXiv 2102.05095, equations 5
    and 6; Bain et al. 2021, Frozen in Time, arXiv 2104.00650, section 3.1); Seedance (arXiv 2506.09113) has frames, and windows through
    time. Scores and sums are fp32, out is rounded once. A group that holds what is not finite spoils no other. Differentiable, without
    atomics: the same bits every time.

    Args:
        q, k, v: [B, H, S, D], S = prefix + T * H * W, fp32, fp16, bf16 (fp64 by the reference), any strides. D a multiple of 8 up to 256.
        grid: (T, H, W); its tokens follow the prefix in t-major order. Any axis may be the one that varies slowest: a model that keeps
            time fastest passes (H, W, T), and `axis="window"` with window (1, 1, T) for its time.
        axis: "time", "space" or "window".
        window: (t, h, w), or (h, w) for windows through all frames, cut from the origin; those at the far edges are smaller. With
            axis="window" alone.
        prefix: class or text tokens in front of the grid, which every group sees.
        prefix_query: what a prefix token attends to: "global", all S tokens (Frozen in Time); or "mean", the prefix and one group, for
            every group, of which out is the mean (TimeSformer's class token along space).
        scale: of q.k; 1 / sqrt(D) where None.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        out [B, H, S, D] in q's dtype.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade.attention import axial_attention
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 6 * 5, 64).unbind()
        >>> out = axial_attention(q, k, v, (4, 6, 5), "time")
        >>> columns = [x.view(1, 2, 4, 30, 64).transpose(2, 3) for x in (q, k, v)]
        >>> peer = torch.nn.functional.scaled_dot_product_attention(*columns)
        >>> torch.allclose(out, peer.transpose(2, 3).reshape(q.shape), atol=1e-5)
        True
    """
    q, k, v = _check.check_qkv(q, k, v)
    if k.shape != q.shape:
        raise ValueError(f"k: expected the shape of q, {list(q.shape)}, got {list(k.shape)}")
    t, h, w = grid_sizes(grid, "grid")
    prefix = whole(prefix, "prefix", 0)
    if q.shape[2] != prefix + t * h * w:
        raise ValueError(f"q: expected prefix + T * H * W = {prefix + t * h * w} tokens, got {q.shape[2]}")
    if q.shape[2] > MOST_TOKENS:
        raise ValueError(f"q: expected at most {MOST_TOKENS} tokens, got {q.shape[2]}")
    box = box_of((t, h, w), axis, window)
    mean = choice(prefix_query, "prefix_query", _PREFIX_QUERIES) == "mean" and prefix > 0
    static = (prefix, t, h, w, *box, mean, _check.check_scale(scale, q.shape[3]))
    case = _case(q, k, v, grid)
    chosen = _dispatch.select("axial_attention", impl, case)
    if chosen == "reference":
        return reference.axial_attention(q, k, v, *static)[0]
    if case.needs_grad:
        return _AxialAttention.apply(q, k, v, static, chosen)  # type: ignore[no-any-return]
    return raw("axial_attention", chosen)(q, k, v, *static)[0]  # type: ignore[no-any-return]
