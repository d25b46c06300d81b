"""Rotation of q and k by tables, as the models themselves have it."""

from __future__ import annotations

import torch

__all__ = ["turned_pairs"]

Tensor = torch.Tensor


def turned_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs of x [..., D] turned by cos and sin [..., D / 2], which broadcast; of the dtype that they give together."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
