"""What the attention map says of tokens, without the map: column sums, normalisers, entropies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from saccade import _dispatch
from saccade._arguments import choice, whole
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import float64_refusals, names
from saccade.attention import _check
from saccade.reference import attention_columns as columns_reference
from saccade.reference import attention_rows as rows_reference

__all__ = ["attention_entropy", "attention_lse", "token_importance"]

Tensor = torch.Tensor
Rows = Literal["all", "last"] | int | Sequence[int] | Tensor


def _case(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Case:
    return _dispatch.case_of(q.detach(), k.detach(), refused=float64_refusals(q))


def _rows(rows: Any, queries: int, device: torch.device) -> Tensor | None:
    """int32 [R], or None for all."""
    if isinstance(rows, str):
        if choice(rows, "rows", ("all", "last")) == "all":
            return None
        rows = -1
    if isinstance(rows, Tensor):
        if rows.dtype not in (torch.int32, torch.int64) or rows.ndim != 1:
            raise ValueError(f"rows: expected an int32 or int64 tensor [R], got {names(rows.dtype)} {list(rows.shape)}")
        if rows.device != device:
            raise ValueError(f"rows: expected the device of q, {device}, got {rows.device}")
        return rows.to(torch.int32).contiguous()
    if not isinstance(rows, Sequence):
        rows = (whole(rows, "rows"),)
    found = []
    for n, row in enumerate(rows):
        place = whole(row, f"rows[{n}]")
        if not -queries <= place < queries:
            raise ValueError(f"rows[{n}]: expected {-queries} to {queries - 1}, one of the queries, got {place}")
        found.append(place % queries)
    return torch.tensor(found, dtype=torch.int32, device=device)


def _prepared(q: Any, k: Any, rows: Any, causal: Any, key_bias: Any, scale: Any) -> tuple[Any, ...]:
    q, k = _check.check_qk(q, k)
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected True or False, got {causal!r}")
    if key_bias is not None:
        key_bias = _check.check_key_bias(key_bias.detach() if isinstance(key_bias, Tensor) else key_bias, q, k.shape[2])
    scale = _check.check_scale(scale, q.shape[3])
    return q.detach(), k.detach(), _rows(rows, q.shape[2], q.device), key_bias, causal, scale


def _statistics(chosen: str, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    op = rows_reference.attention_rows if chosen == "reference" else raw("attention_rows", chosen)
    lse, entropy = op(*arguments)
    return lse, entropy


@_dispatch.public_op(_case)
def token_importance(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    rows: Rows = "all",
    reduce: Literal["mean", "sum", "max"] = "mean",
    causal: bool = False,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """How much attention each token gets from the queries asked for, without an attention map.

        importance_j = reduce over heads of   1 / R  sum over queries i of  exp(scale * q_i . k_j + key_bias_j - lse_i)

    The measure by which FastV (Chen et al. 2024, arXiv 2403.06764; `rows="last"` or all), H2O (Zhang et al. 2023,
    arXiv 2306.14048; all rows, causal) and FasterVLM or VisionZip (the class token: `rows=0`) choose the tokens to keep. Any two rows
    of q and k serve: queries of text against keys of a video, for instance. Sums are fp32 and taken in one order: the same bits every
    time. No gradient reaches q and k.

    Args:
        q: [B, H, Sq, D], fp32, fp16, bf16 (fp64 by the reference), any strides. D a multiple of 8, at most 256.
        k: [B, Hk, Sk, D]; Hk divides H.
        lse: [B, H, Sq] fp32, natural logarithm, where attention has returned it: with it one product is computed, else two.
        rows: queries asked for: "all", "last", one position, several, or a tensor [R] of int32 or int64, which is not read on the
            host (an entry outside the queries then counts as a query that sees nothing). Negative positions count from the end, not
            in a tensor.
        reduce: over heads.
        causal: query i sees the keys up to i + Sk - Sq.
        key_bias: [1|B, Sk], added to every score of a key; -inf hides a padding token.
        scale: of q.k; 1 / sqrt(D) where None.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        [B, Sk] fp32 (fp64 for fp64). With "mean" it sums to 1 in each sample, where every query sees something.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade.attention.importance import token_importance
        >>> q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4, 8)
        >>> token_importance(q, k, rows=0, key_bias=torch.tensor([[0.0, 0.0, 0.0, float("-inf")]]))
        tensor([[0.3333, 0.3333, 0.3333, 0.0000]])
    """
    choice(reduce, "reduce", ("mean", "sum", "max"))
    arguments = _prepared(q, k, rows, causal, key_bias, scale)
    asked: Tensor | None = arguments[2]
    if lse is not None:
        lse = _check_lse(lse, arguments[0])
    chosen = _dispatch.select("token_importance", impl, _case(q, k))
    if lse is None:
        lse, _ = _statistics(chosen, arguments)
    elif asked is not None:
        lse = _taken(lse, asked)
    op: Any = columns_reference.attention_columns if chosen == "reference" else raw("attention_columns", chosen)
    found: Tensor = op(*arguments[:2], lse, *arguments[2:])
    found = found / max(lse.shape[2], 1)
    if reduce == "max":
        return found.amax(1)
    return found.mean(1) if reduce == "mean" else found.sum(1)


def _check_lse(lse: Any, q: Tensor) -> Tensor:
    wanted = f"a float32 tensor {list(q.shape[:3])}, one for every query"
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse: expected {wanted}, got {type(lse).__name__}")
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse: expected {wanted}, got {names(lse.dtype)}")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse: expected {wanted}, got shape {list(lse.shape)}")
    if lse.device != q.device:
        raise ValueError(f"lse: expected the device of q, {q.device}, got {lse.device}")
    return lse.detach().to(torch.float64 if q.dtype == torch.float64 else torch.float32).contiguous()


def _taken(lse: Tensor, rows: Tensor) -> Tensor:
    """lse [B, H, R] of the rows asked for; -inf of one that does not exist."""
    queries = lse.shape[2]
    if queries == 0:
        return lse.new_full((*lse.shape[:2], len(rows)), float("-inf"))
    there = (rows >= 0) & (rows < queries)
    return lse.index_select(2, rows.clamp(0, queries - 1)).masked_fill(~there, float("-inf"))


@_dispatch.public_op(_case)
def attention_lse(
    q: Tensor,
    k: Tensor,
    *,
    rows: Rows = "all",
    causal: bool = False,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """log sum_j exp(scale * q_i . k_j + key_bias_j), natural: what a softmax row is divided by.

    exp(lse of a sparse attention - this) is the share of the attention that its layout catches. -inf where a query sees nothing.

    Args:
        q, k, rows, causal, key_bias, scale, impl: as of `token_importance`.

    Returns:
        [B, H, R] fp32 (fp64 for fp64), without gradient.

    Example:
        >>> import torch
        >>> from saccade.attention.importance import attention_lse
        >>> attention_lse(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 4, 8))
        tensor([[[1.3863, 1.3863]]])
    """
    arguments = _prepared(q, k, rows, causal, key_bias, scale)
    return _statistics(_dispatch.select("attention_lse", impl, _case(q, k)), arguments)[0]


@_dispatch.public_op(_case)
def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    rows: Rows = "all",
    causal: bool = False,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Entropy of attention rows, -sum_j P_ij log P_ij, in nats: 0 where a query attends to one key, log n where to n alike.

    Heads of low entropy bear sparse attention well; those of high entropy are the ones to keep dense. 0 where a query sees nothing.

    Args:
        q, k, rows, causal, key_bias, scale, impl: as of `token_importance`.

    Returns:
        [B, H, R] fp32 (fp64 for fp64), without gradient.

    Example:
        >>> import torch
        >>> from saccade.attention.importance import attention_entropy
        >>> attention_entropy(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8), causal=True)
        tensor([[[0.0000, 0.6931, 1.0986]]])
    """
    arguments = _prepared(q, k, rows, causal, key_bias, scale)
    return _statistics(_dispatch.select("attention_entropy", impl, _case(q, k)), arguments)[1]
