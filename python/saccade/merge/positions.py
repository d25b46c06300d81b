"""`merge_positions`: where merged tokens stand, so that rotary embeddings keep their meaning."""

from __future__ import annotations

from typing import Literal

import torch

from saccade._arguments import choice
from saccade.merge.plan import MergePlan

__all__ = ["merge_positions"]


def merge_positions(
    plan: MergePlan, positions: torch.Tensor, *, how: Literal["destination", "first", "mean"] = "destination"
) -> torch.Tensor:
    """Positions of the merged rows, for `rope.apply_rope`.

    Args:
        plan: of `match`, for N tokens.
        positions: [N], [A, N] or [A, B, N] (as `apply_rope` takes them), whole or fractional.
        how: "destination", the position of the token whose place the row takes; "first", of its first member; "mean" of all its members
            (fp64, or fp32 where the positions are; `apply_rope` takes fractions).

    Returns:
        [M] or [A, M] where plan and positions have no batch, else [A, B, M]. Rows of padding have the position of token 0.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
        >>> merge.merge_positions(merge.match(x, 1), torch.arange(4))
        tensor([1, 2, 3])
    """
    choice(how, "how", ("destination", "first", "mean"))
    if not isinstance(plan, MergePlan):
        raise TypeError(f"plan: expected a MergePlan, got {type(plan).__name__}")
    if not isinstance(positions, torch.Tensor):
        raise TypeError(f"positions: expected a tensor [N], [A, N] or [A, B, N], got {type(positions).__name__}")
    if positions.ndim not in (1, 2, 3) or positions.shape[-1] != plan.tokens:
        raise ValueError(
            f"positions: the plan is for {plan.tokens} tokens, expected [N], [A, N] or [A, B, N], got {list(positions.shape)}"
        )
    if positions.device != plan.inverse.device:
        raise ValueError(f"positions: expected the device of the plan, {plan.inverse.device}, got {positions.device}")
    given = positions.ndim
    place = positions[(None,) * (2 - given)] if given < 2 else positions
    place = place[:, None] if place.ndim == 2 else place  # [A, B|1, N]
    if place.shape[1] not in (1, plan.batch) and plan.batch != 1:
        raise ValueError(f"positions: expected batch 1 or {plan.batch}, got {place.shape[1]}")
    axes, batch = place.shape[0], max(place.shape[1], plan.batch)
    place = place.expand(axes, batch, -1)
    if how == "mean":
        out = _means(plan, place, batch)
    else:
        head = plan.head.long()
        if how == "first":
            start = plan.ptr[:, :-1].long().clamp(max=max(plan.tokens - 1, 0))
            head = torch.where(head >= 0, plan.members.long().gather(1, start), head)
        out = place.gather(2, head.clamp(min=0).expand(axes, batch, -1))
    if batch == 1 and given < 3:
        out = out[:, 0]
        return out[0] if given == 1 else out
    return out


def _means(plan: MergePlan, place: torch.Tensor, batch: int) -> torch.Tensor:
    """By differences of running sums along the members: no atomics, the same bits every time."""
    dtype = torch.float32 if place.dtype == torch.float32 else torch.float64
    index = plan.members.long().clamp(min=0).expand(place.shape[0], batch, -1)
    sums = torch.nn.functional.pad(place.double().gather(2, index).cumsum(2), (1, 0))
    ends = plan.ptr.long().expand(place.shape[0], batch, -1)
    count = ends.diff(dim=2)
    mean = sums.gather(2, ends).diff(dim=2) / count.clamp(min=1)
    return torch.where(count > 0, mean, place[..., :1].double()).to(dtype)
