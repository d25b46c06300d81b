r"""One key per block: the mean of its tokens, as VSA, MoBA, SpargeAttn, DraftAttention and NABLA take it.

    out_I = 1 / n_I  sum over tokens t of block I of x_t,    0 where the block has no token

Block I holds the positions I * block .. (I + 1) * block - 1; position = token where `order` is None, else `order` says which token lies at
each position, -1 for none. n_I counts the tokens that exist. Sums are fp32 (fp64 for fp64). A token that is not finite spoils its own block
alone.
"""

from __future__ import annotations

import torch

from saccade.reference.match import compute_dtype


def block_pool(x: torch.Tensor, order: torch.Tensor | None, block: int) -> torch.Tensor:
    """Means [B, H, n, D] in the compute dtype.

    Args:
        x: [B, H, S, D], any float dtype.
        order: [1|B, 1|H, n * block] int32, or None: n = ceil(S / block).
        block: positions of a block.
    """
    batch, heads, tokens, width = x.shape
    if order is None:
        order = torch.arange(-(-tokens // block) * block, device=x.device)[None, None]
        order = order.where(order < tokens, -1)
    order = order.long().expand(batch, heads, -1)
    exists = order >= 0
    wide = x.to(compute_dtype(x))
    if tokens:
        wide = wide.gather(2, order.clamp(min=0)[..., None].expand(-1, -1, -1, width))
    else:
        wide = wide.new_zeros(batch, heads, order.shape[2], width)
    wide = wide.where(exists[..., None], 0.0)
    blocks = order.shape[2] // block
    count = exists.view(batch, heads, blocks, block).sum(-1).clamp(min=1)
    return wide.view(batch, heads, blocks, block, width).sum(3) / count[..., None].to(wide.dtype)
