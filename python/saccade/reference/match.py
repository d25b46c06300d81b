r"""Bipartite matching of tokens (ToMe, arXiv 2210.09461, section 3.2): the best destination of every source.

For source i and destination j with metric rows a_i, b_j [C]:

    cosine   s_ij = a_i . b_j / (|a_i| |b_j|), 0 where a row is zero
    dot      s_ij = a_i . b_j
    l2       s_ij = -(|a_i|^2 + |b_j|^2 - 2 a_i . b_j), at most 0

    target_i = argmax_j s_ij, the first of equals in the order of the destination list;    score_i = max_j s_ij

over the destinations that may be chosen: all, or those in the ranges of i. Protected tokens neither choose nor are chosen. A row whose
squared norm is not finite neither chooses nor is chosen, and no other row's result depends on it.

Results lie at the token's place: [B, N], with -inf and -1 for whatever does not choose, -2 for a row that is not finite.
"""

from __future__ import annotations

import torch

COSINE, DOT, L2 = 0, 1, 2


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything below."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def allowed(ranges: torch.Tensor, destinations: int) -> torch.Tensor:
    """ranges [B, A, R, 2] to a mask [B, A, K]."""
    place = torch.arange(destinations, device=ranges.device)
    return ((place >= ranges[..., :1]) & (place < ranges[..., 1:])).any(-2)


def match(
    metric: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
    ranges: torch.Tensor | None,
    protect: torch.Tensor | None,
    score: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score [B, N] in the compute dtype and target [B, N] int32.

    Args:
        metric: [B, N, C], any float dtype; products and norms in fp32 (fp64 for fp64).
        src: [1|B, A] int32, positions of the sources.
        dst: [1|B, K] int32, positions of the destinations.
        ranges: [1|B, A, R, 2] int32, ascending disjoint [from, to) of the destination list, or None for all.
        protect: [1|B, N] bool, or None.
        score: COSINE, DOT or L2.
    """
    batch, tokens, _ = metric.shape
    wide = metric.to(compute_dtype(metric))
    squares = (wide * wide).sum(-1)  # [B, N]
    finite = squares.isfinite()
    usable = finite if protect is None else finite & ~protect
    wide, squares = wide.where(finite[..., None], 0.0), squares.where(finite, 0.0)
    src, dst = src.long().expand(batch, -1), dst.long().expand(batch, -1)

    rows = torch.arange(batch, device=metric.device)[:, None]
    a, b = wide[rows, src], wide[rows, dst]  # [B, A, C], [B, K, C]
    scores = a @ b.mT  # [B, A, K]
    if score == COSINE:
        inverse = torch.where(squares > 0, squares.rsqrt(), 0.0)
        scores = scores * inverse[rows, dst][:, None] * inverse[rows, src][..., None]
    elif score == L2:
        scores = (2 * scores - squares[rows, dst][:, None] - squares[rows, src][..., None]).clamp(max=0)
    may = usable[rows, src][..., None] & usable[rows, dst][:, None]
    if ranges is not None:
        may = may & allowed(ranges, dst.shape[1])
    scores = scores.masked_fill(~may, float("-inf"))

    best = metric.new_full((batch, tokens), float("-inf"), dtype=wide.dtype)
    target = torch.where(finite, -1, -2).to(torch.int32)
    if scores.shape[-1] and scores.shape[-2]:
        top, _ = scores.max(-1, keepdim=True)
        first = (scores == top).int().argmax(-1)  # the first of equals, which max() does not promise
        chosen = top[..., 0] > float("-inf")  # a score beyond fp32 is no reason to choose
        best[rows, src] = top[..., 0]
        target[rows, src] = torch.where(chosen, dst.gather(1, first).int(), target[rows, src])
    return best, target
