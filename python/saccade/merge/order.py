"""Other orders of a plan's rows than by position."""

from __future__ import annotations

from dataclasses import replace

import torch

from saccade.merge.plan import MergePlan


def in_order(plan: MergePlan, lists: tuple[torch.Tensor, torch.Tensor], order: str) -> MergePlan:
    """Unmerged sources first, by position ("split") or the most similar first ("similarity"), then destinations, then padding."""
    assert plan.score is not None
    batch, tokens, rows = plan.batch, plan.tokens, plan.rows
    source = torch.zeros(batch, tokens, dtype=torch.bool, device=plan.head.device)
    source.scatter_(1, lists[0].long().expand(batch, -1), True)
    head = plan.head.long().clamp(min=0)
    place = torch.arange(rows, device=head.device).expand(batch, -1)
    if order == "similarity":
        place = plan.score.gather(1, head).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kind = torch.where(plan.head < 0, 2, torch.where(source.gather(1, head), 0, 1))
    kind_first = torch.where(kind == 0, place, torch.arange(rows, device=head.device)) + kind * rows
    return permuted(plan, kind_first.argsort(dim=1))


def permuted(plan: MergePlan, old: torch.Tensor) -> MergePlan:
    """The plan with row m taken from row old[m]; old [Bp, M] int64."""
    new = torch.empty_like(old).scatter_(1, old, torch.arange(plan.rows, device=old.device).expand_as(old))
    inverse = torch.where(plan.inverse >= 0, new.gather(1, plan.inverse.long().clamp(min=0)).int(), -1)
    sizes = plan.ptr.diff(dim=1).gather(1, old)
    ptr = torch.cat((sizes.new_zeros(plan.batch, 1), sizes.cumsum(1)), 1).int()
    by_row = torch.where(inverse >= 0, inverse, plan.rows)
    members = by_row.argsort(dim=1, stable=True).int()
    place = torch.arange(plan.tokens, device=old.device)
    members = torch.where(place < ptr[:, -1:], members, -1)
    return replace(plan, inverse=inverse, ptr=ptr, members=members, head=plan.head.gather(1, old))
