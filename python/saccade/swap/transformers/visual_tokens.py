"""Fewer visual tokens in the language model of a captioner: merged between the vision tower and the first decoder layer.

Stock puts the tower's features where the prompt has placeholders and runs the language model over all of them. Here rows of visual
tokens that are alike become one (bipartite matching, arXiv 2210.09461, section 3), text is never merged, and everything that counts
tokens follows:

- positions: a merged row stands where its destination stood, so M-RoPE and HoPE keep their meaning;
- the attention mask: columns of merged tokens go, in the prefill and in every later step;
- the cache holds the merged rows; later tokens keep the positions that they have in stock;
- the output: each merged token takes the row that it went into, so logits and labels have stock's length.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from saccade.merge import MergePlan, match, merge, merge_positions, unmerge
from saccade.merge.video import compose
from saccade.swap.edit import Attribute, Edit, PreHook, method
from saccade.swap.recipe import Rule
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.source import fingerprint
from saccade.swap.tokens import Tokens
from saccade.swap.transformers._text import text_sites

__all__ = ["ADAPTERS", "VisualMerging", "plan_visual"]

Tensor = torch.Tensor
_VERSIONS = "transformers 5.24"
_STATE = "_saccade_visual"
# What hands embeddings, positions and mask to the language model, and the language model itself.
_TESTED: dict[str, set[str]] = {
    "Qwen2VLModel.forward": {"a705c95b593592ac"},
    "Qwen2VLTextModel.forward": {"76b0d428baeb42de"},
    "Qwen2_5_VLModel.forward": {"afd8f7a8a0dcaa53"},
    "Qwen2_5_VLTextModel.forward": {"76b0d428baeb42de"},
    "LlavaModel.forward": {"74bcff29a3f74464"},
    "LlavaNextModel.forward": {"e35c725512b4894b"},
    "LlavaNextVideoModel.forward": {"025e3a854bebe88e"},
    "LlavaOnevisionModel.forward": {"44a3f426cda27d9d"},
    "VideoLlavaModel.forward": {"b4146608c5ea4e3e"},
    "InternVLModel.forward": {"9c3f7eb238f31ddb"},
    "Qwen2Model.forward": {"9b71eb018eef118f"},
    "LlamaModel.forward": {"3ccd880c41f6c4ba"},
}


def plan_visual(x: Tensor, visual: Tensor, keep: float) -> MergePlan | None:
    """A plan that leaves `keep` of the visual rows of x [B, S, C]; None where there is nothing to merge.

    Each round merges at most half of what may be merged, so a small `keep` takes several rounds.

    Args:
        x: [B, S, C], what is compared.
        visual: bool [B, S], True where a row may be merged; as many in each sample.
        keep: share of the visual rows that is left.

    Raises:
        ValueError: where samples have different numbers of visual tokens.
    """
    counts = visual.sum(1)
    count = int(counts[0])
    if not bool((counts == count).all()):
        raise ValueError(f"samples have different numbers of visual tokens ({counts.tolist()})")
    left = max(1, round(keep * count))
    total: MergePlan | None = None
    while count > left:
        # Sources are every second row of the sequence: as many visual ones as the worst sample has.
        sources = int(visual[:, 0::2].sum(1).min())
        r = min(count - left, sources, count - sources)
        if r <= 0:
            break
        plan = match(x, r, protect=~visual)
        x = merge(x, plan)[0]
        visual = merge_positions(plan, visual[None].long())[0].bool()
        total = plan if total is None else compose(total, plan)
        count -= r
    return total


@dataclass(eq=False)
class VisualMerging:
    """What one captioner remembers between its outer forward, its language model and later steps of generation.

    Attributes:
        rule: of the recipe.
        visual: bool [B, S], placeholders of the prompt; None in steps of generation.
        notes: calls that could not be served; the report shows them.
    """

    rule: Rule
    ids: tuple[int, ...]
    visual: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    kept: tuple[int, int] = (0, 0)  # rows of the last prefill before and after
    _cache: Any = None
    _mask: Tensor | None = None
    _length: int = 0

    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The pre-hook of the captioner: where the prompt's placeholders are."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.visual = None
        if ids is not None and ids.shape[1] > 1:
            self.visual = torch.isin(ids, torch.tensor(self.ids, device=ids.device))

    def unserved(self, reason: str) -> None:
        """Stock ran: an error, or one note."""
        if self.rule.on_unsupported == "error":
            raise ValueError(f"merge: {reason}")
        if reason not in self.notes:
            self.notes.append(f"merge: {reason}; nothing was merged")

    def remember(self, cache: Any, mask: Tensor | None, length: int) -> None:
        """What later steps need: the mask's kept columns, and how long the prompt was."""
        self._cache = None if cache is None else weakref.ref(cache)
        self._mask, self._length = mask, length

    def later(self, cache: Any, mask: Any) -> tuple[Any, int]:
        """(mask, tokens that the cache lacks) of a step that goes on where a merged prompt ended."""
        if cache is None or self._cache is None or self._cache() is not cache:
            return mask, 0
        removed = self.kept[0] - self.kept[1]
        if isinstance(mask, Tensor) and mask.ndim == 2 and self._mask is not None:
            head = self._mask
            if head.shape[0] != mask.shape[0]:  # beams: the prompt's rows are repeated
                head = head.repeat_interleave(mask.shape[0] // head.shape[0], 0)
            mask = torch.cat((head.to(mask.dtype), mask[:, self._length :]), 1)
        return mask, removed


def _language_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """The language model's forward over merged rows. Its own code runs; what goes in and comes out is what changes."""
    state: VisualMerging = vars(self)[_STATE]
    named = "past_key_values" if "past_key_values" in kwargs else "cache"
    cache = kwargs.pop("past_key_values", cache)

    def stock(mask: Any, positions: Any, embeds: Any) -> Any:
        options = {**kwargs, named: cache, "use_cache": use_cache, "attention_mask": mask, "position_ids": positions}
        return type(self).forward(
            self, input_ids=input_ids if embeds is None else None, inputs_embeds=embeds, **options
        )

    past = 0 if cache is None else int(cache.get_seq_length())
    if past:
        mask, removed = state.later(cache, attention_mask)
        if removed and position_ids is None and inputs_embeds is not None:
            place = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past + removed
            position_ids = place[None].expand(inputs_embeds.shape[0], -1)
        return stock(mask, position_ids, inputs_embeds)
    plan = _plan(state, inputs_embeds, attention_mask)
    if plan is None or inputs_embeds is None:
        state.remember(None, None, 0)
        return stock(attention_mask, position_ids, inputs_embeds)
    batch, length, _ = inputs_embeds.shape
    if position_ids is None:
        position_ids = torch.arange(length, device=inputs_embeds.device)[None].expand(batch, -1)
    if attention_mask is None:  # without one, gaps between positions would be taken for borders of packed sequences
        attention_mask = torch.ones(batch, length, dtype=torch.long, device=inputs_embeds.device)
    place = position_ids[None] if position_ids.ndim == 2 else position_ids  # [A, B, S]
    place = merge_positions(plan, place.expand(-1, batch, -1))
    mask = merge_positions(plan, attention_mask[None].long())[0].to(attention_mask.dtype)
    state.kept = (length, plan.rows)
    out = stock(mask, place[0] if position_ids.ndim == 2 else place, merge(inputs_embeds, plan)[0])
    made = getattr(out, named, None)
    state.remember(cache if made is None else made, mask, length)
    out.last_hidden_state = unmerge(out.last_hidden_state, plan)
    return out


def _plan(state: VisualMerging, embeds: Tensor | None, mask: Any) -> MergePlan | None:
    visual = state.visual
    if visual is None or embeds is None or visual.shape != embeds.shape[:2]:
        return None
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        state.unserved("expected an attention mask [B, S]; a static cache brings a prepared one")
        return None
    if isinstance(mask, Tensor):
        visual = visual & mask.bool()
    try:
        return plan_visual(embeds.detach(), visual, float(state.rule.params.get("keep", 0.5)))
    except ValueError as error:
        state.unserved(str(error))
        return None


class VisualTokens(Adapter):
    """Captioners whose language model takes embeddings, positions and a mask, and nothing else that counts visual tokens."""

    def __init__(self, family: str, roots: tuple[str, ...]) -> None:
        self.family, self.roots = family, roots

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """A clip of 8 steps of 18 x 18 tokens, as eight pairs of frames of 504 x 504 pixels give."""
        return Tokens(grid or (8, 18, 18), suffix=64 if text is None else text)

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """The language model, for merging, and its attention, where no adapter of its own lists it."""
        name = ".".join(filter(None, (path, "language_model")))
        model = root.language_model
        reason = next(filter(None, (_untested(type(root)), _untested(type(model)))), None)
        if reason is None and "forward" in vars(model):
            reason = "its forward was replaced by someone else"
        if reason is None and not self._ids(root):
            reason = "its config names no image or video token"
        return [Site(name, model, "merge", "text", frozenset({"merge"}), reason=reason), *text_sites(path, root)]

    @staticmethod
    def _ids(root: Any) -> tuple[int, ...]:
        names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
        found = (getattr(root.config, name, None) for name in names)
        return tuple(dict.fromkeys(i for i in found if i is not None))

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """A forward on the language model, and a hook that sees the prompt."""
        choice = next((choice for choice in choices if choice.site.kind == "merge"), None)
        if choice is None:
            return []
        rule = choice.rules[0]
        if "r" in rule.params or "proportional" in rule.params:
            choice.reason = "merge between tower and language model takes keep alone"
            return []
        keep = rule.params.get("keep", 0.5)
        state = VisualMerging(rule, self._ids(root))
        choice.change = f"{keep:.0%} of the visual tokens enter the language model; outputs keep their length"
        extra.contexts.append(state)
        model = choice.site.module
        return [
            Attribute(choice.site.path, model, _STATE, state),
            Attribute(choice.site.path, model, "forward", method(_language_forward, model)),
            PreHook(path, root, state),
        ]


def _untested(cls: type) -> str | None:
    name = f"{cls.__name__}.forward"
    found = fingerprint(cls.forward)  # type: ignore[attr-defined]
    return None if found in _TESTED.get(name, ()) else f"{name} has an untested source ({found}); tested: {_VERSIONS}"


ADAPTERS = [
    VisualTokens("qwen2_vl", ("Qwen2VLModel",)),
    VisualTokens("qwen2_5_vl", ("Qwen2_5_VLModel",)),
    VisualTokens(
        "llava", ("LlavaModel", "LlavaNextModel", "LlavaNextVideoModel", "LlavaOnevisionModel", "VideoLlavaModel")
    ),
    VisualTokens("internvl", ("InternVLModel",)),
]
