"""Exactly k of N, in order of position.

The k largest scores, the lowest index first among equals; NaN counts as less than every number. The indices come back ascending.
"""

from __future__ import annotations

import torch


def keep_top(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices [B, k] int64, ascending, for scores [B, N]."""
    # A stable sort by score, after one that puts NaN last: -inf stays before it.
    by_number = scores.isnan().int().argsort(dim=-1, stable=True)
    numbers = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")).gather(-1, by_number)
    order = by_number.gather(-1, numbers.argsort(dim=-1, descending=True, stable=True))
    return order[..., :k].sort(-1).values
