"""`match`: which tokens are alike, and so which can be merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import torch

from saccade import _dispatch
from saccade._arguments import choice, number, whole
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import float64_refusals, names
from saccade.merge._check import check_device, check_values
from saccade.merge._mergeable import mergeable
from saccade.merge._packed import packed_plan, segments
from saccade.merge._protect import protected
from saccade.merge.order import in_order
from saccade.merge.partition import Alternate, Index, Partition
from saccade.merge.plan import MergePlan
from saccade.reference import match as reference
from saccade.reference import merge_plan as plan_reference
from saccade.reference.match import compute_dtype

__all__ = ["build_plan", "match"]

_SCORES = {"cosine": 0, "dot": 1, "l2": 2}


def _metric(metric: Any, heads: str) -> torch.Tensor:
    if isinstance(metric, torch.Tensor) and metric.ndim == 4:
        check_values("metric", metric, "[B, H, N, C]")
        metric = metric.mean(1) if heads == "mean" else metric.flatten(0, 1)
    return check_values("metric", metric, "[B, N, C]")


def _case(metric: torch.Tensor, *_: Any, **__: Any) -> Case:
    return _dispatch.case_of(metric.detach(), refused=float64_refusals(metric))


def scores_of(
    metric: torch.Tensor,
    lists: tuple[torch.Tensor, torch.Tensor],
    ranges: torch.Tensor | None,
    protect: torch.Tensor | None,
    score: int,
    chosen: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and target [B, N] by the implementation `chosen`."""
    op = reference.match if chosen == "reference" else raw("match", chosen)
    score_of, target = op(metric.detach(), *lists, ranges, protect, score)
    return score_of, target


def build_plan(
    score: torch.Tensor,
    target: torch.Tensor,
    *,
    r: int | None = None,
    threshold: float | None = None,
    whole_batch: bool = False,
    impl: Impl = "auto",
) -> MergePlan:
    """A plan from scores and targets of your own.

    Args:
        score: [B, N] fp32, the higher the sooner merged; NaN never.
        target: [B, N] int32 or int64: the token to merge into, which must itself have a negative target; -1 where a token stays.
            Not checked on a GPU.
        r: tokens merged at most, of each sample, or of all together where `whole_batch`; None for no limit. Where r is given alone and
            fewer have a target, the excess is dropped: first tokens of target -2, then the last (`plan.dropped` counts them).
        threshold: scores below it are not merged.
        whole_batch: whether r counts over all samples together.
        impl: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A `MergePlan`. With r alone it has N - r rows; otherwise it has N, of which `plan.counts` are in use.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> plan = merge.build_plan(torch.tensor([[0.9, 0.0, 0.0]]), torch.tensor([[2, -1, -1]]))
        >>> plan.inverse.tolist(), plan.counts.tolist()
        ([[1, 0, 1]], [2])
    """
    for name, value in (("score", score), ("target", target)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor [B, N], got {type(value).__name__}")
    if not score.dtype.is_floating_point:
        raise TypeError(f"score: expected a float dtype, got {names(score.dtype)}")
    if target.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"target: expected dtype int32 or int64, got {names(target.dtype)}")
    if score.ndim != 2:
        raise ValueError(f"score: expected 2 dimensions [B, N], got shape {list(score.shape)}")
    if target.shape != score.shape:
        raise ValueError(f"target: expected the shape [B, N] of score, {list(score.shape)}, got {list(target.shape)}")
    check_device("target", target, score, "score")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_targets(target)
    return _plan(score, target, r, threshold, whole_batch, impl)


def _check_targets(target: torch.Tensor) -> None:
    """Targets are tokens that stay."""
    tokens = target.shape[1]
    if target.numel() and int(target.max()) >= tokens:
        raise ValueError(f"target: expected tokens below {tokens}, got {int(target.max())}")
    chained = (target >= 0) & (target.gather(1, target.clamp(min=0).long()) >= 0)
    if chained.any():
        b, n = chained.nonzero()[0].tolist()
        goal = int(target[b, n])
        raise ValueError(f"target: token {n} merges into {goal}, which merges into {int(target[b, goal])} itself")


