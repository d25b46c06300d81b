r"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 15), for any pairing, axis layout and head group.

For head h of group g, token n and pair i with columns (c1, c2) and angle phi = sum_a positions[a, n] * inv_freq[a, g, i]:

    y[c1] = m * (cos(phi) * x[c1] - sin(phi) * x[c2])
    y[c2] = m * (sin(phi) * x[c1] + cos(phi) * x[c2])

m is the attention factor. Columns: (i, i + R) for half pairing, (2i, 2i + 1) for interleaved; those from 2R on pass through.
Where sin(phi) is exactly 0 the products with it are left out, so that the identity keeps every bit (also of inf and -0).
The gradient is the inverse rotation: dx = m * R(-phi) dy.
"""

from __future__ import annotations

import torch

from saccade.reference.turns import cos_sin


def pair_columns(x: torch.Tensor, pairs: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second column of each pair of x [..., D], as views [..., R]."""
    rotary = x[..., : 2 * pairs]
    if interleaved:
        return rotary[..., 0::2], rotary[..., 1::2]
    return rotary[..., :pairs], rotary[..., pairs:]


def join_columns(first: torch.Tensor, second: torch.Tensor, rest: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Inverse of `pair_columns`; rest [..., D - 2R] is appended."""
    rotary = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((rotary, rest), -1)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything below."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turn the pairs of x [B, H, S, D] by cos, sin [B, G, S, R] (attention factor included), in their dtype."""
    heads, groups, pairs = x.shape[1], cos.shape[1], cos.shape[-1]
    cos, sin = (t.repeat_interleave(heads // groups, 1) for t in (cos, sin))  # [B, H, S, R]
    x = x.to(cos.dtype)
    first, second = pair_columns(x, pairs, interleaved)
    still = sin == 0
    turned_first = torch.where(still, cos * first, cos * first - sin * second)
    turned_second = torch.where(still, cos * second, sin * first + cos * second)
    return join_columns(turned_first, turned_second, x[..., 2 * pairs :], interleaved)


def apply_rope(
    x: torch.Tensor,
    positions: torch.Tensor,
    steps: torch.Tensor,
    *,
    shift: int = 0,
    interleaved: bool = False,
    scale: float = 1.0,
    inverse: bool = False,
) -> torch.Tensor:
    """Rotate x [B, H, S, D] by positions [A, B|1, S] and steps int64 [A, G, R]; computed in float32 (float64 for
    float64), rounded once to x's dtype."""
    cos, sin = cos_sin(positions, steps, shift, compute_dtype(x))
    cos, sin = cos * scale, (-sin if inverse else sin) * scale
    return rotate(x, cos, sin, interleaved).to(x.dtype)


def apply_rope_learned(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, interleaved: bool = False, scale: float = 1.0
) -> torch.Tensor:
    """The same with angles as plain products, differentiable in inv_freq [A, G, R] (radians per unit of position)."""
    angle = torch.einsum("abs,agr->bgsr", positions.double(), inv_freq.double())
    cos, sin = ((f(angle) * scale).to(compute_dtype(x)) for f in (torch.cos, torch.sin))
    return rotate(x, cos, sin, interleaved).to(x.dtype)
