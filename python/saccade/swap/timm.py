"""Token merging in timm's Vision Transformers (ToMe, arXiv 2210.09461), put in and taken out of one model.

Between attention and MLP, tokens whose keys are alike become one. Everything else of the model stays: q/k norm, gates, layer scale, drop
path, fused attention, hooks on its modules. Attention itself is timm's own, given log(size) as a bias of each key.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from saccade._arguments import choice
from saccade._dispatch import Impl
from saccade.merge.merge import merge
from saccade.merge.modules import TokenMerger
from saccade.merge.presets import TowerMerging
from saccade.merge.schedule import MergeSchedule
from saccade.swap.instance import Site, SwapRefused, fingerprint

__all__ = ["Merged", "merge_tokens", "restore"]

# Fingerprints of the sources that are replaced or relied on: timm 1.0.29 to 1.0.31.
_VERSIONS = "timm 1.0.29 to 1.0.31"
_TESTED = {
    "forward": {"d9c03b9f74392f5e"},
    "forward_features": {"ae01cfa3e38a90b1"},
    "forward_head": {"833d8581d18cd320", "13f012af2067a0ca"},  # VisionTransformer; VisionTransformerDistilled
    "pool": {"2f21e661be016c3c"},
    "global_pool_nlc": {"c9260fae5fe7fa98"},
    "block": {"353c39e4b6e64a6b"},
    "attention": {"e3480432257cd7b8"},
    "attn_pool": {"9981c5f2bfd06d7a"},  # AttentionPoolLatent, global_pool="map"
}
_STATE = "_saccade_merging"
Sizes = tuple[torch.Tensor | None, torch.Tensor | None]
"""size [B, N, 1] and log(size) [B, 1, 1, N]; None while every token is one."""


@dataclasses.dataclass
class _State:
    """Lies in the model's own __dict__, so a copied model has its own."""

    merger: TokenMerger
    proportional: bool
    size: torch.Tensor | None = None  # of the features that forward_features returned last, for `pool`


def _attention(
    self: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False, *, keys: bool = False
) -> Any:
    """timm's attention; with `keys` also the keys [B, H, N, D] that it compared, and `attn_mask` is a bias [B, 1, 1, N] or None."""
    if not keys:
        return type(self).forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
    batch, tokens, _ = x.shape
    gate = self.gate(x).sigmoid() if self.gate is not None else None
    q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = self.q_norm(q), self.k_norm(k)
    bias = None if attn_mask is None else attn_mask.to(q.dtype)
    if self.fused_attn:
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    else:
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        x = self.attn_drop(scores.softmax(dim=-1)) @ v
    x = self.norm(x.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
    x = x if gate is None else x * gate
    return self.proj_drop(self.proj(x)), k


def _block(
    self: Any,
    x: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    *,
    sizes: Sizes | None = None,
    state: _State | None = None,
    index: int = 0,
) -> Any:
    """timm's block; with `state` it merges, and returns the sizes too."""
    if state is None:
        return type(self).forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
    size, bias = sizes or (None, None)
    out, k = self.attn(self.norm1(x), attn_mask=bias, keys=True)
    x = x + self.drop_path1(self.ls1(out))
    if state.merger.amount_at(index, x.shape[1]):
        plan = state.merger.match(k, index=index)
        x, size, log_size = merge(x, plan, size, log_size=True, impl=state.merger.impl)
        bias = log_size.transpose(1, 2)[:, None] if state.proportional else None
    x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
    return x, (size, bias)


def _forward_features(
    self: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
) -> torch.Tensor:
    """timm's, with merging: [B, M, D]."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "attn_mask: expected None and is_causal=False, because tokens are merged; restore the model first"
        )
    state: _State = vars(self)[_STATE]
    x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
    sizes: Sizes = (None, None)
    for index, block in enumerate(self.blocks):
        if sizes[0] is None and state.merger.amount_at(index, x.shape[1]) == 0:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        elif self.grad_checkpointing:
            x, sizes = checkpoint(block, x, sizes=sizes, state=state, index=index, use_reentrant=False)
        else:
            x, sizes = block(x, sizes=sizes, state=state, index=index)
    state.size = sizes[0]
    return self.norm(x)  # type: ignore[no-any-return]


def _forward(
    self: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
) -> torch.Tensor:
    """timm's, and no size is kept behind it."""
    out = self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))
    vars(self)[_STATE].size = None
    return out  # type: ignore[no-any-return]


