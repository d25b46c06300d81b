"""`dpc_knn`: clusters around density peaks, the same every time."""

from __future__ import annotations

from typing import Any, cast

import torch

from saccade import _dispatch
from saccade._arguments import whole
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import float64_refusals
from saccade.merge._check import check_values
from saccade.merge.match import build_plan, scores_of
from saccade.merge.plan import MergePlan
from saccade.merge.retention import keep_top
from saccade.reference import knn_density as reference
from saccade.reference.match import L2

__all__ = ["dpc_knn"]


MOST_NEIGHBOURS = 32  # that the CUDA kernel keeps at hand


def _case(x: torch.Tensor, clusters: int = 1, k: int = 5, **_: Any) -> Case:
    many = (("cuda", f"takes k up to {MOST_NEIGHBOURS}, got {k}"),) if k > MOST_NEIGHBOURS else ()
    return _dispatch.case_of(x.detach(), refused=float64_refusals(x) + many)


@_dispatch.public_op(_case)
def dpc_knn(x: torch.Tensor, clusters: int, k: int = 5, *, impl: Impl = "auto") -> MergePlan:
    """Plan to merge tokens into clusters around density peaks (DPC-KNN, Du et al. 2016; Chat-UniVi, arXiv 2311.08046, section 3.1).

        density_n = exp(-mean over the k nearest m, n itself among them, of |x_n - x_m|^2 / C)
        delta_n   = distance to the nearest token of higher density; the largest of all for the densest

    The centres are the tokens with the largest density * delta, and every other token goes to the nearest centre. Equal densities: the
    earlier token counts as denser (Chat-UniVi and HoliTom add random noise instead, so that no two runs agree); equal products and
    distances: the earlier too. The product is ranked by its logarithm, which does not underflow where tokens lie far apart. Neither the
    N x N distances nor a copy of x sorted by density exist: two passes, of density and of `match` with score "l2". No gradient.

    Args:
        x: [B, N, C], fp32, fp16, bf16 (fp64 by the reference), any strides.
        clusters: how many, 1 to N.
        k: nearest neighbours of the density, 1 to N; the CUDA kernel takes up to 32.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        A `MergePlan` of `clusters` rows: `plan.head` [B, clusters] are the centres, ascending, `plan.inverse` [B, N] the cluster of each
        token, and `merge(x, plan)` takes the means. Tokens that are not finite are in no cluster (-1), unless fewer others than
        clusters are left.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.tensor([[[0.0], [0.1], [5.0], [0.2], [5.1]]])
        >>> plan = merge.dpc_knn(x, 2, k=2)
        >>> plan.head.tolist(), plan.inverse.tolist()
        ([[0, 2]], [[0, 0, 1, 0, 1]])
    """
    x = check_values("x", x, "[B, N, C]").detach()
    batch, tokens, _ = x.shape
    if batch == 0 or tokens == 0:
        raise ValueError(f"x: expected at least one sample and one token, got {list(x.shape)}")
    for name, value in (("clusters", clusters), ("k", k)):
        if whole(value, name, 1) > tokens:
            raise ValueError(f"{name}: expected at most {tokens}, the number of tokens, got {value}")
    chosen = cast(Impl, _dispatch.select("dpc_knn", impl, _case(x, clusters, k)))
    sparse = (reference.knn_density if chosen == "reference" else raw("knn_density", chosen))(x, int(k))

    order = sparse.argsort(dim=1, stable=True).int()  # the densest first
    denser = torch.arange(tokens, dtype=torch.int32, device=x.device)
    denser = torch.stack((torch.zeros_like(denser), denser), 1)[
        None, :, None
    ].contiguous()  # the i-th may choose before i
    nearest, target = scores_of(x, (order, order), denser, None, L2, chosen)
    rank = 0.5 * (-nearest).log() - sparse  # log(delta * density), but for a constant
    rank = rank.masked_fill(target < 0, float("-inf"))
    rank = torch.where(target == -2, float("nan"), rank)  # last
    densest = torch.zeros_like(target, dtype=torch.bool).scatter(1, order[:, :1].long(), True)
    rank = torch.where(densest & (target != -2), float("inf"), rank)
    centres = keep_top(rank, clusters, impl=chosen)

    src = torch.arange(tokens, dtype=torch.int32, device=x.device)[None]
    score, target = scores_of(x, (src, centres.int()), None, None, L2, chosen)
    centre = torch.zeros_like(target, dtype=torch.bool).scatter(1, centres, True)
    target = torch.where(centre & (target >= 0), -1, target)
    return build_plan(score, target, r=tokens - clusters, impl=chosen)
