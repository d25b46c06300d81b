"""Planners: layouts that follow the content, from pooled queries and keys, on the device and without waiting for it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from saccade import _dispatch
from saccade._arguments import number, whole
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import float64_refusals, names
from saccade.attention import _check
from saccade.attention._compact import by_query_head, four, padded_starts
from saccade.attention.flex import dense_ids
from saccade.attention.layout import BlockLayout, BlockLists
from saccade.reference import block_pool as pool_reference
from saccade.reference import block_select as reference

__all__ = ["from_scores", "threshold", "top_k", "top_p"]

Tensor = torch.Tensor
Block = int | tuple[int, int]
MOST_BLOCKS = {"cuda": 16384, "triton": 4096}


class Frame(NamedTuple):
    """Everything about a plan but its scores."""

    q_len: int
    k_len: int
    q_block: int
    k_block: int
    q_order: Tensor | None
    k_order: Tensor | None
    within: BlockLayout | None
    classes: Tensor | None

    def blocks(self) -> tuple[int, int]:
        """Query and key blocks."""
        q = self.q_len if self.q_order is None else self.q_order.shape[-1]
        k = self.k_len if self.k_order is None else self.k_order.shape[-1]
        return -(-q // self.q_block), -(-k // self.k_block)


def _refusals(q: Tensor, k_blocks: int) -> tuple[tuple[str, str], ...]:
    return float64_refusals(q) or tuple(
        (name, f"takes at most {most} key blocks, got {k_blocks}")
        for name, most in MOST_BLOCKS.items()
        if k_blocks > most
    )


def _case(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Case:
    within, order, block = (kwargs.get(name) for name in ("within", "k_order", "block"))
    if isinstance(within, BlockLayout):
        blocks = within.k_blocks
    else:
        positions = order.shape[-1] if isinstance(order, Tensor) else k.shape[2]
        size = block[1] if isinstance(block, tuple) else block or 64
        blocks = -(-positions // max(int(size), 1))
    return _dispatch.case_of(q.detach(), k.detach(), refused=_refusals(q, blocks))


# ---- what every planner takes ----------------------------------------------------------------------------------------------
def _check_order(name: str, order: Any, block: int, heads: int, batch: int, device: torch.device) -> Tensor | None:
    if order is None:
        return None
    wanted = f"an int32 tensor [1 or {batch}, 1 or {heads}, n * {block}]"
    if not isinstance(order, Tensor):
        raise TypeError(f"{name}: expected {wanted}, got {type(order).__name__}")
    if order.dtype != torch.int32:
        raise TypeError(f"{name}: expected {wanted}, got {names(order.dtype)}")
    sizes = list(order.shape)
    if len(sizes) != 3 or sizes[0] not in (1, batch) or sizes[1] not in (1, heads) or sizes[2] % block:
        raise ValueError(f"{name}: expected {wanted}, got shape {sizes}")
    if order.device != device:
        raise ValueError(f"{name}: expected the device {device}, got {order.device}")
    return order.contiguous()


def _text(length: int, block: int, order: Tensor | None, prefix: int, suffix: int, device: torch.device) -> Tensor:
    """[1|B, 1|H, n] bool: blocks that hold a text token."""
    if order is None:
        order = torch.arange(-(-length // block) * block, device=device)[None, None]
    text = ((order >= 0) & (order < prefix)) | ((order >= length - suffix) & (order < length))
    blocks: Tensor = text.unflatten(-1, (order.shape[-1] // block, block)).any(-1)
    return blocks


def _frame(
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    k_len: int,
    device: torch.device,
    block: Any,
    within: Any,
    always: Any,
    prefix: Any,
    suffix: Any,
    q_order: Any,
    k_order: Any,
) -> Frame:
    """The checked arguments, and the class of every block."""
    prefix, suffix = whole(prefix, "prefix", 0), whole(suffix, "suffix", 0)
    if prefix + suffix > min(q_len, k_len):
        raise ValueError(
            f"prefix, suffix: expected at most the {min(q_len, k_len)} tokens together, got {prefix} and {suffix}"
        )
    if within is None:
        q_block, k_block = _check.check_block(64 if block is None else block)
        q_order = _check_order("q_order", q_order, q_block, heads, batch, device)
        k_order = _check_order("k_order", k_order, k_block, kv_heads, batch, device)
    else:
        if not isinstance(within, BlockLayout):
            raise TypeError(f"within: expected a BlockLayout, got {type(within).__name__}")
        for name, given in (("block", block), ("q_order", q_order), ("k_order", k_order)):
            if given is not None:
                raise ValueError(f"{name}: expected None where `within` is given, which has its own")
        if (within.q_len, within.k_len) != (q_len, k_len):
            raise ValueError(
                f"within: made for {within.q_len} queries and {within.k_len} keys, got {q_len} and {k_len}"
            )
        if within.device != device:
            raise ValueError(f"within: expected the device {device}, got {within.device}; use within.to(...)")
        if within.batch not in (1, batch) or within.heads not in (1, heads):
            raise ValueError(
                f"within: made for {within.batch} samples and {within.heads} heads, expected 1 or {batch} and 1 or {heads}"
            )
        q_block, k_block, q_order, k_order = within.q_block, within.k_block, within.q_order, within.k_order
    frame = Frame(q_len, k_len, q_block, k_block, q_order, k_order, within, None)
    if always is not None:
        always = four("always", always, torch.bool, frame.blocks())
        if always.shape[0] not in (1, batch) or always.shape[1] not in (1, heads):
            raise ValueError(f"always: expected [1 or {batch}, 1 or {heads}, ...], got {list(always.shape)}")
        if always.device != device:
            raise ValueError(f"always: expected the device {device}, got {always.device}")
    if within is None and always is None and not prefix + suffix:
        return frame
    return frame._replace(classes=_classes(frame, always, prefix, suffix, heads, device))


def _classes(frame: Frame, always: Tensor | None, prefix: int, suffix: int, heads: int, device: torch.device) -> Tensor:
    """[1|B, 1|H, nQ, nK] uint8 of `block_select`."""
    if frame.within is None:
        classes = torch.ones(1, 1, *frame.blocks(), dtype=torch.uint8, device=device)
    else:
        seen = frame.within.block_map()  # 1 in part, 2 whole
        classes = torch.where(seen == 0, 0, 3 - seen)
    if prefix + suffix:
        rows = _text(frame.q_len, frame.q_block, frame.q_order, prefix, suffix, device)[..., :, None]
        columns = by_query_head(_text(frame.k_len, frame.k_block, frame.k_order, prefix, suffix, device), heads)[
            ..., None, :
        ]
        text = rows | columns
        always = text if always is None else always | text
    if always is not None:
        classes = torch.where(always & (classes > 0), classes + 2, classes)
    return classes.to(torch.uint8).contiguous()


def _amount(keep: Any, columns: int, least: int = 1) -> int:
    """Blocks that `keep`, a number or a share, stands for."""
    if isinstance(keep, float):
        if not 0.0 <= keep <= 1.0:
            raise ValueError(f"keep: expected a number of blocks, or a share of them between 0.0 and 1.0, got {keep}")
        return max(least, math.floor(keep * columns + 0.5))
    return whole(keep, "keep", least)


def _share(value: Any, name: str) -> float:
    p = float(number(value, name))
    if not 0.0 < p <= 1.0:
        raise ValueError(f"{name}: expected a share, above 0 and at most 1, got {value}")
    return p


def _layout(frame: Frame, lists: tuple[Tensor, Tensor, Tensor, Tensor]) -> BlockLayout:
    counts, indices, p_counts, p_indices = lists
    full = BlockLists(padded_starts(counts, indices.shape[-1]), counts, indices)
    tables: dict[str, Any] = {"q_order": frame.q_order, "k_order": frame.k_order}
    partial, within = None, frame.within
    if within is not None and within.partial is not None:
        ids = None
        if within.bits is not None:
            ids = dense_ids(within).expand(*p_indices.shape[:3], -1).gather(-1, p_indices.long()).int().contiguous()
        partial = BlockLists(padded_starts(p_counts, p_indices.shape[-1]), p_counts, p_indices, ids)
        tables |= {"box": within.box, "at": within.at, "bits": within.bits}
    return BlockLayout(frame.q_len, frame.k_len, frame.q_block, frame.k_block, full, partial, **tables)


def _pooled(name: str, x: Tensor, order: Tensor | None, block: int) -> Tensor:
    op = pool_reference.block_pool if name == "reference" else raw("block_pool", name)
    out: Tensor = op(x.detach(), order, block)
    return out


def _plan(op: str, q: Any, k: Any, mode: int, keep: Any, p: float, scale: Any, impl: Impl, **given: Any) -> BlockLayout:
    q, k = _check.check_qk(q, k)
    (batch, heads, q_len, width), (_, kv_heads, k_len, _) = q.shape, k.shape
    frame = _frame(batch, heads, kv_heads, q_len, k_len, q.device, **given)
    keep = _amount(keep, frame.blocks()[1], 1 if mode == reference.TOP else 0)
    scale = _check.check_scale(scale, width)
    chosen = _dispatch.select(op, impl, _case(q, k, **given))
    means = (
        _pooled(chosen, q, frame.q_order, frame.q_block),
        _pooled(chosen, k, frame.k_order, frame.k_block),
    )
    select = reference.block_select if chosen == "reference" else raw("block_select", chosen)
    return _layout(frame, select(*means, frame.classes, mode, keep, p, scale))


# ---- the planners ----------------------------------------------------------------------------------------------------------
@_dispatch.public_op(_case)
def top_k(
    q: Tensor,
    k: Tensor,
    *,
    keep: int | float,
    block: Block | None = None,
    within: BlockLayout | None = None,
    always: Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> BlockLayout:
    """For every block of queries the `keep` blocks of keys whose mean fits its mean best: the top-k of VSA, MoBA, SLA, SpargeAttn.

        s_IJ = scale * (mean of q in I) . (mean of k in J)        ranked in fp32, the lowest J first among equals

    (Zhang et al. 2025, VSA, arXiv 2505.13389; Lu et al. 2025, MoBA, arXiv 2502.13189.) No map of scores is
    stored and nothing waits for the device: it may be captured in a CUDA graph. Subtracting the mean of all keys first, as SLA does,
    changes nothing, since it moves all scores of a row alike. No gradient reaches q and k.

    Text is exempt, as in VSA's joint layout: every query sees the blocks that hold a text token, and the blocks of text queries see
    everything. Both come on top of `keep`.

    Args:
        q: [B, H, Sq, D], fp32, fp16, bf16 (fp64 by the reference).
        k: [B, Hk, Sk, D]; Hk divides H.
        keep: number of key blocks, or as a float their share of all key blocks (rounded, at least one).
        block: positions of a block, 64 or 128, or (queries, keys). 64 where None.
        within: a static layout: what it does not show is never seen, what it shows in part is seen so, and its blocks and orders hold.
        always: bool [nQ, nK] or [1|B, 1|H, nQ, nK]: blocks that are seen on top of `keep` (as far as `within` shows them). MoBA's own
            block is `torch.eye(n).bool()`; NABLA's window is `sliding_tile(...).block_map() > 0`.
        prefix, suffix: text tokens at the beginning and the end of the queries and of the keys.
        q_order, k_order: as of `BlockLayout`, for instance of `orders.tile_order`; k_order with 1 or Hk heads.
        scale: of q.k; 1 / sqrt(D) where None. The selection of `top_k` does not depend on it.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        A `BlockLayout` of B samples and H heads.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade.attention.plan import top_k
        >>> q, k = torch.randn(2, 1, 4, 300, 64).unbind()
        >>> top_k(q, k, keep=2).counts[0, 0].tolist(), top_k(q, k, keep=2, prefix=10).counts[0, 0].tolist()
        ([2, 2, 2, 2, 2], [5, 3, 3, 3, 3])
    """
    given = dict(
        block=block, within=within, always=always, prefix=prefix, suffix=suffix, q_order=q_order, k_order=k_order
    )
    return _plan("top_k", q, k, reference.TOP, keep, 0.0, scale, impl, **given)


@_dispatch.public_op(_case)
def top_p(
    q: Tensor,
    k: Tensor,
    p: float,
    *,
    keep: int | float = 1,
    block: Block | None = None,
    within: BlockLayout | None = None,
    always: Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> BlockLayout:
    """For every block of queries the fewest blocks of keys that together have the share p of the pooled attention.

    The pooled attention is the softmax of s (see `top_k`) over the blocks that `within` shows, without those that are always seen
    (Mikhailov et al. 2025, NABLA, arXiv 2507.13546; SpargeAttn and SVG2 cut their cumulative share alike). p = 1 takes
    all. Its cost follows the content: read `layout.density`.

    Args:
        p: above 0, at most 1.
        keep: at least so many blocks (or, as a float, this share of all key blocks; SVG2 takes 0.1), also where fewer have the share.
        q, k, block, within, always, prefix, suffix, q_order, k_order, scale, impl: as of `top_k`.

    Example:
        >>> import torch
        >>> from saccade.attention.plan import top_p
        >>> q = k = torch.eye(4).repeat_interleave(64, 0)[None, None].repeat(1, 1, 1, 2)
        >>> top_p(q, k, 0.9, scale=4.0).counts[0, 0].tolist(), top_p(q, k, 0.9, scale=0.0).counts[0, 0].tolist()
        ([1, 1, 1, 1], [4, 4, 4, 4])
    """
    given = dict(
        block=block, within=within, always=always, prefix=prefix, suffix=suffix, q_order=q_order, k_order=k_order
    )
    return _plan("top_p", q, k, reference.SHARE, keep, _share(p, "p"), scale, impl, **given)


@_dispatch.public_op(_case)
def threshold(
    q: Tensor,
    k: Tensor,
    p: float,
    *,
    keep: int | float = 1,
    block: Block | None = None,
    within: BlockLayout | None = None,
    always: Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> BlockLayout:
    """For every block of queries the blocks of keys whose share of the pooled attention is at least p.

    Pooled attention as of `top_p`. A threshold needs no ranking, and lets blocks with broad attention keep more.

    Args:
        p: above 0, at most 1.
        keep: at least so many blocks (or, as a float, this share of all key blocks), also where fewer reach p.
        q, k, block, within, always, prefix, suffix, q_order, k_order, scale, impl: as of `top_k`.

    Example:
        >>> import torch
        >>> from saccade.attention.plan import threshold
        >>> q = k = torch.eye(4).repeat_interleave(64, 0)[None, None].repeat(1, 1, 1, 2)
        >>> threshold(q, k, 0.1, scale=0.5).counts[0, 0].tolist(), threshold(q, k, 0.3, scale=0.5).counts[0, 0].tolist()
        ([4, 4, 4, 4], [1, 1, 1, 1])
    """
    given = dict(
        block=block, within=within, always=always, prefix=prefix, suffix=suffix, q_order=q_order, k_order=k_order
    )
    return _plan("threshold", q, k, reference.THRESHOLD, keep, _share(p, "p"), scale, impl, **given)


def from_scores(
    scores: Tensor,
    *,
    keep: int | float | None = None,
    p: float | None = None,
    threshold: float | None = None,
    q_len: int,
    k_len: int,
    block: Block | None = None,
    within: BlockLayout | None = None,
    always: Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
) -> BlockLayout:
    """A layout from scores of blocks of any origin: antidiagonal sums, a draft map, a small predictor.

    With `keep` alone the best of each row, as `top_k`; with `p` as `top_p`; with `threshold` as `threshold`, `keep` then being the
    least number. For p and threshold scores are logarithms: their softmax is the pooled attention (give probabilities as `x.log()`).
    NaN counts as -inf. torch operations alone, on the device of the scores and without waiting for it.

    Args:
        scores: [nQ, nK] or [1|B, 1|H, nQ, nK], any float dtype.
        keep, p, threshold: one of them, or keep with one of the others.
        q_len, k_len: tokens.
        block, within, always, prefix, suffix, q_order, k_order: as of `top_k`.

    Example:
        >>> import torch
        >>> from saccade.attention.plan import from_scores
        >>> scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
        >>> from_scores(scores, p=0.75, q_len=128, k_len=192).counts.tolist()
        [[[2, 1]]]
    """
    if p is not None and threshold is not None:
        raise ValueError(f"p, threshold: expected one of them, got {p} and {threshold}")
    if keep is None and p is None and threshold is None:
        raise ValueError("keep: expected a number or share of blocks, or p or threshold in its place")
    if not isinstance(scores, Tensor) or not scores.dtype.is_floating_point:
        got = names(scores.dtype) if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: expected a float tensor [nQ, nK] or [B, H, nQ, nK], got {got}")
    if scores.ndim not in (2, 4):
        raise ValueError(f"scores: expected [nQ, nK] or [B, H, nQ, nK], got shape {list(scores.shape)}")
    scores = scores.detach() if scores.ndim == 4 else scores.detach()[None, None]
    scores = scores if scores.dtype == torch.float64 else scores.float()
    batch, heads = scores.shape[:2]
    q_len, k_len = whole(q_len, "q_len", 0), whole(k_len, "k_len", 0)
    frame = _frame(
        batch, heads, heads, q_len, k_len, scores.device, block, within, always, prefix, suffix, q_order, k_order
    )
    if tuple(scores.shape[2:]) != frame.blocks():
        q_blocks, k_blocks = frame.blocks()
        raise ValueError(f"scores: expected [.., {q_blocks}, {k_blocks}] for these lengths, got {list(scores.shape)}")
    if p is not None:
        mode, share = reference.SHARE, _share(p, "p")
    elif threshold is not None:
        mode, share = reference.THRESHOLD, _share(threshold, "threshold")
    else:
        mode, share = reference.TOP, 0.0
    amount = _amount(1 if keep is None else keep, frame.blocks()[1], 1 if mode == reference.TOP else 0)
    return _layout(frame, reference.select_by_scores(scores, frame.classes, mode, amount, share))
