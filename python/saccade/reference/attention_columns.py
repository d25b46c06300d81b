r"""How much attention each key gets: column sums of the attention map, without the map.

    out_j = sum over the queries i asked for of exp(s_ij - lse_i)

with s_ij, `rows` and visibility as in `attention_rows`, whose lse this takes. A query with lse -inf adds 0, and a pair that is not visible
never contributes. Sums are fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch

from saccade.reference.attention_rows import map_scores


def attention_columns(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """[B, H, Sk] in the compute dtype.

    Args:
        q, k, rows, key_bias, causal, scale: as of `attention_rows`.
        lse: [B, H, R], one for each entry of `rows`.
    """
    scores = map_scores(q, k, rows, key_bias, causal, scale)
    share = (scores - lse.to(scores.dtype)[..., None]).exp()
    empty = (lse == float("-inf"))[..., None] | (scores == float("-inf"))
    return share.masked_fill(empty, 0.0).sum(2)
