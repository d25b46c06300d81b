"""timm's Vision Transformers: exact attention by Saccade's kernel, and merging between attention and MLP (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from saccade._arguments import choice
from saccade._dispatch import Impl
from saccade.merge.modules import TokenMerger
from saccade.merge.presets import TowerMerging
from saccade.merge.schedule import MergeSchedule
from saccade.swap import timm_forwards as forwards
from saccade.swap.attend import Context, attends
from saccade.swap.edit import Attribute, Edit, method
from saccade.swap.engine import put_in_place, restore
from saccade.swap.families import looks_like_attention
from saccade.swap.merging import Merging, lacking, schedule_of
from saccade.swap.recipe import Recipe, Rule
from saccade.swap.report import Report, Row
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.source import SwapRefused, replaced, untested
from saccade.swap.tokens import Tokens

__all__ = ["ADAPTERS", "Merged", "merge_tokens", "restore"]

# Fingerprints of the sources that are replaced or relied on.
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
_MODEL: dict[str, Callable[..., Any]] = {
    "forward": forwards.forward,
    "forward_features": forwards.forward_features,
    "pool": forwards.pool,
}


def _unknown(what: str, function: Any) -> str | None:
    """By the name that the function has in the model's own class."""
    name = getattr(function, "__qualname__", what)
    return untested(name, function, {name: _TESTED[what]}, _VERSIONS)


def _model_reason(model: Any) -> str | None:
    if not all(hasattr(model, name) for name in ("blocks", "num_prefix_tokens", "pool", "forward_features")):
        return "it is not a timm VisionTransformer"
    for name in ("forward", "forward_features", "forward_head", "pool"):
        reason = _unknown(name, getattr(type(model), name, None))
        if reason is not None:
            return reason
    scope = getattr(type(model).pool, "__globals__", {})
    reason = _unknown("global_pool_nlc", scope.get("global_pool_nlc")) or replaced(model, *_MODEL, "forward_head")
    pool = model.attn_pool
    if reason is None and pool is not None:
        reason = _unknown("attn_pool", type(pool).forward) or replaced(pool)
        if reason is None and pool.pos_embed is not None:
            reason = "its attention pooling has positions of its own, which merged tokens do not have"
    return reason


def _reason(model: Any) -> str | None:
    """Why a model's tokens cannot be merged: the first part of it that is not known; or None."""
    reason = _model_reason(model)
    if reason is not None:
        return f"{type(model).__name__}: {reason}"
    for i, one in enumerate(model.blocks):
        reason = _unknown("block", type(one).forward) or replaced(one)
        if reason is not None:
            return f"blocks.{i} ({type(one).__name__}): {reason}"
        reason = _attention_reason(one.attn)
        if reason is not None:
            return f"blocks.{i}.attn ({type(one.attn).__name__}): {reason}"
    return None


def _attention_reason(attention: nn.Module) -> str | None:
    return _unknown("attention", type(attention).forward) or replaced(attention)


def _dense_reason(attention: Any) -> str | None:
    reason = _attention_reason(attention)
    if reason is None and (attention.head_dim % 8 or attention.head_dim > 256):
        reason = f"expected a head_dim that is a multiple of 8, up to 256, got {attention.head_dim}"
    return reason


def _merging_edits(path: str, model: Any, merging: Merging) -> list[Edit]:
    """Methods of this model and its blocks, and what they share; the attention of all blocks is to be replaced too."""
    at, name = f"{path}." if path else "", path or "the model"
    edits: list[Edit] = [Attribute(name, model, forwards.MERGING, merging)]
    edits += [Attribute(name, model, key, method(function, model)) for key, function in _MODEL.items()]
    for i, one in enumerate(model.blocks):
        edits.append(Attribute(f"{at}blocks.{i}", one, "forward", method(forwards.block, one)))
    return edits


def _attention_edit(path: str, attention: nn.Module) -> Edit:
    return Attribute(path, attention, "forward", method(forwards.attention, attention))


