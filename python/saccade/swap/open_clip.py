"""open_clip: tokens of the visual tower that are alike become one between attention and MLP (ToMe, arXiv 2210.09461).

Tokens are compared by what goes into attention (the output of `ln_1`), where ToMe compares keys: nn.MultiheadAttention does not give its
keys. Attention itself stays torch's, given log(size) as a bias of each key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from saccade.swap.edit import Attribute, Edit, method
from saccade.swap.families import looks_like_attention
from saccade.swap.merging import Merging, Sizes, lacking, merge_between, weighted_mean
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.source import replaced, untested
from saccade.swap.tokens import Tokens

__all__ = ["ADAPTERS"]

Tensor = torch.Tensor
_MERGING = "_saccade_merging"
_PREFIX = 1  # a class token is always there
# Fingerprints of the sources that are replaced or relied on.
_VERSIONS = "open_clip 3.0 to 3.3"
_TESTED = {
    "VisionTransformer.forward": {"bc644d1cdd9f4b70"},
    "VisionTransformer._embeds": {"5bb47bcdf01dd6cc"},
    "VisionTransformer._pool": {"160cd327a8eb1cad"},
    "VisionTransformer._global_pool": {"7eb807af89d5d49c"},
    "Transformer.forward": {"71365a7bcf42f5a0"},
    "ResidualAttentionBlock.forward": {"bc27f432c01d85d6"},
    "ResidualAttentionBlock.attention": {"d044738416449de7"},
    "CustomResidualAttentionBlock.forward": {"d7179cf83f113661"},
    "Attention.forward": {"c12c57b96d57f12f"},
    "AttentionalPooler.forward": {"d301a4d39e6e530b"},
}
_EXACT = (
    "its q, k and v come from one weight that is no module: to read it would bypass LoRA, quantisation and offloading"
)


# ---- what runs -------------------------------------------------------------------------------------------------------------
def _forward(self: Any, x: Tensor) -> Any:
    """VisionTransformer.forward, with merging."""
    x, (size, bias) = self.transformer(self._embeds(x), merging=vars(self)[_MERGING])
    pooled, tokens = self._pool(x) if size is None else _pooled(self, x, size, bias)
    if self.proj is not None:
        pooled = pooled @ self.proj
    return (pooled, tokens) if self.output_tokens else pooled


def _pooled(self: Any, x: Tensor, size: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """VisionTransformer._pool, but a mean counts each row as often as it has tokens, and attention pooling gets log(size)."""
    if self.attn_pool is None:
        if self.final_ln_after_pool:
            pooled, tokens = _mean(self, x, size)
            return self.ln_post(pooled), tokens
        return _mean(self, self.ln_post(x), size)
    if self.attn_pool_contrastive is None:
        return self._global_pool(self.ln_post(self.attn_pool(x, bias=bias)))  # type: ignore[no-any-return]
    x = self.ln_post(x)
    tokens = self.attn_pool(x, bias=bias)
    if self.attn_pool_type == "parallel":
        return self.attn_pool_contrastive(x, bias=bias), tokens
    return self.attn_pool_contrastive(tokens), tokens


def _mean(self: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    if self.pool_type != "avg":
        return self._global_pool(x)  # type: ignore[no-any-return]
    rows = x[:, _PREFIX:]
    return weighted_mean(rows, size[:, _PREFIX:]), rows


def _transformer(self: Any, x: Tensor, attn_mask: Tensor | None = None, *, merging: Merging | None = None) -> Any:
    """Transformer.forward; with `merging` it merges, and returns the sizes too."""
    if merging is None:
        return type(self).forward(self, x, attn_mask=attn_mask)
    return merge_between(self.resblocks, x, merging, checkpointed=self.grad_checkpointing)


def _block(
    self: Any,
    q_x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    merging: Merging | None = None,
    r: int = 0,
    sizes: Sizes = (None, None),
) -> Any:
    """ResidualAttentionBlock.forward; with `merging` it merges r tokens, and returns the sizes too."""
    if merging is None:
        return type(self).forward(self, q_x, k_x, v_x, attn_mask)
    seen = self.ln_1(q_x)
    if sizes[1] is None:
        out = self.attention(q_x=seen)
    else:
        out = _biased(self.attn, seen, seen, sizes[1])
    return _merged(self, q_x + self.ls_1(out), seen, merging, r, sizes)


def _custom_block(
    self: Any,
    x: Tensor,
    attn_mask: Tensor | None = None,
    *,
    merging: Merging | None = None,
    r: int = 0,
    sizes: Sizes = (None, None),
) -> Any:
    """CustomResidualAttentionBlock.forward, as `_block`."""
    if merging is None:
        return type(self).forward(self, x, attn_mask=attn_mask)
    seen = self.ln_1(x)
    bias = None if sizes[1] is None else sizes[1][:, None]  # [B, 1, 1, N]
    return _merged(self, x + self.ls_1(self.ln_attn(self.attn(seen, attn_mask=bias))), seen, merging, r, sizes)


def _merged(block: Any, x: Tensor, seen: Tensor, merging: Merging, r: int, sizes: Sizes) -> tuple[Tensor, Sizes]:
    size, bias = sizes
    if r:
        x, size, bias, _ = merging.merge(x, seen, r, size)
    return x + block.ls_2(block.mlp(block.ln_2(x))), (size, bias)


def _pooler(self: Any, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """AttentionalPooler.forward, with a bias [B, 1, N] of each key."""
    if bias is None:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    x = self.ln_k(x)
    return _biased(self.attn, self.ln_q(self.query)[None].expand(x.shape[0], -1, -1), x, bias)


def _biased(attn: Any, q: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
    """nn.MultiheadAttention adds a padding mask of floats to the scores of each key."""
    return attn(q, kv, kv, need_weights=False, key_padding_mask=bias[:, 0].to(q.dtype))[0]  # type: ignore[no-any-return]


_BLOCKS: dict[str, Callable[..., Any]] = {
    "ResidualAttentionBlock": _block,
    "CustomResidualAttentionBlock": _custom_block,
}


# ---- what is known ---------------------------------------------------------------------------------------------------------
def _reason(module: Any, path: str, *names: str) -> str | None:
    """Why methods of one module are not those that were tested, or None."""
    for name in names:
        function = getattr(type(module), name, None)
        what = getattr(function, "__qualname__", name)
        reason = untested(what, function, _TESTED, _VERSIONS) or replaced(module, name)
        if reason is not None:
            return f"{path}: {reason}"
    return None


def _tower_reason(root: Any) -> str | None:
    """Why tokens of a tower cannot be merged, or None."""
    tower = root.transformer
    reason = _reason(root, "VisionTransformer", "forward", "_embeds", "_pool", "_global_pool")
    reason = reason or _reason(tower, "transformer", "forward")
    if reason is None and not tower.batch_first:
        reason = "transformer: expected batch_first=True"
    for name in ("attn_pool", "attn_pool_contrastive"):
        pool = getattr(root, name, None)
        if reason is None and pool is not None:
            reason = _reason(pool, name, "forward") or _attention_reason(pool.attn, f"{name}.attn")
    for i, block in enumerate(tower.resblocks):
        at = f"resblocks.{i}"
        if reason is None and type(block).__name__ not in _BLOCKS:
            reason = f"{at}: {type(block).__name__} is not known"
        if type(block).__name__ == "ResidualAttentionBlock":
            reason = reason or _reason(block, at, "forward", "attention") or _attention_reason(block.attn, f"{at}.attn")
        else:
            reason = reason or _reason(block, at, "forward") or _reason(block.attn, f"{at}.attn", "forward")
    return reason


def _attention_reason(attn: Any, path: str) -> str | None:
    if not getattr(attn, "batch_first", False):
        return f"{path}: expected an nn.MultiheadAttention with batch_first=True, got {type(attn).__name__}"
    reason = replaced(attn)
    return None if reason is None else f"{path}: {reason}"


def _mlp_ratio(tower: Any) -> float:
    return float(tower.resblocks[0].mlp.c_fc.out_features / tower.width)


def _attention_sites(path: str, root: nn.Module, role: str, depth: int) -> list[Site]:
    """Every attention below a root, but not those of a visual tower in it."""
    at, found = f"{path}." if path else "", []
    for name, module in root.named_modules():
        if looks_like_attention(module) and not name.startswith("visual."):
            number = re.search(r"(?:resblocks|cross_attn)\.(\d+)\.", name)
            layer = None if number is None else int(number[1])
            of = "cross" if "cross_attn." in name else role
            found.append(Site(at + name, module, "attention", of, layer=layer, depth=depth, reason=_EXACT))
    return found


class Vision(Adapter):
    """VisionTransformer of open_clip. Merging is of a whole tower: a rule's layers do not apply."""

    family = "open_clip"
    roots = ("VisionTransformer",)
    package = "open_clip"

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """Not used: nothing here is estimated by it."""
        return Tokens(grid or (0, 0, 0))

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """The blocks, for merging, and every attention."""
        at, blocks = f"{path}." if path else "", root.transformer.resblocks
        depth, reason = len(blocks), _tower_reason(root)
        name = f"{at}transformer.resblocks"
        merge = Site(name, blocks, "merge", "vision", frozenset({"merge"}), depth=depth, reason=reason)
        return [merge, *_attention_sites(path, root, "vision", depth)]

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """Merging, where it was chosen."""
        merge = next((choice for choice in choices if choice.site.kind == "merge"), None)
        if merge is None:
            return []
        merge.reason = lacking(merge.rules[0].params)
        if merge.reason is not None:
            return []
        tower, at = root.transformer, f"{path}." if path else ""
        merging = Merging.of(merge.rules[0].params, len(tower.resblocks), _PREFIX)
        merge.change = merging.change(root.grid_size[0] * root.grid_size[1] + _PREFIX, tower.width, _mlp_ratio(tower))
        merge.change += "; compared by what attention is given"
        edits: list[Edit] = [
            Attribute(path or "the model", root, _MERGING, merging),
            Attribute(path or "the model", root, "forward", method(_forward, root)),
            Attribute(f"{at}transformer", tower, "forward", method(_transformer, tower)),
        ]
        for i, block in enumerate(tower.resblocks):
            function = method(_BLOCKS[type(block).__name__], block)
            edits.append(Attribute(f"{at}transformer.resblocks.{i}", block, "forward", function))
        for name in ("attn_pool", "attn_pool_contrastive"):
            pool = getattr(root, name, None)
            if pool is not None:
                edits.append(Attribute(at + name, pool, "forward", method(_pooler, pool)))
        return edits


class Text(Adapter):
    """Text towers and decoders of open_clip: their attention is listed, and stays."""

    family = "open_clip"
    roots = ("CLIP", "TextTransformer", "MultimodalTransformer")
    package = "open_clip"

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """Attention of text, none of which can be swapped."""
        blocks = getattr(getattr(root, "transformer", root), "resblocks", ())
        return _attention_sites(path, root, "text", len(blocks))

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """None."""
        return []


ADAPTERS = [Vision(), Text()]
