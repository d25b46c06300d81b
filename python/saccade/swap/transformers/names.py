"""Names for transformers' own way of choosing attention: `model.set_attn_implementation("saccade_dense")`.

For models that no adapter knows, and for configs and serving code that select attention by a name. A name alone carries no recipe, so both
are exact. transformers drops the mask where a name has no mask function; each name here has that of "sdpa".
"""

from __future__ import annotations

from typing import Any

import torch

from saccade.attention import patterns, sparse_attention
from saccade.swap.attend import dense_layout, unfit_heads

__all__ = ["NAMES", "register_transformers"]

Tensor = torch.Tensor
NAMES = ("saccade_dense", "saccade_flash")


def _sdpa(*arguments: Any, **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: tuple[Tensor, None] = sdpa_attention_forward(*arguments, **kwargs)
    return out


def _served(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> bool:
    """Where our kernel is the faster one, and means the same: measured on a CPU only."""
    plain = mask is None and not dropout and q.device.type == "cpu"
    return plain and q.shape[3] == v.shape[3] and unfit_heads(q.shape[3], q.dtype) is None


def dense(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """q [B, H, Sq, D], k and v [B, Hk, Sk, D] -> ([B, Sq, H, D], no weights). With a mask or dropout transformers' "sdpa" runs."""
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and queries > 1 and attention_mask is None
    special = kwargs.get("position_bias") is not None or kwargs.get("s_aux") is not None
    if special or (causal and queries != keys) or not _served(query, key, value, attention_mask, dropout):
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return _sdpa(module, query, key, value, attention_mask, **options, **kwargs)
    layout = patterns.causal(queries) if causal else dense_layout(queries, keys)
    return sparse_attention(query, key, value, layout, scale=scaling).transpose(1, 2).contiguous(), None


def flash(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `dense`; with `cu_seq_lens_q` (vision towers that ask for flash attention) one call over packed sequences."""
    offsets = kwargs.get("cu_seq_lens_q")
    if offsets is None:
        return dense(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if dropout:
        raise ValueError(f"dropout: saccade_flash has none, got {dropout}; set attention_dropout to 0")
    layout = patterns.packed(offsets, query.shape[2], causal=bool(is_causal))
    return sparse_attention(query, key, value, layout, scale=scaling).transpose(1, 2).contiguous(), None


def register_transformers() -> tuple[str, ...]:
    """Make Saccade's names known to transformers, for the whole process; no model changes until it is told a name.

    "saccade_dense" is exact attention for any model: `model.set_attn_implementation("saccade_dense")`. "saccade_flash" is for vision towers
    that pack windows or frames (Qwen-VL, GLM-4V and their kind), and only as part of a dictionary, because transformers looks for a package
    behind a plain name with "flash" in it: `model.set_attn_implementation({"vision_config": "saccade_flash"})`. `saccade.accelerate` needs
    neither.

    Returns:
        The names.

    Raises:
        ImportError: where transformers is not installed.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for name, function in zip(NAMES, (dense, flash), strict=True):
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        AttentionInterface.register(name, function)
    return NAMES
