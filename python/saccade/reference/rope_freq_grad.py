r"""Gradient of learned rotary frequencies (Mochi), without angles.

With y = m R(phi) x and dx = m R(-phi) dy, dL/dphi = cross(y, dy) = cross(x, dx), hence

    dL/dinv_freq[a, g, i] = sum over b, n, heads h of group g, and q and k, of positions[a, b, n] * (x[c1] dx[c2] - x[c2] dx[c1])
"""

from __future__ import annotations

import torch

from saccade.reference.apply_rope import compute_dtype, pair_columns


def rope_freq_grad(
    tensors: list[tuple[torch.Tensor, torch.Tensor]],
    positions: torch.Tensor,
    *,
    groups: int,
    pairs: int,
    interleaved: bool = False,
) -> torch.Tensor:
    """Sum over (x, dx) in `tensors`, each [B, H, S, D], with positions [A, B|1, S].

    Returns:
        float32 [A, G, R] (float64 for float64 input).
    """
    dtype = compute_dtype(tensors[0][0])
    total = torch.zeros(positions.shape[0], groups, pairs, dtype=dtype, device=positions.device)
    for x, dx in tensors:
        x1, x2 = pair_columns(x.to(dtype), pairs, interleaved)
        d1, d2 = pair_columns(dx.to(dtype), pairs, interleaved)
        cross = (x1 * d2 - x2 * d1).unflatten(1, (groups, -1)).sum(2)  # [B, G, S, R]
        place = positions.to(dtype).expand(-1, x.shape[0], -1)
        total += torch.einsum("abs,bgsr->agr", place, cross)
    return total
