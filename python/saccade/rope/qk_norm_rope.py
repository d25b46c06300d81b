"""`qk_norm_rope`: RMS-normalise q and k and rotate them, in one pass over memory."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from saccade import _dispatch
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import dense_columns
from saccade.reference import qk_norm_rope as reference
from saccade.rope._check import check_inplace, check_pair, check_positions
from saccade.rope.apply_rope import Pair
from saccade.rope.spec import RopeSpec

__all__ = ["qk_norm_rope"]


def _case(
    q: torch.Tensor,
    k: torch.Tensor | None,
    positions: torch.Tensor,
    spec: RopeSpec,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    **_: Any,
) -> Case:
    return _dispatch.case_of(q, k, q_weight, k_weight)


def _check_weight(name: str, weight: torch.Tensor | None, x: torch.Tensor | None, row: bool) -> None:
    if weight is None:
        return
    if x is None:
        raise ValueError(f"{name}: there is no k to normalise, expected None")
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(weight).__name__}")
    expected = x.shape[1] * x.shape[3] if row else x.shape[3]
    form = "[Hq * D]" if row else "[D]"
    if weight.shape != (expected,):
        raise ValueError(f"{name}: expected {form} = [{expected}], got {list(weight.shape)}")
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        raise TypeError(f"{name}: expected dtype float32 or that of q, {x.dtype}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"{name}: expected the device of q, {x.device}, got {weight.device}")


class _QkNormRope(torch.autograd.Function):
    """Backward recomputes the row statistics from x: 4 bytes a row saved, nothing of size [S, D]."""

    @staticmethod
    def forward(ctx: Any, q, k, q_weight, k_weight, positions, steps, static, impl):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, q_weight, k_weight, positions, steps)
        ctx.static, ctx.impl = static, impl
        return raw("qk_norm_rope", impl)(q, k, q_weight, k_weight, positions, steps, *static)

    @staticmethod
    def backward(ctx: Any, dq, dk):  # type: ignore[no-untyped-def]
        q, k, q_weight, k_weight, positions, steps = ctx.saved_tensors
        dq, dk = dense_columns(dq), None if k is None else dense_columns(dk)
        op = raw("qk_norm_rope_bwd", ctx.impl)
        dq, dk, dq_weight, dk_weight = op(dq, dk, q, k, q_weight, k_weight, positions, steps, *ctx.static)
        return (
            dq,
            None if k is None else dk,
            None if q_weight is None else dq_weight.to(q_weight.dtype),
            None if k_weight is None else dk_weight.to(k_weight.dtype),
            *(None,) * 4,
        )


@_dispatch.public_op(_case)
def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    positions: torch.Tensor,
    spec: RopeSpec,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    *,
    norm: Literal["head", "row"] = "head",
    eps: float = 1e-6,
    inplace: bool = False,
    impl: Impl = "auto",
) -> Pair:
    """RMS-normalise q and k (arXiv 1910.07467, eq. 4), then rotate them as `apply_rope` does, in one pass.

    Statistics, weight and rotation are fp32 (fp64 for fp64), rounded once on store.

    Args:
        q: [B, Hq, S, D], fp32, fp16, bf16 (fp64 on CPU and reference), last stride 1.
        k: [B, Hk, S, D] of q's dtype and device, or None.
        positions: [A, S] or [A, B, S] (also [S] where the spec has one axis).
        spec: what turns, and how fast; its frequencies must be static.
        q_weight: [D] for norm="head", [Hq * D] for norm="row"; q's dtype or fp32; None means 1.
        k_weight: [D] or [Hk * D] likewise.
        norm: "head" over the D columns of each head (Qwen3, HunyuanVideo), "row" over all heads together (Wan, LTX).
        eps: added to the mean square, >= 0.
        inplace: write into q and k and return them.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        (q, k) normalised and rotated; k is None where none came.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import rope
        >>> q = torch.full((1, 4, 3, 64), 7.0)
        >>> out, _ = rope.qk_norm_rope(q, None, torch.arange(3), rope.vanilla(64, base=10000.0), None, None, eps=0.0)
        >>> float(out.square().mean())
        1.0
    """
    check_pair(q, k, spec)
    positions = check_positions(positions, q, spec)
    if norm not in ("head", "row"):
        raise ValueError(f'norm: expected "head" or "row", got {norm!r}')
    row = norm == "row"
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not math.isfinite(eps) or eps < 0:
        raise ValueError(f"eps: expected a finite number >= 0, got {eps!r}")
    _check_weight("q_weight", q_weight, q, row)
    _check_weight("k_weight", k_weight, k, row)
    if k is not None and q_weight is not None and k_weight is not None and q_weight.dtype != k_weight.dtype:
        raise TypeError(f"k_weight: expected the dtype of q_weight, {q_weight.dtype}, got {k_weight.dtype}")
    if spec.learned:
        raise ValueError(
            "spec: qk_norm_rope takes static frequencies; for learned ones normalise first, then apply_rope"
        )
    if inplace:
        check_inplace(q, k)
        if torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in (q_weight, k_weight)):
            raise ValueError("inplace: a weight requires grad; use inplace=False or torch.no_grad()")
    case = _case(q, k, positions, spec, q_weight, k_weight)
    chosen = _dispatch.select("qk_norm_rope", impl, case)
    if chosen == "reference":
        return _by_reference(q, k, positions, spec, q_weight, k_weight, float(eps), row, inplace)
    steps = spec.steps(q.device)
    static = (spec.shift, *spec.active, spec.pairing == "interleaved", spec.attention_factor, float(eps), row)
    if inplace:
        raw("qk_norm_rope_", chosen)(q, k, q_weight, k_weight, positions, steps, *static)
        return q, k
    if case.needs_grad:
        # Dynamo refuses an autograd.Function that gets one tensor twice.
        k = k.view_as(k) if k is not None and k is q else k
        k_weight = k_weight.view_as(k_weight) if k_weight is not None and k_weight is q_weight else k_weight
        q_out, k_out = _QkNormRope.apply(q, k, q_weight, k_weight, positions, steps, static, chosen)
    else:
        q_out, k_out = raw("qk_norm_rope", chosen)(q, k, q_weight, k_weight, positions, steps, *static)
    return q_out, None if k is None else k_out


def _by_reference(
    q: torch.Tensor,
    k: torch.Tensor | None,
    positions: torch.Tensor,
    spec: RopeSpec,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    row: bool,
    inplace: bool,
) -> Pair:
    interleaved, scale = spec.pairing == "interleaved", spec.attention_factor

    def one(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        steps = spec.steps(x.device)
        out = reference.qk_norm_rope(
            x, weight, positions, steps, shift=spec.shift, interleaved=interleaved, scale=scale, eps=eps, row=row
        )
        return x.copy_(out) if inplace else out

    return one(q, q_weight), None if k is None else one(k, k_weight)
