r"""Cosine of matching rows.

    out_n = x_n . y_n / (|x_n| |y_n|)

0 where a row is zero, NaN where a squared norm is not finite (every comparison with it then fails, so such a row is never similar).
Products and norms in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch

from saccade.reference.match import compute_dtype


def row_similarity(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Out [B, N] in the compute dtype, for x [B, N, C] and y [B, N, C] (any strides, also 0)."""
    x, y = x.to(compute_dtype(x)), y.to(compute_dtype(y))
    dot, xx, yy = (x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)
    inverse = [
        torch.where(s > 0, torch.where(s > 0, s, 1.0).rsqrt(), 0.0) for s in (xx, yy)
    ]  # a gradient of 0, not NaN
    out = dot * inverse[0] * inverse[1]
    return torch.where(xx.isfinite() & yy.isfinite(), out, float("nan"))
