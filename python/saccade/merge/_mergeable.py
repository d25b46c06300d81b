"""How many tokens can be merged: what r is held against before anything runs."""

from __future__ import annotations

import functools
from typing import Any

import torch

from saccade.merge._protect import first_tokens
from saccade.merge.partition import Index, Partition, Strided, tracing

CPU = torch.device("cpu")


def count(src: torch.Tensor, dst: torch.Tensor, ranges: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """[B] sources that are free and have a free destination within their ranges.

    Args:
        src, dst: [1|B, A], [1|B, K] positions.
        ranges: [1, A, R, 2], or None.
        mask: [1|B, N] bool, True where protected.
    """
    batch = max(src.shape[0], dst.shape[0], mask.shape[0])
    free = ~mask.expand(batch, -1)
    own, goal = (free.gather(1, i.long().expand(batch, -1)) for i in (src, dst))
    if ranges is None:
        return (own & goal.any(1, keepdim=True)).sum(1)
    before = torch.nn.functional.pad(goal.cumsum(1), (1, 0))  # [B, K + 1]
    bounds = ranges[0].long().flatten()
    within = before[:, bounds].view(batch, *ranges.shape[1:]).diff(dim=-1).sum((-1, -2))
    return (own & (within > 0)).sum(1)


def free_sources(partition: Strided, tokens: int, places: tuple[int, ...]) -> int:
    """The same for a `Strided` partition without a window, by arithmetic: lengths may be symbols of a compiler."""
    destinations = partition.destinations(tokens)
    grouped = destinations * partition.k
    taken = sum(1 for p in places if p < grouped and p % partition.k == partition.k - 1)
    return 0 if taken == destinations else partition.sources(tokens) - (len(places) - taken)


def count_places(partition: Partition, tokens: int, window: Any, places: tuple[int, ...]) -> int:
    """The same from positions that the host knows: nothing is read from a device."""
    if not isinstance(partition, Index):
        return _remembered(partition, tokens, tuple(window) if isinstance(window, list) else window, places)
    return _count_places(partition, tokens, window, places) if partition.on_host else partition.sources(tokens)


def _count_places(partition: Partition, tokens: int, window: Any, places: tuple[int, ...]) -> int:
    mask = first_tokens(0, tokens, CPU)
    mask[:, list(places)] = True
    ranges = None if window is None else partition.ranges(tokens, window, CPU)
    return int(count(*partition.lists(tokens, CPU), ranges, mask).min())


_remembered = functools.lru_cache(maxsize=64)(_count_places)


def mergeable(
    partition: Partition,
    tokens: int,
    window: Any,
    mask: torch.Tensor | None,
    places: tuple[int, ...] | None,
    samples: int,
    whole_batch: bool,
) -> int:
    """Tokens that can be merged: in the sample that has fewest, or in all together.

    An upper limit where that cannot be counted: a mask on a GPU, or values while a compiler or a mode traces.
    """
    times = samples if whole_batch else 1
    if not partition.destinations(tokens):
        return 0
    if places and window is None and isinstance(partition, Strided):
        return times * free_sources(partition, tokens, places)
    if places and not tracing(CPU):
        return times * count_places(partition, tokens, window, places)
    lists_on_host = not isinstance(partition, Index) or partition.on_host
    if mask is None or mask.device.type != "cpu" or not lists_on_host or tracing(CPU):
        return times * partition.sources(tokens)
    ranges = None if window is None else partition.ranges(tokens, window, CPU)
    counts = count(*partition.lists(tokens, CPU), ranges, mask)
    return int(counts.expand(samples).sum() if whole_batch else counts.min())
