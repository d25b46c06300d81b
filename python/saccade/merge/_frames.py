"""Video between text: which tokens are frames, and plans that merge a token with its place in an earlier frame."""

from __future__ import annotations

import math
from typing import Any

import torch

from saccade._arguments import whole
from saccade._dispatch import Impl
from saccade._tensors import names
from saccade.merge._check import check_device, check_values
from saccade.merge.similarity import frame_similarity


def links(
    x: Any, similarity: Any, frames: Any, prefix: Any, suffix: Any, impl: Impl
) -> tuple[torch.Tensor, int, int, int]:
    """Similarity [B, T, P] of each token with its place one frame before (NaN in the first frame), T, and tokens before and after."""
    count, before, after = whole(frames, "frames", 1), whole(prefix, "prefix", 0), whole(suffix, "suffix", 0)
    if (x is None) == (similarity is None):
        raise ValueError(
            "similarity: expected in place of x (None), or x without it; got " + ("both", "neither")[x is None]
        )
    if x is not None:
        x = check_values("x", x)
        video = x.shape[1] - before - after
        if video < 0 or video % count:
            raise ValueError(
                f"frames: {count} frames do not divide the {video} tokens between prefix and suffix "
                f"(x {list(x.shape)}, prefix={before}, suffix={after})"
            )
        alike = frame_similarity(x.detach()[:, before : before + video], count, impl=impl)
    else:
        if not isinstance(similarity, torch.Tensor):
            raise TypeError(f"similarity: expected a tensor [B, T - 1, P], got {type(similarity).__name__}")
        if similarity.ndim != 3 or similarity.shape[1] != count - 1:
            raise ValueError(f"similarity: expected [B, {count - 1}, P], got {list(similarity.shape)}")
        if not similarity.dtype.is_floating_point:
            raise TypeError(f"similarity: expected a float dtype, got {names(similarity.dtype)}")
        alike = similarity.detach()
        alike = alike if alike.dtype == torch.float64 else alike.float()
    first = alike.new_full((alike.shape[0], 1, alike.shape[2]), float("nan"))
    return torch.cat((first, alike), 1), count, before, after


def limit(threshold: Any) -> float:
    """A threshold; infinite ones are in order."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold: expected a number, got {threshold!r} ({type(threshold).__name__})")
    if math.isnan(threshold):
        raise ValueError("threshold: expected a number, got nan")
    return float(threshold)


def video_mask(mask: torch.Tensor, like: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """The frames' part [1|B, T, P] of a mask [1|B, N] over all tokens."""
    check_device("protect", mask, like, "x")
    part: torch.Tensor = mask[:, before : mask.shape[1] - after].unflatten(1, like.shape[1:])
    return part


def scores_and_targets(
    alike: torch.Tensor, root: torch.Tensor, merged: torch.Tensor, before: int, after: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and target [B, N] for `build_plan`: each token (t, p) of `merged` goes to (root, p); all [B, T, P]."""
    places = alike.shape[2]
    place = torch.arange(places, device=alike.device)
    target = torch.where(merged, root * places + place + before, -1).flatten(1)
    score = torch.where(merged, alike, float("-inf")).flatten(1)
    pad = torch.nn.functional.pad
    return pad(score, (before, after), value=float("-inf")), pad(target, (before, after), value=-1)
