"""What runs in a timm Vision Transformer whose attention is Saccade's, or that merges tokens (ToMe, arXiv 2210.09461).

Between attention and MLP, tokens whose keys are alike become one. Everything else of the model stays: q/k norm, gates, layer scale, drop
path, fused attention, hooks on its modules. Attention itself is timm's own, given log(size) as a bias of each key.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from saccade.swap.attend import Attend
from saccade.swap.merging import Merging, Sizes, merge_between, weighted_mean

__all__ = ["ATTEND", "MERGING", "attention", "block", "forward", "forward_features", "pool"]

Tensor = torch.Tensor
MERGING = "_saccade_merging"  # an attribute of the model
ATTEND = "_saccade_attend"  # an attribute of an attention


def attention(
    self: Any,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    keys: bool = False,
    bias: Tensor | None = None,
) -> Any:
    """timm's attention; with `keys` also the keys [B, H, N, D] that it compared, and `bias` [B, 1, N] or None is added to their scores."""
    attend: Attend | None = vars(self).get(ATTEND)
    dropout = self.attn_drop.p if self.training else 0.0
    masked = attn_mask is not None or is_causal
    if attend is not None and (dropout or masked):
        attend.decline("the model gave a mask" if masked else f"attention dropout of {dropout} in training")
    ours = attend is not None and not dropout
    if not keys and (not ours or masked):
        return type(self).forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
    batch, tokens, _ = x.shape
    gate = self.gate(x).sigmoid() if self.gate is not None else None
    q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = self.q_norm(q), self.k_norm(k)
    if attend is not None and ours:
        out = attend(
            q, k, v, key_bias=None if bias is None else bias[:, 0], scale=self.scale,
            stock=lambda: _stock(self, q, k, v, bias, 0.0),
        )  # fmt: skip
    else:
        out = _stock(self, q, k, v, bias, dropout)
    out = self.norm(out.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
    out = out if gate is None else out * gate
    out = self.proj_drop(self.proj(out))
    return (out, k) if keys else out


def _stock(self: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """What timm does with q, k and v, and a bias [B, 1, N]."""
    mask = None if bias is None else bias[:, None].to(q.dtype)
    if self.fused_attn:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = (q * self.scale) @ k.transpose(-2, -1)
    scores = scores if mask is None else scores + mask
    return self.attn_drop(scores.softmax(dim=-1)) @ v  # type: ignore[no-any-return]


def block(
    self: Any,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    merging: Merging | None = None,
    r: int = 0,
    sizes: Sizes = (None, None),
) -> Any:
    """timm's block; with `merging` it merges r tokens, and returns the sizes too."""
    if merging is None:
        return type(self).forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
    size, bias = sizes
    out, k = self.attn(self.norm1(x), keys=True, bias=bias)
    x = x + self.drop_path1(self.ls1(out))
    if r:
        x, size, bias, _ = merging.merge(x, k, r, size)
    x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
    return x, (size, bias)


def forward_features(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """timm's, with merging: [B, M, D]."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "attn_mask: expected None and is_causal=False, because tokens are merged; restore the model first"
        )
    merging: Merging = vars(self)[MERGING]
    x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
    x, (merging.size, _) = merge_between(self.blocks, x, merging, checkpointed=self.grad_checkpointing)
    return self.norm(x)  # type: ignore[no-any-return]


def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """timm's, and no size is kept behind it."""
    out = self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))
    vars(self)[MERGING].size = None
    return out  # type: ignore[no-any-return]


def pool(self: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
    """timm's, but a mean counts each row as often as it has tokens, and attention pooling gets log(size)."""
    merging: Merging = vars(self)[MERGING]
    size, kind = merging.size, self.global_pool if pool_type is None else pool_type
    if size is None or (self.attn_pool is None and kind not in ("avg", "avgmax")):
        return type(self).pool(self, x, pool_type)  # type: ignore[no-any-return]
    if x.shape[:2] != size.shape[:2]:
        raise ValueError(
            f"x: expected the features [{size.shape[0]}, {size.shape[1]}, D] that forward_features returned last, "
            f"got {list(x.shape)}"
        )
    if not self.pool_include_prefix:
        x, size = x[:, self.num_prefix_tokens :], size[:, self.num_prefix_tokens :]
    if self.attn_pool is not None:
        bias = size.log().transpose(1, 2)[:, None].to(x.dtype) if merging.proportional else None
        return self.attn_pool(x, attn_mask=bias)  # type: ignore[no-any-return]
    mean = weighted_mean(x, size)
    return mean if kind == "avg" else 0.5 * (x.amax(dim=1) + mean)