def _pool(self: Any, x: torch.Tensor, pool_type: str | None = None) -> torch.Tensor:
    """timm's, but a mean counts each row as often as it has tokens, and attention pooling gets log(size)."""
    state: _State = vars(self)[_STATE]
    size, kind = state.size, self.global_pool if pool_type is None else pool_type
    if size is None or (self.attn_pool is None and kind not in ("avg", "avgmax")):
        return type(self).pool(self, x, pool_type)  # type: ignore[no-any-return]
    if x.shape[:2] != size.shape[:2]:
        raise ValueError(
            f"x: expected the features [{size.shape[0]}, {size.shape[1]}, D] that forward_features returned last, "
            f"got {list(x.shape)}"
        )
    if not self.pool_include_prefix:
        x, size = x[:, self.num_prefix_tokens :], size[:, self.num_prefix_tokens :]
    if self.attn_pool is not None:
        bias = size.log().transpose(1, 2)[:, None].to(x.dtype) if state.proportional else None
        return self.attn_pool(x, attn_mask=bias)  # type: ignore[no-any-return]
    mean = ((x * size).sum(1) / size.sum(1)).to(x.dtype)
    return mean if kind == "avg" else 0.5 * (x.amax(dim=1) + mean)


_MODEL: dict[str, Callable[..., Any]] = {"forward": _forward, "forward_features": _forward_features, "pool": _pool}
_REPLACEMENTS = frozenset((*_MODEL.values(), _block, _attention))


def _reason(what: str, function: Any) -> str | None:
    found = fingerprint(function) if callable(function) else "missing"
    name = getattr(function, "__qualname__", what)
    return None if found in _TESTED[what] else f"{name} has an untested source ({found}); tested is {_VERSIONS}"


def _taken(module: nn.Module, names: Sequence[str]) -> str | None:
    taken = [name for name in names if name in vars(module)]
    return f"its {', '.join(taken)} was replaced by someone else" if taken else None


def _model_reason(model: Any) -> str | None:
    """Why the model itself is not known, or None."""
    if not all(hasattr(model, name) for name in ("blocks", "num_prefix_tokens", "pool", "forward_features")):
        return "it is not a timm VisionTransformer"
    for name in ("forward", "forward_features", "forward_head", "pool"):
        reason = _reason(name, getattr(type(model), name, None))
        if reason is not None:
            return reason
    scope = getattr(type(model).pool, "__globals__", {})
    reason = _reason("global_pool_nlc", scope.get("global_pool_nlc")) or _taken(model, (*_MODEL, "forward_head"))
    pool = model.attn_pool
    if reason is None and pool is not None:
        reason = _reason("attn_pool", type(pool).forward)
        if reason is None and pool.pos_embed is not None:
            reason = "its attention pooling has positions of its own, which merged tokens do not have"
    return reason


def _sites(model: Any) -> list[Site]:
    """The model, its blocks and their attention, each with its reason where it is refused."""
    reason = _model_reason(model)
    sites = [Site("model", model, "features and pooling", _forward_features, reason)]
    if reason is not None:
        return sites
    for index, block in enumerate(model.blocks):
        reason = _reason("block", type(block).forward) or _taken(block, ("forward",))
        sites.append(Site(f"blocks.{index}", block, "block", _block, reason))
        if reason is None:
            reason = _reason("attention", type(block.attn).forward) or _taken(block.attn, ("forward",))
            sites.append(Site(f"blocks.{index}.attn", block.attn, "attention", _attention, reason))
    return sites


class Merged:
    """A model that merges tokens; `restore`, or leaving a `with` block, takes it back."""

    def __init__(self, model: nn.Module, schedule: MergeSchedule, sites: Sequence[Site]) -> None:
        self.model, self.schedule, self.sites = model, schedule, tuple(sites)

    def restore(self) -> None:
        """As `saccade.swap.timm.restore`."""
        restore(self.model)

    def __enter__(self) -> Merged:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __str__(self) -> str:
        return "\n".join((str(self.schedule), *(str(site) for site in self.sites)))