class Timm(Adapter):
    """VisionTransformer of timm and its subclasses (DeiT's distilled one). Merging is of a whole model: a rule's layers do not apply."""

    family = "timm"
    roots = ("VisionTransformer",)
    package = "timm"
    grid = (1, 14, 14)  # 224 x 224 in patches of 16

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """Patches alone."""
        return Tokens(grid or self.grid)

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """The blocks, for merging, and every attention."""
        at = f"{path}." if path else ""
        depth = len(root.blocks)
        found = [
            Site(f"{at}blocks", root.blocks, "merge", "vision", frozenset({"merge"}), depth=depth, reason=_reason(root))
        ]
        for name, module in root.named_modules():
            if not looks_like_attention(module):
                continue
            number = re.match(r"blocks\.(\d+)\.", name)
            if number is None:  # of the pooling, whose queries are its own
                found.append(Site(at + name, module, "attention", "cross", depth=depth))
                continue
            width, heads = getattr(module, "head_dim", 0), getattr(module, "num_heads", 0)
            found.append(
                Site(
                    at + name, module, "attention", "vision", frozenset({"stock", "dense"}), int(number[1]), depth,
                    _dense_reason(module), heads, heads, width, (tokens.length, tokens.length),
                )
            )  # fmt: skip
        return found

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """Merging of the model, and attention."""
        at, context = f"{path}." if path else "", Context()
        edits: list[Edit] = []
        replaced: dict[str, nn.Module] = {}
        for chosen in choices:
            site = chosen.site
            if site.kind == "merge":
                chosen.reason = lacking(chosen.rules[0].params)
                if chosen.reason is not None:
                    continue
                merging = Merging.of(chosen.rules[0].params, len(root.blocks), int(root.num_prefix_tokens))
                tokens, width = root.patch_embed.num_patches + int(root.num_prefix_tokens), root.embed_dim
                inner = getattr(getattr(root.blocks[0].mlp, "fc1", None), "out_features", 4 * width)
                chosen.change = merging.change(tokens, width, inner / width)
                edits += _merging_edits(path, root, merging)
                replaced |= {f"{at}blocks.{i}.attn": one.attn for i, one in enumerate(root.blocks)}
            else:
                chosen.change = "forward, on a CPU; on a GPU it is torch's"
                attend = attends(context, chosen.rules, site.layer or 0)
                edits.append(Attribute(site.path, site.module, forwards.ATTEND, attend))
                replaced[site.path] = site.module
        if context.slots:
            extra.contexts.append(context)
        return edits + [_attention_edit(name, module) for name, module in replaced.items()]


class Merged:
    """A model that merges tokens, its schedule and a report; `restore`, or leaving a `with` block, takes merging out."""

    def __init__(self, model: nn.Module, schedule: MergeSchedule, report: Report) -> None:
        self.model, self.schedule, self.report = model, schedule, report

    def restore(self) -> None:
        """As `saccade.restore`."""
        restore(self.model)

    def __enter__(self) -> Merged:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __str__(self) -> str:
        return f"{self.schedule}\n{self.report}"


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

    `saccade.accelerate` with a rule of the kernel "merge" does the same with fewer options. Methods of this one model are replaced; its
    class, its module, its parameters and its state_dict keys stay as they are. Class, register and distillation tokens are never merged.
    With r = 0 the output has the same bits as before. One forward at a time: `forward_features` leaves the sizes for `pool`.
    `forward_intermediates` and `get_intermediate_layers` return a feature for every patch, so they run unmerged.

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
        SwapRefused: with the reason, and nothing changed, where a forward is not one that was tested or was replaced already.
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    if forwards.MERGING in vars(model):
        raise SwapRefused("this model merges tokens already; restore it first")
    reason = _reason(model)
    if reason is not None:
        raise SwapRefused(f"nothing was swapped:\n  {reason}")
    row_order: Any = choice(order, "order", ("position", "split", "distill"))
    amounts: Any = r
    if isinstance(r, TowerMerging):
        amounts, proportional, row_order = r.schedule, r.proportional, r.order
    tower: Any = model
    prefix = int(tower.num_prefix_tokens)
    needed = {"split": (0, 1), "similarity": (0, 0), "distill": (2, 2)}.get(row_order, (0, prefix))
    if not needed[0] <= prefix <= needed[1]:
        raise ValueError(f"order: {row_order!r} would not leave the model's {prefix} prefix tokens in front")
    schedule = schedule_of(amounts, len(tower.blocks), prefix)
    merger = TokenMerger(schedule, protect=schedule.protected, score=score, order=row_order, impl=impl)
    merging = Merging(merger, len(schedule), None, bool(proportional))
    rule = Rule("merge", family="timm", params={"r": list(schedule.amounts), "proportional": merging.proportional})
    chosen = [
        Choice(site, "timm", (rule,), None)
        if site.kind == "merge"
        else Choice(site, "timm", (), "only merging was asked for")
        for site in ADAPTERS[0].sites("", model, Tokens((1, 1, 1)))
    ]
    report = Report(Recipe((rule,), name="merge_tokens"), tuple(Row.of(one) for one in chosen))
    edits = _merging_edits("", model, merging)
    edits += [_attention_edit(f"blocks.{i}.attn", one.attn) for i, one in enumerate(tower.blocks)]
    put_in_place([(model, edits)], report)
    return Merged(model, schedule, report)


ADAPTERS = [Timm()]
