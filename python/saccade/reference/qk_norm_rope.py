r"""RMS normalisation of q or k followed by the rotary embedding, in one pass.

    r = 1 / sqrt(mean(x^2) + eps)          mean over the head's D columns (norm="head") or over all H * D (norm="row")
    y = RoPE(x * r * weight)               weight [D] or [H * D]; None means 1

Statistics, product and rotation are float32 (float64 for float64), rounded once on store. Formula of RMSNorm: Zhang and
Sennrich, arXiv 1910.07467, eq. 4. Used so by Qwen3 and HunyuanVideo (head), Wan and LTX (row).
"""

from __future__ import annotations

import torch

from saccade.reference.apply_rope import compute_dtype, rotate
from saccade.reference.turns import cos_sin


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, row: bool) -> torch.Tensor:
    """Normalise x [B, H, S, D] over D, or over H and D together, in the compute dtype."""
    dims = (1, 3) if row else (3,)
    x = x.to(compute_dtype(x))
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    if weight is None:
        return y
    weight = weight.to(y.dtype)
    return y * (weight.view(x.shape[1], 1, x.shape[3]) if row else weight)


def qk_norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    positions: torch.Tensor,
    steps: torch.Tensor,
    *,
    shift: int = 0,
    interleaved: bool = False,
    scale: float = 1.0,
    eps: float = 1e-6,
    row: bool = False,
) -> torch.Tensor:
    """Normalise and rotate x [B, H, S, D]; positions [A, B|1, S], steps int64 [A, G, R], weight [D] or [H * D]."""
    y = rms_norm(x, weight, eps, row)
    cos, sin = cos_sin(positions, steps, shift, y.dtype)
    return rotate(y, cos * scale, sin * scale, interleaved).to(x.dtype)
