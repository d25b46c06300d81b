"""Which sources are merged, and the rows that remain.

A token with target >= 0 is a candidate where its score is at least the threshold (never where it is NaN). The r best are merged, of each
sample or of the whole batch together: by score, the lowest index first among equals. All other tokens keep a row of their own, in
their order, and a merged token joins the row of its target.

`rows` is fixed beforehand. Where more tokens are left than that, because there were fewer candidates than r, the excess is dropped (its
inverse is -1): first the tokens marked -2 (not finite), in their order; should that not be enough, the last ones. Where fewer are left,
the last rows are padding.
"""

from __future__ import annotations

import torch


def chosen(score: torch.Tensor, target: torch.Tensor, r: int, threshold: float, whole_batch: bool) -> torch.Tensor:
    """Mask [B, N] of the tokens that are merged."""
    shape = score.shape
    candidate = (target >= 0) & (score >= threshold)
    if whole_batch:
        score, candidate = score.reshape(1, -1), candidate.reshape(1, -1)
    key = torch.where(candidate, score, float("-inf"))
    best_first = key.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(best_first)
    rank.scatter_(-1, best_first, torch.arange(score.shape[-1], device=score.device).expand_as(rank))
    order = rank.masked_fill(~candidate, score.shape[-1])  # -inf is a score too: let no other token count
    return (candidate & (order.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True) < r)).reshape(shape)


def merge_plan(
    score: torch.Tensor, target: torch.Tensor, rows: int, r: int, threshold: float, whole_batch: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse [B, N], ptr [B, rows + 1], members [B, N], head [B, rows], counts [B], all int32.

    Args:
        score: [B, N] fp32 (fp64).
        target: [B, N] int32: the token to merge into, which itself has a negative target; -1 none, -2 not finite.
        rows: rows that the plan has room for.
        r: tokens merged at most.
        threshold: lowest score that is merged; -inf for all.
        whole_batch: r counts over all samples together.
    """
    batch, tokens = score.shape
    merged = chosen(score, target, r, threshold, whole_batch)
    kept = ~merged
    excess = (kept.sum(-1, keepdim=True) - rows).clamp(min=0)
    unfit = kept & (target == -2)
    kept = kept & ~(unfit & (unfit.cumsum(-1) <= excess))
    row = kept.cumsum(-1) - 1
    row = torch.where(kept & (row < rows), row, -1)

    joined = torch.where(merged, row.gather(-1, target.clamp(min=0).long()), row)  # [B, N]
    by_row = torch.where(joined < 0, rows, joined)
    members = by_row.argsort(dim=-1, stable=True)
    sizes = torch.zeros(batch, rows + 1, dtype=torch.long, device=score.device)
    sizes.scatter_add_(-1, by_row, torch.ones_like(by_row))
    ptr = torch.cat((sizes.new_zeros(batch, 1), sizes[:, :rows].cumsum(-1)), -1)
    place = torch.arange(tokens, device=score.device).expand(batch, -1)
    members = torch.where(place < ptr[:, -1:], members, -1)
    head = torch.full((batch, rows + 1), -1, dtype=torch.long, device=score.device)
    head.scatter_(-1, torch.where(row < 0, rows, row), place)
    counts = (row >= 0).sum(-1)
    inverse, ptr, members, head, counts = (t.to(torch.int32) for t in (joined, ptr, members, head[:, :rows], counts))
    return inverse, ptr, members, head.contiguous(), counts
