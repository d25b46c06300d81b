r"""Statistics of rows of the attention map: normaliser and entropy, without the map.

For query i (one of `rows`), head h and key j of key head h // (H / Hk), visible where not `causal` or j <= i + Sk - Sq:

    s_ij  = scale * (q_i . k_j) + key_bias_j
    lse_i = log sum_j exp(s_ij)                           natural logarithm
    P_ij  = exp(s_ij - lse_i)
    entropy_i = -sum_j P_ij log P_ij                      in nats; a P_ij of 0 adds 0

A query that sees nothing, or only s = -inf, has lse -inf and entropy 0; so has an entry of `rows` outside [0, Sq). A pair that is not
visible never contributes, so a key or query that is not finite spoils only the rows that see it. Sums are fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch

from saccade.reference.match import compute_dtype


def map_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """s [B, H, R, Sk] in the compute dtype, -inf where a pair is not visible."""
    queries, keys = q.shape[2], k.shape[2]
    kind = compute_dtype(q)
    rows = torch.arange(queries, device=q.device) if rows is None else rows.long()
    exists = (rows >= 0) & (rows < queries)
    if queries:
        taken = q.index_select(2, rows.clamp(0, queries - 1))
    else:
        taken = q.new_zeros(*q.shape[:2], len(rows), q.shape[3])
    scores = scale * (taken.to(kind) @ k.to(kind).repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1).mT)
    if key_bias is not None:
        scores = scores + key_bias.to(kind)[:, None, None]
    visible = exists[:, None].expand(-1, keys)
    if causal:
        visible = visible & (torch.arange(keys, device=q.device) <= rows[:, None] + keys - queries)
    return scores.masked_fill(~visible, float("-inf"))


def attention_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lse and entropy [B, H, R] in the compute dtype.

    Args:
        q: [B, H, Sq, D].
        k: [B, Hk, Sk, D]; Hk divides H.
        rows: [R] int32, the queries asked for, in any order, repeated at will; None: all.
        key_bias: [1|B, Sk] fp32, or None.
        causal: query i sees keys up to i + Sk - Sq.
        scale: of the products.
    """
    scores = map_scores(q, k, rows, key_bias, causal, scale)
    lse = scores.logsumexp(-1)
    log_share = scores - lse[..., None]
    share = log_share.exp()
    terms = torch.where(share != 0, share * log_share, 0.0)
    return lse, torch.where(lse == float("-inf"), 0.0, -terms.sum(-1))
