"""Specification of `attention_bias_grad`: the gradient of a bias that samples and heads share.

    dbias_ij = sum over the samples b and heads h that share it of P_bhij (dout_bhi . v_bhj - delta_bhi)

with P = exp(s - lse) where j is visible, else 0; s as in `sparse_attention`. delta = rowsum(dout * out) - dlse.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def attention_bias_grad(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: Tensor,
    bias: Tensor,
    key_bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """dbias shaped as `bias` [1|B, 1|H, Sq, Sk], in its dtype; the other shapes as in `sparse_attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // max(k.shape[1], 1)
    keys, values = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    s = q.to(wide) @ keys.transpose(-1, -2) * scale + bias.to(wide)
    if key_bias is not None:
        s = s + key_bias.to(wide)[:, None, None, :]
    seen = mask.expand_as(s) & (lse > float("-inf"))[..., None]
    p = torch.exp(s - lse.to(wide)[..., None]).masked_fill(~seen, 0.0)
    ds = (p * (dout.to(wide) @ values.transpose(-1, -2) - delta.to(wide)[..., None])).masked_fill(~seen, 0.0)
    shared = [axis for axis in (0, 1) if bias.shape[axis] == 1]
    return ds.sum(shared, keepdim=True).to(bias.dtype) if shared else ds.to(bias.dtype)
