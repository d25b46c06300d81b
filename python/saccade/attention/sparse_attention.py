"""`sparse_attention`: attention over the blocks that a layout lists, forward and backward."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch.autograd.function import once_differentiable

from saccade import _dispatch
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import dense_columns, float64_refusals
from saccade.attention import _check
from saccade.attention.layout import BlockLayout
from saccade.reference import sparse_attention as reference

__all__ = ["sparse_attention"]

Tensor = torch.Tensor
NO_FLOAT32 = "no float32 CUDA kernel of this op (tensor cores take 16-bit values); Triton's runs in full fp32"
LAYOUT = 12  # tensors of BlockLayout.tensors()


def refusals(q: Tensor) -> tuple[tuple[str, str], ...]:
    """What the kernels that multiply probabilities with values do not take."""
    return float64_refusals(q) or ((("cuda", NO_FLOAT32),) if q.dtype == torch.float32 else ())


def _case(q: Tensor, k: Tensor, v: Tensor, layout: Any, **kwargs: Any) -> Case:
    return _dispatch.case_of(q, k, v, kwargs.get("bias"), kwargs.get("key_bias"), refused=refusals(q))


class _SparseAttention(torch.autograd.Function):
    """dK and dV follow the transposed lists, dQ the lists themselves: no atomics, the same bits every time."""

    @staticmethod
    def forward(ctx: Any, q, k, v, bias, key_bias, numbers, impl, *lists):  # type: ignore[no-untyped-def]
        ctx.numbers, ctx.impl = numbers, impl
        out, lse = raw("sparse_attention", impl)(q, k, v, *lists[:LAYOUT], bias, key_bias, *numbers)
        ctx.save_for_backward(q, k, v, out, lse, bias, key_bias, *lists)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dlse):  # type: ignore[no-untyped-def]
        q, k, v, out, lse, bias, key_bias, *lists = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * (7 + len(lists))
        dout = torch.zeros_like(out) if dout is None else dense_columns(dout)
        dlse = None if dlse is None else dlse.contiguous()
        dq, dk, dv, dkey_bias, delta = raw("sparse_attention_bwd", ctx.impl)(
            dout, dlse, q, k, v, out, lse, *lists, bias, key_bias, *ctx.numbers
        )
        dbias = None
        if bias is not None and ctx.needs_input_grad[3]:
            dbias = raw("attention_bias_grad", ctx.impl)(
                dout, q, k, v, lse, delta, *lists[:LAYOUT], bias, key_bias, *ctx.numbers
            )
        if key_bias is None or not ctx.needs_input_grad[4]:
            dkey_bias = None
        else:
            dkey_bias = dkey_bias.sum(1)
            dkey_bias = dkey_bias.sum(0, keepdim=True) if key_bias.shape[0] == 1 else dkey_bias
        return dq, dk, dv, dbias, dkey_bias, None, None, *(None,) * len(lists)


@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, bias: Tensor | None = None, key_bias: Tensor | None = None,
    scale: float | None = None, return_lse: Literal[False] = False, impl: Impl = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, bias: Tensor | None = None, key_bias: Tensor | None = None,
    scale: float | None = None, return_lse: Literal[True], impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@_dispatch.public_op(_case)
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the pairs that a layout shows; the other blocks are never read.

        s_ij = scale * (q_i . k_j) + bias_ij + key_bias_j,   lse_i = log(sum of exp(s_ij)),   out_i = sum of exp(s_ij - lse_i) v_j

    with sums over the keys j that i sees. Scores and sums are fp32, out is rounded once. A query that sees nothing gets 0, and lse
    -inf. A key that a query does not see never touches it, also where it is not finite. Differentiable in q, k, v, bias and key_bias,
    through out and lse, without atomics: the same bits every time.

    Args:
        q: [B, H, Sq, D], fp32, fp16, bf16 (fp64 by the reference), any strides. D a multiple of 8, at most 256.
        k, v: [B, Hk, Sk, D]; Hk divides H, query head h reads head `h // (H / Hk)`.
        layout: a `BlockLayout` for Sq and Sk, of 1 or B samples and 1 or H heads.
        bias: [1|B, 1|H, Sq, Sk] of q's dtype or fp32, added to the scores (`LearnedSparseMask.bias`, SwinBERT's -10^4 (1 - sigmoid)). Its
            gradient is summed over the samples and heads that share it; 0 for pairs that the layout does not show.
        key_bias: [1|B, Sk], added to every score of a key: the logarithm of a merged token's size makes attention proportional
            (Bolya et al. 2023, ToMe, equation 1; `merge(..., log_size=True)`).
        scale: of q.k; 1 / sqrt(D) where None.
        return_lse: also return lse [B, H, Sq] fp32, natural logarithm.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        out [B, H, Sq, D] in q's dtype, or (out, lse).

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade.attention import BlockLayout, sparse_attention
        >>> q, k, v = torch.randn(3, 1, 2, 200, 64).unbind()
        >>> layout = BlockLayout.dense(200, 200)
        >>> torch.allclose(sparse_attention(q, k, v, layout), torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5)
        True
    """
    q, k, v = _check.check_qkv(q, k, v)
    layout = _check.check_layout(layout, q, k)
    if bias is not None:
        bias = _check.check_bias(bias, q, k.shape[2])
    if key_bias is not None:
        key_bias = _check.check_key_bias(key_bias, q, k.shape[2])
    scale = _check.check_scale(scale, q.shape[3])
    case = _case(q, k, v, layout, bias=bias, key_bias=key_bias)
    chosen = _dispatch.select("sparse_attention", impl, case)
    if chosen == "reference":
        out, lse = reference.sparse_attention(q, k, v, layout.to_mask(), bias, key_bias, scale)
        return (out, lse) if return_lse else out
    numbers, lists = (layout.q_block, layout.k_block, scale), layout.tensors()
    if case.needs_grad:
        full, partial = layout.transposed()
        back = (*full[:3], *((None,) * 4 if partial is None else partial))
        out, lse = _SparseAttention.apply(q, k, v, bias, key_bias, numbers, chosen, *lists, *back)
    else:
        out, lse = raw("sparse_attention", chosen)(q, k, v, *lists, bias, key_bias, *numbers)
    return (out, lse) if return_lse else out
