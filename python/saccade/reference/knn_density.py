r"""How close a row's nearest neighbours are (DPC-KNN, Du et al. 2016, eq. 5, as Chat-UniVi and HoliTom use it).

    out_n = mean over the k nearest m (n itself among them) of |x_n - x_m|^2 / C        density_n = exp(-out_n)

A row whose squared norm is not finite has no neighbours and is no neighbour: its result is +inf, so its density 0. Where fewer than k rows
are finite, the mean is over those. Products and norms in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch

from saccade.reference.match import compute_dtype


def knn_density(x: torch.Tensor, k: int) -> torch.Tensor:
    """Out [B, N] in the compute dtype, for x [B, N, C]; 1 <= k <= N."""
    wide = x.to(compute_dtype(x))
    squares = (wide * wide).sum(-1)
    finite = squares.isfinite()
    wide, squares = wide.where(finite[..., None], 0.0), squares.where(finite, 0.0)
    distance = (squares[..., :, None] + squares[..., None, :] - 2 * wide @ wide.mT).clamp(min=0)
    distance = distance.masked_fill(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), 0.0)
    distance = distance.masked_fill(~finite[:, None, :], float("inf"))
    nearest = distance.topk(k, -1, largest=False).values
    number = nearest.isfinite().sum(-1).clamp(min=1)
    mean = nearest.where(nearest.isfinite(), 0.0).sum(-1) / number / x.shape[2]
    return mean.where(finite, float("inf"))
