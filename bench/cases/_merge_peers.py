"""Token merging as published code does it, in plain torch, for timing and as the oracle of the gate.

Written from the semantics (ToMe, arXiv 2210.09461): normalise, a score matrix, its maximum, a sort, gathers and a scatter.
"""

from __future__ import annotations

from typing import Any

import torch

Lists = tuple[torch.Tensor, torch.Tensor]
_ROWS = 1024  # of the float64 score matrix at once


def _match(a: torch.Tensor, b: torch.Tensor, r: int) -> Any:
    """Score and place of the best destination [B, A], sources to keep and to merge, and the destinations of the latter."""
    best, place = (a @ b.mT).max(-1)
    order = best.argsort(-1, descending=True)
    merged, kept = order[:, :r], order[:, r:]
    return best, place, kept, merged, place.gather(-1, merged)


def match(metric: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, r: int) -> Any:
    """`_match` of the rows that two lists name."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    return _match(unit[:, src], unit[:, dst], r)


def match_alternate(metric: torch.Tensor, r: int) -> Any:
    """`_match` of alternating tokens, whose lists are views."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    return _match(unit[:, ::2], unit[:, 1::2], r)


def exact_best(metric: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> torch.Tensor:
    """The best cosine of every source in float64, [B, A], without the whole matrix."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    a, b = unit[:, src], unit[:, dst].mT
    return torch.cat([(part @ b).amax(-1) for part in a.split(_ROWS, 1)], 1)


def exact_score(metric: torch.Tensor, src: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The cosine of every source with the token it chose, in float64; target [B, A] token positions."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    chosen = unit.gather(1, target[..., None].expand(-1, -1, unit.shape[-1]))
    return (unit[:, src] * chosen).sum(-1)


def merge_sum(x: torch.Tensor, kept: torch.Tensor, merged: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """[kept sources | destinations], merged sources added to theirs; alternating tokens x [B, N, D]."""
    a, b = x[:, ::2], x[:, 1::2]
    width = x.shape[-1]
    stay = a.gather(1, kept[..., None].expand(-1, -1, width))
    go = a.gather(1, merged[..., None].expand(-1, -1, width))
    b = b.scatter_reduce(1, into[..., None].expand(-1, -1, width), go, reduce="sum")
    return torch.cat((stay, b), 1)


def merge_mean(
    x: torch.Tensor, size: torch.Tensor, kept: torch.Tensor, merged: torch.Tensor, into: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The size-weighted mean, and the new sizes."""
    total = merge_sum(size, kept, merged, into)
    return merge_sum(x * size, kept, merged, into) / total, total


def prompt_pool(x: torch.Tensor, weights: torch.Tensor, kernel: Any, stride: Any, temperature: float) -> torch.Tensor:
    """PPLLaVA's pooling of x [B, T, H, W, D] over unfolded windows, in x's dtype."""

    def windows(t: torch.Tensor) -> torch.Tensor:
        for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), 1):
            t = t.unfold(axis, k, s)
        return t.flatten(-3)

    share = (windows(weights) / temperature).softmax(-1).to(x.dtype)
    return (windows(x).contiguous() * share[..., None, :]).sum(-1)


def frame_cosine(x: torch.Tensor, frames: int) -> torch.Tensor:
    """Cosine of same-place tokens of consecutive frames, [B, T - 1, P]."""
    x = x.unflatten(1, (frames, -1))
    return torch.nn.functional.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1)
