"""`static_windows`: the cut of a video into windows in which most stands still."""

from __future__ import annotations

import torch

from saccade._arguments import whole
from saccade._dispatch import Impl
from saccade.merge._frames import limit, links, scores_and_targets
from saccade.merge.match import build_plan
from saccade.merge.plan import MergePlan

__all__ = ["static_windows"]


def static_windows(
    x: torch.Tensor | None,
    frames: int,
    threshold: float = 0.8,
    *,
    max_window: int | None = None,
    similarity: torch.Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, MergePlan]:
    """Cut a video into windows, merge in each what stands still (HoliTom, arXiv 2505.21334, section 3.2).

    A place is static in the window of frames [s, e] where all cosines of consecutive frames in it exceed the threshold; merging it spares
    e - s tokens. The windows are those that spare most in all, by dynamic programming over the frames:

        best(e) = max over s of best(s - 1) + (e - s) * |static places of [s, e]|

    (ties: the shorter last window). HoliTom waits for the GPU at every step of this; here it stays on the device, for all samples at once,
    in time T * P * log(P) + T^2. The similarity gets no gradient, values merged do.

    Args:
        x: [B, prefix + T * P + suffix, C], tokens frame by frame, fp32, fp16, bf16 (fp64 by the reference), any strides; None where
            `similarity` is given.
        frames: T.
        threshold: cosines above it (not at it) are of the same thing.
        max_window: longest window, in frames; None for any.
        similarity: [B, T - 1, P], of `frame_similarity` or your own; NaN is never static.
        prefix, suffix: text tokens before and behind the video; they stay.
        impl: of the ops within; "auto", or one of "cuda", "triton", "cpu", "reference".

    Returns:
        (window [B, T] int64, the number of each frame's window; plan). The plan merges the static tokens of each window into its first
        frame, with `merge(x, plan)` as their mean; it has N rows, of which `plan.counts` are in use.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> alike = torch.tensor([[[0.9, 0.9], [0.1, 0.2], [0.9, 0.5]]])  # 4 frames of 2 places; a cut between the second and third
        >>> window, plan = merge.static_windows(None, 4, 0.8, similarity=alike)
        >>> window.tolist(), plan.inverse.tolist()
        ([[0, 0, 1, 1]], [[0, 1, 0, 1, 2, 3, 2, 4]])
    """
    alike, _, before, after = links(x, similarity, frames, prefix, suffix, impl)
    batch, count, _ = alike.shape
    longest = count if max_window is None else min(whole(max_window, "max_window", 1), count)
    same = alike > limit(threshold)
    frame = torch.arange(count, device=alike.device)
    run = frame[:, None] - torch.where(same, 0, frame[:, None]).cummax(1).values  # links that end here without a gap
    start = _starts(_lengths(run, longest))
    window = (start == frame).long().cumsum(1) - 1
    last = torch.where(start.diff(dim=1, append=start.new_full((batch, 1), -1)) != 0, frame, count)
    end = last.flip(1).cummin(1).values.flip(1)
    still = run.gather(1, end[..., None].expand_as(run)) >= (end - start)[..., None]
    merged = still & (frame > start)[..., None]
    score, target = scores_and_targets(alike, start[..., None], merged, before, after)
    return window, build_plan(score, target, impl=impl)


def _lengths(run: torch.Tensor, longest: int) -> torch.Tensor:
    """[B, T] int64: frames of the best window that ends at each frame, given what went before; run is [B, T, P]."""
    batch, count, places = run.shape
    links = torch.arange(longest, device=run.device)  # of a window of 1, 2, ... frames
    shorter = torch.searchsorted(run.sort(-1).values, links.expand(batch, count, longest).contiguous())
    spared = (places - shorter) * links  # [B, T, longest]
    best = run.new_zeros(batch, count + 1)
    length = run.new_zeros(batch, count)
    for i in range(count):
        room = min(i + 1, longest)
        total = best[:, i + 1 - room : i + 1].flip(1) + spared[:, i, :room]
        length[:, i] = total.argmax(1)  # the first of equals: the shortest
        best[:, i + 1] = total.amax(1)
    return length + 1


def _starts(length: torch.Tensor) -> torch.Tensor:
    """[B, T] int64: first frame of the window that each frame is in, walking back from the last."""
    start = torch.empty_like(length)
    current = torch.full_like(length[:, 0], length.shape[1])
    for i in reversed(range(length.shape[1])):
        current = torch.where(current > i, i + 1 - length[:, i], current)
        start[:, i] = current
    return start