def _plan(
    score: torch.Tensor, target: torch.Tensor, r: int | None, threshold: float | None, whole_batch: bool, impl: Impl
) -> MergePlan:
    tokens = score.shape[1]
    least = _threshold(threshold)
    most = tokens * max(score.shape[0], 1) if r is None else whole(r, "r", 0)
    fixed = r is not None and threshold is None and not whole_batch
    if fixed and most > tokens:
        raise ValueError(f"r: at most the {tokens} tokens can be merged, got {r}")
    rows = tokens - most if fixed else tokens
    wide = score.dtype == torch.float64
    case = _dispatch.case_of(score.detach(), refused=float64_refusals(score))
    chosen = _dispatch.select("merge_plan", impl, case)
    op = plan_reference.merge_plan if chosen == "reference" else raw("merge_plan", chosen)
    values = score if wide else score.float()
    parts = op(values.contiguous(), target.int().contiguous(), rows, most, least, whole_batch)
    inverse, ptr, members, head, counts = parts
    return MergePlan(inverse, ptr, members, head, counts, score)


def _threshold(threshold: float | None) -> float:
    """-inf for none; infinities are thresholds too."""
    if threshold is None:
        return float("-inf")
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise TypeError(f"threshold: expected a number, got {threshold!r} ({type(threshold).__name__})")
    if math.isnan(threshold):
        raise ValueError("threshold: expected a number, got nan")
    return float(threshold)


def _amount(tokens: int, batch: int, r: int | None, ratio: float | None, threshold: float | None) -> int | None:
    """Tokens to merge, None for no limit."""
    if r is not None and ratio is not None:
        raise ValueError("ratio: expected None where r is given")
    if r is not None:
        return whole(r, "r", 0)
    if ratio is not None:
        if not 0 <= number(ratio, "ratio") < 1:
            raise ValueError(f"ratio: expected the share of tokens to merge, 0 <= ratio < 1, got {ratio}")
        return int(tokens * batch * ratio)
    if threshold is None:
        raise ValueError("r: expected a number of tokens to merge, or a ratio or threshold in its place")
    return None