def _schedule(given: Any, depth: int, prefix: int) -> MergeSchedule:
    if isinstance(given, (int, float)):
        given = MergeSchedule.constant(given, depth)
    elif not isinstance(given, MergeSchedule):
        given = MergeSchedule.of(given, depth)
    if given.axis != "layer":
        raise ValueError("r: expected a schedule over layers, got one over steps")
    return MergeSchedule.of(given.amounts, depth, protected=max(prefix, given.protected))


def merge_tokens(
    model: nn.Module,
    r: int | float | Sequence[int] | MergeSchedule | TowerMerging,
    *,
    proportional: bool = True,
    order: Literal["position", "split", "distill"] = "position",
    score: Literal["cosine", "dot", "l2"] = "cosine",
    impl: Impl = "auto",
) -> Merged:
    """Merge tokens in a timm VisionTransformer, between attention and MLP of each block (ToMe, arXiv 2210.09461, section 3).

    Methods of this one model are replaced; its class, its module, its parameters and its state_dict keys stay as they are. Class, register
    and distillation tokens are never merged. With r = 0 the output has the same bits as before. One forward at a time: `forward_features`
    leaves the sizes for `pool`. `forward_intermediates` and `get_intermediate_layers` return a feature for every patch, so they run
    unmerged.

    Args:
        model: a VisionTransformer of timm (DeiT's distilled one too), on any device, for inference or training.
        r: tokens to merge in each block, cut to half of the tokens that are not protected; a float is a share of those that are there; a
            list has an entry for each block, padded with 0; or a `MergeSchedule`; or a `TowerMerging` (of `saccade.merge.auroracap`),
            which decides `proportional` and `order` too.
        proportional: add log(size) to the attention scores of each key, so that a merged token weighs as much as its members did. ToMe
            does, except for MAE models that were not trained with merging.
        order: of the rows that `forward_features` returns: "position"; "split" and "distill" as ToMe leaves them, with one and with two
            prefix tokens.
        score: how keys are compared.
        impl: of the merging ops.

    Returns:
        a `Merged`: applied already, and a context manager that restores.

    Raises:
        SwapRefused: with the reasons, and nothing changed, where a forward is not one that was tested or was replaced already.
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    if _STATE in vars(model):
        raise SwapRefused("this model merges tokens already; restore it first")
    sites = _sites(model)
    refused = [str(site) for site in sites if site.reason is not None]
    if refused:
        raise SwapRefused("nothing was swapped:\n  " + "\n  ".join(refused))
    row_order: Any = choice(order, "order", ("position", "split", "distill"))
    amounts: Any = r
    if isinstance(r, TowerMerging):
        amounts, proportional, row_order = r.schedule, r.proportional, r.order
    prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
    needed = {"split": (0, 1), "similarity": (0, 0), "distill": (2, 2)}.get(row_order, (0, prefix))
    if not needed[0] <= prefix <= needed[1]:
        raise ValueError(f"order: {row_order!r} would not leave the model's {prefix} prefix tokens in front")
    schedule = _schedule(amounts, len(model.blocks), prefix)  # type: ignore[arg-type]
    merger = TokenMerger(schedule, score=score, order=row_order, impl=impl)
    vars(model)[_STATE] = _State(merger, bool(proportional))
    for site in sites:
        methods = _MODEL if site.module is model else {"forward": site.forward}
        for name, function in methods.items():
            assert function is not None
            setattr(site.module, name, types.MethodType(function, site.module))
    return Merged(model, schedule, sites)


def restore(model: nn.Module) -> None:
    """Take merging out of a model again; does nothing where there is none.

    Raises:
        RuntimeError: and nothing is changed, where another patch lies on top of a replaced method.
    """
    if _STATE not in vars(model):
        return
    ours = [
        (module, name)
        for module in model.modules()
        for name in ("forward", "forward_features", "pool")
        if getattr(vars(module).get(name), "__func__", None) in _REPLACEMENTS
    ]
    covered = [name for name in _MODEL if (model, name) not in ours]
    for block in model.blocks:  # type: ignore[union-attr]
        covered += [type(m).__name__ for m in (block, block.attn) if (m, "forward") not in ours]
    if covered:
        raise RuntimeError(f"{', '.join(dict.fromkeys(covered))}: replaced after the swap; undo that first")
    for module, name in ours:
        delattr(module, name)
    del vars(model)[_STATE]
