"""Sequences of different lengths packed into one: each is matched by itself, and the plans are joined."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from saccade._arguments import items, whole
from saccade._dispatch import raw
from saccade.merge._mergeable import mergeable
from saccade.merge.partition import Partition
from saccade.merge.plan import MergePlan
from saccade.reference import match as reference
from saccade.reference import merge_plan as plan_reference


def segments(cu_seqlens: Sequence[int] | torch.Tensor, metric: torch.Tensor) -> list[int]:
    """Checked cumulative lengths."""
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.device.type != "cpu":
            raise ValueError("cu_seqlens: expected a list or a CPU tensor (lengths decide shapes), got one on a GPU")
        if cu_seqlens.ndim != 1:
            raise ValueError(f"cu_seqlens: expected [S + 1], got {list(cu_seqlens.shape)}")
        cu_seqlens = cu_seqlens.tolist()
    bounds = [whole(c, f"cu_seqlens[{i}]", 0) for i, c in enumerate(items(cu_seqlens, "cu_seqlens"))]
    if metric.shape[0] != 1:
        raise ValueError(f"metric: packed sequences have a batch of 1, got {metric.shape[0]}")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != metric.shape[1] or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens: expected to rise from 0 to the {metric.shape[1]} tokens, got {bounds}")
    return bounds


def packed_plan(
    metric: torch.Tensor,
    bounds: list[int],
    partition: Partition,
    amount: Callable[[int], int | None],
    protect: torch.Tensor | None,
    places: tuple[int, ...] | None,
    score: int,
    chosen: str,
) -> MergePlan:
    """One plan over all sequences. All are matched by one launch, each inside its own range of the destination list."""
    device, lengths = metric.device, [b - a for a, b in itertools.pairwise(bounds)]
    amounts = []
    for n, a in zip(lengths, bounds, strict=False):
        partition.check(n)
        limit = amount(n)
        assert limit is not None
        spared = None if places is None else tuple(p - a for p in places if a <= p < a + n)
        clamp = mergeable(partition, n, None, None if protect is None else protect[:, a : a + n], spared, 1, False)
        if limit > clamp:
            raise ValueError(f"r: at most {clamp} tokens of a sequence of {n} can be merged, got {limit}")
        amounts.append(limit)
    parts = [partition.lists(n, device) for n in lengths]
    src, dst = (
        torch.cat([p[i] + a for p, a in zip(parts, bounds, strict=False)], 1).int().contiguous() for i in (0, 1)
    )
    first, runs = 0, []
    for own_src, own_dst in parts:
        runs.append(torch.tensor([[first, first + own_dst.shape[1]]]).expand(own_src.shape[1], 2))
        first += own_dst.shape[1]
    ranges = torch.cat(runs)[None, :, None].int().contiguous().to(device)
    match = reference.match if chosen == "reference" else raw("match", chosen)
    build = plan_reference.merge_plan if chosen == "reference" else raw("merge_plan", chosen)
    values, target = match(metric.detach(), src, dst, ranges, protect, score)

    made: list[tuple[torch.Tensor, ...]] = []
    row, rows = 0, [0]
    for a, b, limit in zip(bounds, bounds[1:], amounts, strict=False):
        own = target[:, a:b]
        own = torch.where(own >= 0, own - a, own).contiguous()
        inverse, ptr, members, head, counts = build(
            values[:, a:b].contiguous(), own, b - a - limit, limit, float("-inf"), False
        )
        made.append((_shifted(inverse, row), ptr, _shifted(members, a), _shifted(head, a), counts))
        row += b - a - limit
        rows.append(row)
    return _joined(made, values, rows)


def _shifted(t: torch.Tensor, by: int) -> torch.Tensor:
    return torch.where(t >= 0, t + by, t)


def _joined(made: list[tuple[torch.Tensor, ...]], score: torch.Tensor, rows: list[int]) -> MergePlan:
    inverse, ptrs, members, head, counts = (list(p) for p in zip(*made, strict=True))
    sizes = torch.cat([p.diff(dim=1) for p in ptrs], 1)
    ptr = torch.cat((sizes.new_zeros(1, 1), sizes.cumsum(1)), 1).int()
    every = torch.cat(members, 1)
    # Dropped tokens leave gaps of -1 inside: to the end with them.
    every = every.gather(1, (every < 0).byte().argsort(dim=-1, stable=True))
    cu_rows = torch.tensor(rows, dtype=torch.int32)
    total = torch.stack(counts).sum(0).int()
    return MergePlan(torch.cat(inverse, 1), ptr, every, torch.cat(head, 1), total, score, cu_rows)
