"""`unmerge`: rows back to tokens along a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from saccade import _dispatch
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import dense_columns, float64_refusals
from saccade.merge._check import check_device, check_like, check_values
from saccade.merge.plan import MergePlan
from saccade.reference import merge as merge_reference
from saccade.reference import unmerge as reference

__all__ = ["unmerge"]


def _case(y: torch.Tensor, plan: MergePlan, **kwargs: Any) -> Case:
    return _dispatch.case_of(y, kwargs.get("residual"), kwargs.get("gate"), refused=float64_refusals(y))


def _summed_to(d: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`d` summed over the axes that `shape` broadcasts along."""
    axes = [i for i, n in enumerate(shape) if n == 1 and d.shape[i] != 1]
    return d.sum(axes, keepdim=True) if axes else d


class _Unmerge(torch.autograd.Function):
    """Its gradient is a sum along the same plan: deterministic, without atomics."""

    @staticmethod
    def forward(ctx: Any, y, residual, gate, inverse, ptr, members, head, impl):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(
            y if gate is not None and ctx.needs_input_grad[2] else None, gate, inverse, ptr, members, head
        )
        ctx.impl = impl
        return raw("unmerge", impl)(y, inverse, residual, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        y, gate, inverse, ptr, members, head = ctx.saved_tensors
        dy = dgate = None
        if ctx.needs_input_grad[0]:
            through = dout if gate is None else dout * gate
            dy = raw("merge", ctx.impl)(dense_columns(through), None, ptr, members, head, merge_reference.SUM)[0]
        if y is not None:
            product = dout.float() * raw("unmerge", ctx.impl)(y, inverse, None, None).float()
            dgate = _summed_to(product, gate.shape).to(gate.dtype)
        return dy, dout if ctx.needs_input_grad[1] else None, dgate, *(None,) * 5


@_dispatch.public_op(_case)
def unmerge(
    y: torch.Tensor,
    plan: MergePlan,
    *,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Give every token the row it was merged into, in one pass with the residual and its gate.

        out_n = residual_n + gate_n * y[plan.inverse_n]

    A token that was dropped takes 0 in place of y. Products and sums are fp32, rounded once. Differentiable in y, residual and gate.

    Args:
        y: [B, M, D], fp32, fp16, bf16 (fp64 by the reference), any strides.
        plan: of `match`; one of batch 1 serves any batch.
        residual: [B, N, D] of y's dtype, or None.
        gate: [B, N, D], [B, 1, D], [1, N, D] or [1, 1, D] of y's dtype (AdaLN), or None.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        [B, N, D] in y's dtype.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
        >>> plan = merge.match(x, 1)
        >>> y, size = merge.merge(x, plan)
        >>> merge.unmerge(y, plan)[0].tolist()
        [[2.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    """
    y = check_values("y", y, "[B, M, D]")
    if not isinstance(plan, MergePlan):
        raise TypeError(f"plan: expected a MergePlan, got {type(plan).__name__}")
    plan.check(y, "y", plan.rows, "rows")
    batch, _, width = y.shape
    if residual is not None:
        residual = check_like("residual", residual, y, "y", (batch, plan.tokens, width))
    if gate is not None:
        gate = _gate(gate, y, plan.tokens)
    case = _case(y, plan, residual=residual, gate=gate)
    chosen = _dispatch.select("unmerge", impl, case)
    if chosen == "reference":
        return reference.unmerge(y, plan.inverse, residual, gate)
    if case.needs_grad:
        out = _Unmerge.apply(y, residual, gate, plan.inverse, plan.ptr, plan.members, plan.head, chosen)
    else:
        out = raw("unmerge", chosen)(y, plan.inverse, residual, gate)
    return out  # type: ignore[no-any-return]


def _gate(gate: Any, y: torch.Tensor, tokens: int) -> torch.Tensor:
    batch, _, width = y.shape
    if not isinstance(gate, torch.Tensor):
        raise TypeError(f"gate: expected a tensor [B, 1, D] or [B, N, D], got {type(gate).__name__}")
    shape = list(gate.shape)
    if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, tokens) or shape[2] != width:
        raise ValueError(f"gate: expected [{batch} or 1, {tokens} or 1, {width}], got {shape}")
    if gate.dtype != y.dtype:
        raise TypeError(f"gate: expected the dtype of y, {y.dtype}, got {gate.dtype}")
    check_device("gate", gate, y, "y")
    return dense_columns(gate)