@_dispatch.public_op(_case)
def match(
    metric: torch.Tensor,
    r: int | None = None,
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    partition: Partition = Alternate(),  # noqa: B008  (frozen)
    window: int | tuple[int, ...] | None = None,
    protect: int | Sequence[int] | torch.Tensor | None = None,
    score: Literal["cosine", "dot", "l2"] = "cosine",
    heads: Literal["mean", "per_head"] = "mean",
    order: Literal["position", "similarity", "split"] = "position",
    whole_batch: bool = False,
    share_batch: bool = False,
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
    impl: Impl = "auto",
) -> MergePlan:
    """Match every source with its most similar destination and plan to merge the r most similar (ToMe, arXiv 2210.09461, 3.2).

    No score matrix exists: products are reduced to the best destination as they are formed, in fp32. Ties go to the lowest index.
    A row of zeros has cosine 0 with everything. A row that is not finite (its squared norm in fp32) is never merged, never chosen, and
    reaches no other row; only where it leaves fewer than r tokens to merge does it lose its place (`plan.dropped` counts that).
    The metric gets no gradient.

    Args:
        metric: [B, N, C], fp32, fp16, bf16 (fp64 by the reference), or [B, H, N, C] with `heads`.
        r: tokens to merge in each sample (in all together where `whole_batch`). At most the number of sources that are not
            protected, which the error states.
        ratio: share of the tokens to merge, in place of r; 0 <= ratio < 1.
        threshold: merge only where the score is at least this; r or ratio then is an upper limit.
        partition: which tokens are destinations: `Alternate()`, `Strided(k)`, `Grid(grid, cell)`, `Frames(...)`, `Random(...)`,
            `Index(dst)`.
        window: sources choose among destinations this near: a number of groups (Alternate, Strided), or cells (t, h, w) (Grid). It
            makes the cost proportional to N times the window.
        protect: tokens that are neither merged nor merged into: the first n, a list of positions, or a bool mask [N] or [B, N]. A mask
            on a GPU (or in compiled code) is not read here, so r is not held against it: should too few remain, the last tokens are
            dropped.
        score: "cosine", "dot", or "l2" (minus the squared distance).
        heads: for a metric [B, H, N, C]: "mean" over heads, or "per_head", which plans B * H samples.
        order: of the rows. "position": as the tokens lie. "similarity": unmerged sources, the most similar first, then destinations
            (as ToMe leaves them without a class token). "split": unmerged sources, then destinations, both by position.
        whole_batch: r counts over all samples together, so each merges what it can best spare.
        share_batch: one plan for the whole batch, by the best score that any sample has (VidToMe): for classifier-free guidance.
        cu_seqlens: cumulative lengths [S + 1] of sequences packed in a batch of 1, on the host (a list or CPU tensor). The
            partition, which must fit any length, applies to each; r counts for each. `plan.cu_rows` has the new lengths.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        A `MergePlan`. With r or ratio alone it has N - r rows; with a threshold or `whole_batch` it has N rows, of which
        `plan.counts` are in use, the others padding (no shape depends on data). `plan.compact()` cuts them off.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
        >>> plan = merge.match(x, 1)  # tokens 0 and 1 point the same way
        >>> plan.inverse.tolist()
        [[0, 0, 1, 2]]
    """
    choice(heads, "heads", ("mean", "per_head"))
    metric = _metric(metric, heads)
    choice(order, "order", ("position", "similarity", "split"))
    code = _SCORES[choice(score, "score", tuple(_SCORES))]
    if not isinstance(partition, Partition):
        raise TypeError(
            f"partition: expected Alternate(), Grid(...) or another Partition, got {type(partition).__name__}"
        )
    batch, tokens, _ = metric.shape
    if batch == 0:
        raise ValueError(f"metric: expected at least one sample, got an empty batch {list(metric.shape)}")
    _threshold(threshold)
    chosen = _dispatch.select("match", impl, _case(metric))
    if cu_seqlens is not None:
        if whole_batch or share_batch or order != "position" or window is not None or threshold is not None:
            raise ValueError(
                "cu_seqlens: packed sequences take r or ratio, and none of threshold, window, order, whole_batch, share_batch"
            )
        mask, places = protected(protect, tokens, batch, metric.device)
        amounts = lambda n: _amount(n, 1, r, ratio, None)  # noqa: E731
        return packed_plan(metric, segments(cu_seqlens, metric), partition, amounts, mask, places, code, chosen)
    partition.check(tokens)
    if isinstance(partition, Index):
        partition.check_batch(1 if share_batch else batch)
    lists = partition.lists(tokens, metric.device)
    mask, places = protected(protect, tokens, batch, metric.device)
    samples = batch if whole_batch else 1
    limit = _amount(tokens, samples, r, ratio, threshold)
    clamp = mergeable(partition, tokens, window, mask, places, batch, whole_batch)
    if limit is not None and limit > clamp:
        given = f"r={r}" if r is not None else f"ratio={ratio} ({limit} tokens)"
        raise ValueError(
            f"{'r' if r is not None else 'ratio'}: at most {clamp} of {samples * tokens} tokens can be merged "
            f"({type(partition).__name__} leaves {partition.sources(tokens)} sources a sample for "
            f"{partition.destinations(tokens)} destinations{'' if mask is None else ', without those protected'}), got {given}"
        )
    ranges = None if window is None else partition.ranges(tokens, window, metric.device)
    if share_batch and batch > 1:
        # A token that is not finite in one sample would reach others of it along a plan that another sample made.
        broken = ~metric.detach().to(compute_dtype(metric)).square().sum(-1).isfinite().all(0)
        mask = broken[None] if mask is None else mask | broken
    score_of, target = scores_of(metric, lists, ranges, mask, code, chosen)
    if share_batch and batch > 1:
        score_of, first = score_of.max(0, keepdim=True)
        target = torch.where(broken, -2, target.gather(0, first)).int()
    plan = _plan(score_of, target, limit, threshold, whole_batch, impl)
    return plan if order == "position" else in_order(plan, lists, order)
