r"""The way back: every token takes the row it was merged into.

    out_n = residual_n + gate_n * y[inverse_n]

A dropped token (inverse -1) takes 0 in place of y. Products and sums are fp32 (fp64 for fp64), rounded once.
Gradients: dy = sum over the members of gate * dout, dgate = dout * y[inverse] summed over the axes it is broadcast along, dresidual = dout.
"""

from __future__ import annotations

import torch

from saccade.reference.match import compute_dtype


def unmerge(
    y: torch.Tensor, inverse: torch.Tensor, residual: torch.Tensor | None, gate: torch.Tensor | None
) -> torch.Tensor:
    """Out [B, N, D] in y's dtype.

    Args:
        y: [B, M, D].
        inverse: [1|B, N] int32.
        residual: [B, N, D], or None.
        gate: [1|B, 1|N, D], or None.
    """
    batch, rows, width = y.shape
    wide = y.to(compute_dtype(y))
    row = inverse.long().expand(batch, -1)[..., None]
    out = wide.gather(1, row.clamp(min=0).expand(-1, -1, width)) if rows else wide.new_zeros(batch, row.shape[1], width)
    out = out.where(row >= 0, 0.0)
    if gate is not None:
        out = out * gate.to(wide.dtype)
    if residual is not None:
        out = out + residual.to(wide.dtype)
    return out.to(y.dtype)
