"""`apply_rope`: rotate q and k by their positions."""

from __future__ import annotations

from typing import Any

import torch

from saccade import _dispatch
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import dense_columns
from saccade.reference import apply_rope as reference
from saccade.rope._check import check_inplace, check_pair, check_positions
from saccade.rope.spec import RopeSpec

__all__ = ["apply_rope"]

Pair = tuple[torch.Tensor, torch.Tensor | None]


def _case(q: torch.Tensor, k: torch.Tensor | None, positions: torch.Tensor, spec: RopeSpec, **_: Any) -> Case:
    return _dispatch.case_of(q, k, spec.inv_freq if spec.learned else None)


class _ApplyRope(torch.autograd.Function):
    """Rotation is linear: its gradient is the inverse rotation, by the same op."""

    @staticmethod
    def forward(ctx: Any, q, k, inv_freq, positions, steps, static, impl):  # type: ignore[no-untyped-def]
        q_out, k_out = raw("apply_rope", impl)(q, k, positions, steps, *static, False)
        learned = inv_freq is not None and ctx.needs_input_grad[2]
        ctx.save_for_backward(positions, steps, *((q, k) if learned else (None, None)))
        ctx.static, ctx.impl, ctx.learned, ctx.has_k = static, impl, learned, k is not None
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, dq, dk):  # type: ignore[no-untyped-def]
        positions, steps, q, k = ctx.saved_tensors
        rotate, grad = raw("apply_rope", ctx.impl), None
        dq, dk = dense_columns(dq), dense_columns(dk) if ctx.has_k else None
        if not ctx.learned:
            dq, dk = rotate(dq, dk, positions, steps, *ctx.static, True)
        else:
            # In fp32: a sum over all tokens of products with dx would show dx rounded to 16 bits.
            wide = [None if t is None else t if t.dtype == torch.float64 else t.float() for t in (dq, dk, q, k)]
            dq, dk = rotate(wide[0], wide[1], positions, steps, *ctx.static, True)
            groups, pairs = steps.shape[1:]
            sum_up = raw("rope_freq_grad", ctx.impl)
            grad = sum_up(wide[2], wide[3], dq, dk if ctx.has_k else None, positions, groups, pairs, ctx.static[3])
            dq, dk = dq.to(q.dtype), dk.to(q.dtype)
        return dq, dk if ctx.has_k else None, grad, None, None, None, None


@_dispatch.public_op(_case)
def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    positions: torch.Tensor,
    spec: RopeSpec,
    *,
    inplace: bool = False,
    impl: Impl = "auto",
) -> Pair:
    """Rotate q and k by their positions (RoFormer, arXiv 2104.09864, eq. 15; every variant of `RopeSpec`).

    Angles are computed on the fly in 64-bit fixed-point turns, exact to fp32 rounding at any position up to 2^31; no table of
    cos and sin exists. Products are fp32 (fp64 for fp64), rounded once. Pairs of frequency zero keep their bits and, in place,
    cost no traffic.

    Args:
        q: [B, Hq, S, D], fp32, fp16, bf16 (fp64 on CPU and reference); any strides whose last is 1, so [B, S, H, D].transpose(1, 2)
            is taken as it is.
        k: [B, Hk, S, D] of q's dtype and device, or None.
        positions: [A, S] or [A, B, S] (also [S] where the spec has one axis), int32, int64, fp32 or fp64, fractional and
            negative allowed. A position that is not finite gives NaN.
        spec: what turns, and how fast.
        inplace: write into q and k and return them.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        (q, k) rotated, in the memory layout of the inputs; k is None where none came.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import rope
        >>> q, k = torch.ones(1, 4, 3, 64), torch.ones(1, 2, 3, 64)
        >>> q_out, k_out = rope.apply_rope(q, k, torch.arange(3), rope.vanilla(64, base=10000.0))
        >>> bool((q_out[:, :, 0] == q[:, :, 0]).all())  # position 0 is the identity
        True
    """
    check_pair(q, k, spec)
    positions = check_positions(positions, q, spec)
    if inplace:
        check_inplace(q, k)
    chosen = _dispatch.select("apply_rope", impl, _case(q, k, positions, spec))
    if inplace and spec.learned and torch.is_grad_enabled():
        raise ValueError("inplace: the spec's inv_freq requires grad; use inplace=False or torch.no_grad()")
    if chosen == "reference":
        return _by_reference(q, k, positions, spec, inplace)
    static = (spec.shift, *spec.active, spec.pairing == "interleaved", spec.attention_factor)
    inv_freq = spec.dense_tensor().to(q.device) if spec.learned else None
    steps = spec.steps(q.device)
    if inplace:
        raw("apply_rope_", chosen)(q, k, positions, steps, *static, False)
        return q, k
    if torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad) or inv_freq is not None):
        k = k.view_as(k) if k is not None and k is q else k  # Dynamo refuses one tensor twice
        q_out, k_out = _ApplyRope.apply(q, k, inv_freq, positions, steps, static, chosen)
    else:
        q_out, k_out = raw("apply_rope", chosen)(q, k, positions, steps, *static, False)
    return q_out, None if k is None else k_out


def _by_reference(
    q: torch.Tensor, k: torch.Tensor | None, positions: torch.Tensor, spec: RopeSpec, inplace: bool
) -> Pair:
    interleaved, scale = spec.pairing == "interleaved", spec.attention_factor

    def one(x: torch.Tensor) -> torch.Tensor:
        if spec.learned:
            inv_freq = spec.dense_tensor().to(x.device)
            out = reference.apply_rope_learned(x, positions, inv_freq, interleaved=interleaved, scale=scale)
        else:
            steps = spec.steps(x.device)
            out = reference.apply_rope(x, positions, steps, shift=spec.shift, interleaved=interleaved, scale=scale)
        return x.copy_(out) if inplace else out

    return one(q), None if k is None else one(k)
