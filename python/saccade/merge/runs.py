"""`merge_runs`: what stays the same from frame to frame becomes one token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saccade._arguments import whole
from saccade._dispatch import Impl
from saccade.merge._frames import limit, links, scores_and_targets, video_mask
from saccade.merge._protect import protected
from saccade.merge.match import build_plan
from saccade.merge.plan import MergePlan
from saccade.merge.retention import keep_top

__all__ = ["merge_runs"]


def merge_runs(
    x: torch.Tensor | None,
    frames: int,
    threshold: float | None = None,
    *,
    r: int | None = None,
    similarity: torch.Tensor | None = None,
    protect: int | Sequence[int] | torch.Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
    impl: Impl = "auto",
) -> MergePlan:
    """Plan to merge runs of alike tokens at one place of consecutive frames into their first (FrameFusion, arXiv 2501.01986, section 3).

    A token is linked to its place in the frame before where their cosine is at least the threshold; a run of links is one row, the mean
    of all its tokens with `merge(x, plan)` (fp32, in order; FrameFusion adds bf16 in place). Similarity is of neighbours, so a run may
    drift. The similarity gets no gradient, values merged do.

    Args:
        x: [B, prefix + T * P + suffix, C], tokens frame by frame, fp32, fp16, bf16 (fp64 by the reference), any strides; None where
            `similarity` is given.
        frames: T.
        threshold: lowest cosine of a link (FrameFusion: 0.6); None for no limit, where r is given.
        r: tokens merged at most, those of the most similar links (ties: the earlier). Alone, it is exact and the plan has N - r rows;
            FrameFusion does so when the threshold would merge more than its budget.
        similarity: [B, T - 1, P], of `frame_similarity` or your own; NaN never links.
        protect: tokens that neither merge nor are merged into: the first n, a list of positions, or a bool mask [N] or [B, N], counted
            from the first token of the prefix. A mask on a GPU is not read here, so r is not held against it.
        prefix, suffix: text tokens before and behind the video; they stay.
        impl: of the ops within; "auto", or one of "cuda", "triton", "cpu", "reference".

    Returns:
        A `MergePlan`, rows by position. With a threshold it has N rows, of which `plan.counts` are in use; with r alone N - r. Should
        fewer than r links be numbers, tokens whose similarity is NaN lose their place, with what merged into them (`plan.dropped`).

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [3.0, 0.0]]])  # two frames of two places
        >>> plan = merge.merge_runs(x, 2, 0.6)
        >>> plan.inverse.tolist(), plan.counts.tolist()
        ([[0, 1, 0, 2]], [3])
        >>> merge.merge(x, plan)[0][0, 0].tolist()
        [2.0, 0.0]
    """
    alike, _, before, after = links(x, similarity, frames, prefix, suffix, impl)
    batch, count, places = alike.shape
    tokens = before + count * places + after
    if threshold is None and r is None:
        raise ValueError("threshold: expected the lowest similarity to merge, or r in its place")
    linked = alike == alike
    linked = linked if threshold is None else linked & (alike >= limit(threshold))
    free, mask = (count - 1) * places, None
    protect_all, _ = protected(protect, tokens, batch, alike.device)
    if protect_all is not None:
        mask = video_mask(protect_all, alike, before, after)
        mask = torch.cat((mask[:, :1], mask[:, 1:] | mask[:, :-1]), 1)  # no link into a token, nor out of it
        linked = linked & ~mask
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            free = int((~mask[:, 1:]).flatten(1).sum(1).min()) if mask.shape[0] else 0
    if r is not None:
        if whole(r, "r", 0) > free:
            raise ValueError(
                f"r: at most {free} of {tokens} tokens have an unprotected place in the frame before, got {r}"
            )
        best = keep_top(torch.where(linked, alike, float("nan")).flatten(1), r, impl=impl)
        among = torch.zeros(batch, count * places, dtype=torch.bool, device=alike.device).scatter(1, best, True)
        linked = linked & among.view_as(linked)
    frame = torch.arange(count, device=alike.device)[:, None]
    root = torch.where(linked, 0, frame).cummax(1).values  # the last frame, up to this one, that does not link
    score, target = scores_and_targets(alike, root, linked, before, after)
    if r is not None and threshold is None:
        unfit = alike.isnan() & (frame > 0)
        unfit = unfit if mask is None else unfit & ~mask
        unfit = torch.nn.functional.pad(unfit.flatten(1), (before, after))
        return build_plan(score, torch.where(unfit, -2, target), r=r, impl=impl)
    return build_plan(score, target, impl=impl)
