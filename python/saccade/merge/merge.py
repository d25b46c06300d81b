"""`merge`: tokens to rows along a plan."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch.autograd.function import once_differentiable

from saccade import _dispatch
from saccade._arguments import choice
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import dense_columns, float64_refusals
from saccade.merge._check import check_values, check_weights
from saccade.merge.plan import MergePlan
from saccade.reference import merge as reference

__all__ = ["merge"]

_MODES = {"mean": reference.MEAN, "sum": reference.SUM, "max": reference.MAX, "replace": reference.REPLACE}


def _case(x: torch.Tensor, plan: MergePlan, size: torch.Tensor | None = None, **_: Any) -> Case:
    return _dispatch.case_of(x, refused=float64_refusals(x))


class _Merge(torch.autograd.Function):
    """Linear in x (max: in the member that attains it), so backward is a gather along the plan."""

    @staticmethod
    def forward(ctx: Any, x, weight, inverse, ptr, members, head, mode, impl):  # type: ignore[no-untyped-def]
        y, total, log_total = raw("merge", impl)(x, weight, ptr, members, head, mode)
        ctx.save_for_backward(x if mode == reference.MAX else None, weight, total, inverse, ptr, members, head)
        ctx.mode, ctx.impl = mode, impl
        ctx.mark_non_differentiable(total, log_total)
        return y, total, log_total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, *_):  # type: ignore[no-untyped-def]
        dx = raw("merge_bwd", ctx.impl)(dense_columns(dy), *ctx.saved_tensors, ctx.mode)
        return dx, *(None,) * 7


def run(
    x: torch.Tensor, weight: torch.Tensor | None, plan: MergePlan, mode: int, chosen: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Y, total and log(total) by the implementation `chosen`; differentiable in x."""
    if chosen == "reference":
        return reference.merge(x, weight, plan.inverse, plan.head, mode)
    if torch.is_grad_enabled() and x.requires_grad:
        parts = _Merge.apply(x, weight, plan.inverse, plan.ptr, plan.members, plan.head, mode, chosen)
    else:
        parts = raw("merge", chosen)(x, weight, plan.ptr, plan.members, plan.head, mode)
    return parts  # type: ignore[no-any-return]


Two = tuple[torch.Tensor, torch.Tensor]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Mode = Literal["mean", "sum", "max", "replace", "weighted"]


@overload
def merge(x: torch.Tensor, plan: MergePlan, size: torch.Tensor | None = ..., *, mode: Mode = ..., weight: torch.Tensor | None = ...,
          log_size: Literal[False] = ..., impl: Impl = ...) -> Two: ...  # fmt: skip
@overload
def merge(x: torch.Tensor, plan: MergePlan, size: torch.Tensor | None = ..., *, mode: Mode = ..., weight: torch.Tensor | None = ...,
          log_size: Literal[True], impl: Impl = ...) -> Three: ...  # fmt: skip
@_dispatch.public_op(_case)
def merge(
    x: torch.Tensor,
    plan: MergePlan,
    size: torch.Tensor | None = None,
    *,
    mode: Mode = "mean",
    weight: torch.Tensor | None = None,
    log_size: bool = False,
    impl: Impl = "auto",
) -> Two | Three:
    """Merge the tokens of x along a plan (ToMe, arXiv 2210.09461, section 3.2).

    Sums are fp32 in the order of the tokens, rounded once: the same bits from run to run and for any batch. Differentiable in x.

    Args:
        x: [B, N, D], fp32, fp16, bf16 (fp64 by the reference), any strides.
        plan: of `match`; one of batch 1 serves any batch.
        size: [B, N, 1] (or [B, N]), how many original tokens each stands for; None for 1. No gradient.
        mode: "mean" weighted by size; "sum"; "max" per column; "replace", the destination alone (VidToMe); "weighted", the mean weighted
            by `weight` (plain where a row's weights are all zero).
        weight: [B, N, 1] (or [B, N]), >= 0, for mode "weighted". No gradient.
        log_size: whether to return log(size) too: added to the attention scores of each key, it makes attention exactly
            proportional (ToMe, eq. 1).
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        (y [B, M, D] in x's dtype, size [B, M, 1] fp32), and log(size) [B, M, 1] where asked. Rows of padding are 0, with size 0 and log
        size -inf.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
        >>> y, size = merge.merge(x, merge.match(x, 1))
        >>> y[0, 0].tolist(), size[0, :, 0].tolist()
        ([2.0, 0.0], [2.0, 1.0, 1.0])
    """
    x = check_values("x", x)
    if not isinstance(plan, MergePlan):
        raise TypeError(f"plan: expected a MergePlan, got {type(plan).__name__}")
    plan.check(x, "x", plan.tokens, "tokens")
    choice(mode, "mode", (*_MODES, "weighted"))
    if (weight is not None) != (mode == "weighted"):
        raise ValueError(f'weight: expected with mode="weighted", and only there; got mode={mode!r}')
    batch, tokens, _ = x.shape
    sizes = None if size is None else check_weights("size", size, batch, tokens, x, "x")
    chosen = _dispatch.select("merge", impl, _case(x, plan))
    if weight is None:
        y, total, log_total = run(x, sizes, plan, _MODES[mode], chosen)
    else:
        weights = check_weights("weight", weight, batch, tokens, x, "x")
        none = x.detach().new_empty(batch, tokens, 0)
        sums = run(none, weights, plan, reference.SUM, chosen)[1]
        own = sums.gather(1, plan.inverse.long().clamp(min=0).expand(batch, -1)) if plan.rows else sums.new_empty(0)
        weights = torch.where(own == 0, 1.0, weights) if plan.rows else weights
        y = run(x, weights, plan, reference.MEAN, chosen)[0]
        _, total, log_total = run(none, sizes, plan, reference.SUM, chosen)
    return (y, total[..., None], log_total[..., None]) if log_size else (y, total[..., None])
