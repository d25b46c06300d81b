r"""Merging of tokens along a plan (ToMe, arXiv 2210.09461, section 3.2).

With the members S of a row, their weights w_i (1 where none are given) and W = sum_{i in S} w_i:

    mean      y = sum_{i in S} w_i x_i / W        dx_i = w_i / W dy
    sum       y = sum_{i in S} x_i                dx_i = dy
    max       y = max_{i in S} x_i, per column    dx_i = dy where i is the first member that attains it
    replace   y = x_head                          dx_head = dy

and total = W. Sums are fp32 (fp64 for fp64), rounded once. Where W is 0 the mean is 0, and a NaN counts as the maximum. Rows
of padding are 0, their total is 0 and its logarithm -inf; a dropped token reaches no row and has no gradient.
"""

from __future__ import annotations

import torch

from saccade.reference.match import compute_dtype

MEAN, SUM, MAX, REPLACE = range(4)


def first_maximum(x: torch.Tensor, row: torch.Tensor, rows: int) -> torch.Tensor:
    """Token [B, M, D] of the first member of each row that attains the maximum of a column; NaN counts as more than every number.

    Args:
        x: [B, N, D].
        row: [B, N] int64, `rows` for a token that reaches none.
        rows: M.
    """
    batch, tokens, width = x.shape
    at = row[..., None].expand(-1, -1, width)
    value = x.detach()
    top = value.new_full((batch, rows + 1, width), float("-inf")).scatter_reduce(1, at, value, "amax").gather(1, at)
    place = torch.arange(tokens, device=x.device)[:, None].expand(batch, tokens, width)
    place = place.where((value == top) | (value.isnan() & top.isnan()), tokens)  # amax gives NaN where there is one
    first = place.new_full((batch, rows + 1, width), tokens).scatter_reduce(1, at, place, "amin")
    return first[:, :rows].clamp(max=max(tokens - 1, 0))


def merge(
    x: torch.Tensor, weight: torch.Tensor | None, inverse: torch.Tensor, head: torch.Tensor, mode: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Y [B, M, D] in x's dtype, total [B, M] and its logarithm, in the compute dtype.

    Args:
        x: [B, N, D].
        weight: [1|B, N], or None for 1.
        inverse: [1|B, N] int32, the row of each token, -1 for none.
        head: [1|B, M] int32, the token whose place each row takes, -1 for padding.
        mode: MEAN, SUM, MAX or REPLACE.
    """
    batch, tokens, width = x.shape
    rows = head.shape[1]
    wide = x.to(compute_dtype(x))
    weight = wide.new_ones(batch, tokens) if weight is None else weight.to(wide.dtype).expand(batch, -1)
    row = inverse.long().expand(batch, -1)
    row = torch.where(row < 0, rows, row)  # one row more, for what is dropped
    total = wide.new_zeros(batch, rows + 1).scatter_add(1, row, weight)[:, :rows]
    at = row[..., None].expand(-1, -1, width)
    mode = mode if tokens else SUM  # all rows are padding
    if mode == REPLACE:
        index = head.long().expand(batch, -1)
        y = wide.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, width)).where((index >= 0)[..., None], 0.0)
    elif mode == MAX:
        y = wide.gather(1, first_maximum(wide, row, rows)).where((head >= 0)[..., None], 0.0)
    else:
        scaled = wide * weight[..., None] if mode == MEAN else wide
        y = wide.new_zeros(batch, rows + 1, width).scatter_add(1, at, scaled)[:, :rows]
        if mode == MEAN:
            y = y / torch.where(total == 0, 1.0, total)[..., None]
    return y.to(x.dtype), total, total.log()


def merge_bwd(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    inverse: torch.Tensor,
    head: torch.Tensor,
    mode: int,
) -> torch.Tensor:
    """Gradient dx [B, N, D] of `merge`, in dy's dtype; x is needed for MAX alone."""
    batch, rows, width = dy.shape
    tokens = inverse.shape[1]
    wide = dy.to(compute_dtype(dy))
    row = inverse.long().expand(batch, -1)
    at = row.clamp(min=0)[..., None].expand(-1, -1, width)
    dx = wide.gather(1, at) if rows else wide.new_zeros(batch, tokens, width)
    place = torch.arange(tokens, device=dy.device)
    if mode == MEAN:
        one = wide.new_ones(batch, tokens) if weight is None else weight.to(wide.dtype).expand(batch, -1)
        total = wide.new_zeros(batch, rows + 1).scatter_add(1, torch.where(row < 0, rows, row), one)
        dx = dx * (one / torch.where(total == 0, 1.0, total).gather(1, row.clamp(min=0)))[..., None]
    elif mode == REPLACE:
        own = head.long().expand(batch, -1).gather(1, row.clamp(min=0)) == place
        dx = dx.where(own[..., None], 0.0)
    elif mode == MAX:
        assert x is not None
        first = first_maximum(x, torch.where(row < 0, rows, row), rows)
        dx = dx.where(first.gather(1, at) == place[:, None], 0.0) if rows else dx
    return dx.where((row >= 0)[..., None], 0.0).to(dy.dtype)
