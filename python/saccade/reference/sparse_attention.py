"""Specification of `sparse_attention`: softmax attention over the pairs that a mask shows.

    s_ij = scale * (q_i . k_j) + bias_ij + key_bias_j
    lse_i = log(sum over visible j of exp(s_ij))
    out_i = sum over visible j of exp(s_ij - lse_i) v_j

A query that sees nothing, or only keys with s = -inf, has out 0 and lse -inf, and gives no gradient. A pair that is not visible
contributes nothing, whatever its values: it is left out, not multiplied by 0.

    with P = exp(s - lse), dP = dout v^T, delta = rowsum(dout * out) - dlse:   dS = P * (dP - delta)
    dq = scale * dS k,  dk = scale * dS^T q,  dv = P^T dout,  dbias = dS summed over the axes it is shared by
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def softmax_product(s: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """out [..., Sq, D] and lse [..., Sq] from scores [..., Sq, Sk], values [..., Sk, D] and a mask that broadcasts to the scores."""
    s = s.masked_fill(~visible, float("-inf"))
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), float("-inf"))
    empty = top == float("-inf")
    p = torch.exp(s - top.masked_fill(empty, 0.0)).masked_fill(~visible, 0.0)
    total = p.sum(-1, keepdim=True)
    lse = (top + total.masked_fill(empty, 1.0).log()).squeeze(-1)
    p = p / total.masked_fill(empty, 1.0)
    broken = ~v.isfinite().all(-1)  # [..., Sk]: 0 times what is not finite would spoil rows that do not see it
    out = p @ v.masked_fill(broken[..., None], 0.0)
    spoilt = (visible & broken[..., None, :]).any(-1, keepdim=True) if bool(broken.any()) else None
    return out if spoilt is None else out.masked_fill(spoilt, float("nan")), lse


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Attention over a boolean mask, in at least fp32, rounded once.

    Args:
        q: [B, H, Sq, D]. k, v: [B, Hk, Sk, D]; query head h reads head `h // (H / Hk)`.
        mask: [1|B, 1|H, Sq, Sk] bool, True where a query sees a key.
        bias: [1|B, 1|H, Sq, Sk] or None. key_bias: [1|B, Sk] or None.

    Returns:
        out [B, H, Sq, D] in q's dtype, lse [B, H, Sq] in fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // max(k.shape[1], 1)
    keys, values = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    visible = mask.expand(q.shape[0], q.shape[1], -1, -1)
    s = q.to(wide) @ keys.transpose(-1, -2) * scale
    if bias is not None:
        s = s + bias.to(wide)
    if key_bias is not None:
        s = s + key_bias.to(wide)[:, None, None, :]
    out, lse = softmax_product(s, values, visible)
    return out.to(q.dtype), lse
