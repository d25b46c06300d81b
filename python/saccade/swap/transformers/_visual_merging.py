"""What runs in a captioner whose visual tokens are merged between the vision tower and the language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from saccade.merge import MergePlan, match, merge, merge_positions, unmerge
from saccade.merge.video import compose
from saccade.swap.attend import Context
from saccade.swap.recipe import Rule

__all__ = ["STATE", "VisualMerging", "language_forward", "plan_visual"]

Tensor = torch.Tensor
STATE = "_saccade_visual"
_FILLED = "_saccade_filled"


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


class Filled(NamedTuple):
    """What a merged prompt left in a cache. It lies on the cache object, so that a copied cache has its own.

    Args:
        mask: [B, M], the mask's kept columns.
        length: S, of the prompt.
    """

    mask: Tensor
    length: int

    @property
    def removed(self) -> int:
        """Rows that the cache lacks."""
        return self.length - self.mask.shape[1]


@dataclass(eq=False)
class VisualMerging:
    """What one captioner tells its language model about a call.

    Attributes:
        rule: of the recipe.
        ids: of the placeholders.
        names: of the arguments of the captioner's forward.
        context: calls that could not be served; the report shows them.
        kept: rows of the last merged prompt before and after.
        visual: bool [B, S], placeholders of the prompt; None in steps of generation.
        blind: whether embeddings of a prompt came without ids.
        counted: whether the caller left it to the captioner to count positions by the cache.
    """

    rule: Rule
    ids: tuple[int, ...]
    names: tuple[str, ...]
    context: Context = field(default_factory=Context)
    kept: tuple[int, int] = (0, 0)
    visual: Tensor | None = None
    blind: bool = False
    counted: bool = False

    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The pre-hook of the captioner."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        self.forget()
        self.counted = given.get("position_ids") is None and given.get("attention_mask") is None
        self.blind = ids is None and embeds is not None and embeds.shape[1] > 1
        if ids is not None and ids.shape[1] > 1:
            self.visual = torch.isin(ids, torch.tensor(self.ids, device=ids.device))

    @property
    def notes(self) -> list[str]:
        """Of the context."""
        return self.context.notes

    def forget(self) -> None:
        """The next call of the language model may be one that did not come through the captioner."""
        self.visual, self.blind, self.counted = None, False, False

    def unserved(self, reason: str) -> None:
        """Stock ran: an error, or one note and a warning."""
        self.context.unserved(self.rule, reason, ran="nothing was merged")

    def plan(self, embeds: Tensor | None, mask: Any, maps: bool) -> MergePlan | None:
        """What is merged in a prompt; None where nothing is, and a note where it should have been."""
        visual = self.visual
        if self.blind:
            self.unserved("embeddings came without input_ids, which tell where the placeholders are")
        if visual is None or embeds is None:
            return None
        if not bool(visual.any()):
            return None
        reason = None
        if visual.shape != embeds.shape[:2]:
            reason = f"expected embeddings for input_ids {list(visual.shape)}, got {list(embeds.shape[:2])}"
        elif mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            reason = "expected an attention mask [B, S]; a static cache brings a prepared one"
        elif maps:
            reason = "attention maps were asked for, which merged tokens do not have"
        if reason is not None:
            self.unserved(reason)
            return None
        if isinstance(mask, Tensor):
            visual = visual & mask.bool()
        try:
            return plan_visual(embeds.detach(), visual, float(self.rule.params["keep"]))
        except ValueError as error:
            self.unserved(str(error))
            return None

    def later(self, filled: Filled | None, mask: Any, past: int, count: int) -> Any:
        """The mask of `count` tokens that go on where a cache of `past` rows ends."""
        if self.visual is not None and bool(self.visual.any()):
            self.unserved("images and videos that join a filled cache stay as they are")
        if filled is not None and past < filled.mask.shape[1]:
            raise ValueError(
                f"cache: {past} rows are left of a merged prompt of {filled.mask.shape[1]}; it cannot be cut, fill a new one"
            )
        if mask is None:
            return None
        flat = isinstance(mask, Tensor) and mask.ndim == 2
        if filled is None:
            if flat and self.kept[0] and mask.shape[1] > past + count:
                raise ValueError(
                    f"cache: {past} rows and {count} new tokens, but the mask has {mask.shape[1]} columns; a cache that was built "
                    "from the contents of another does not know that its prompt was merged: copy it with copy.deepcopy"
                )
            return mask
        if not flat:
            raise ValueError("attention_mask: expected [B, S] behind a prompt that was merged")
        head = filled.mask
        if mask.shape[0] % head.shape[0]:
            raise ValueError(
                f"attention_mask: expected {head.shape[0]} samples or a multiple, as the merged prompt has, got {mask.shape[0]}"
            )
        head = head.repeat_interleave(mask.shape[0] // head.shape[0], 0)  # beams: the prompt's rows are repeated
        return torch.cat((head.to(mask.dtype), mask[:, filled.length :]), 1)


def language_forward(
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
    state: VisualMerging = vars(self)[STATE]
    named = "past_key_values" if "past_key_values" in kwargs else "cache"
    cache = kwargs.pop("past_key_values", cache)
    try:
        past = 0 if cache is None else int(cache.get_seq_length())
        maps = bool(kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)))
        filled: Filled | None = getattr(cache, _FILLED, None) if past else None
        plan, mask, place = None, attention_mask, position_ids
        if past:
            count = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]  # type: ignore[union-attr]
            mask = state.later(filled, mask, past, count)
            if filled is not None:
                place = _place(position_ids, inputs_embeds, past + filled.removed, filled.removed * state.counted)
        else:
            plan = state.plan(inputs_embeds, mask, maps)
    finally:
        state.forget()

    def stock(mask: Any, positions: Any, embeds: Any) -> Any:
        options = {**kwargs, named: cache, "use_cache": use_cache, "attention_mask": mask, "position_ids": positions}
        return type(self).forward(
            self, input_ids=input_ids if embeds is None else None, inputs_embeds=embeds, **options
        )

    if plan is None or inputs_embeds is None:
        if not past and hasattr(cache, _FILLED):  # emptied, and filled anew
            delattr(cache, _FILLED)
        return stock(mask, place, inputs_embeds)
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
    cache = cache if made is None else made
    if cache is not None:
        setattr(cache, _FILLED, Filled(mask, length))
    out.last_hidden_state = unmerge(out.last_hidden_state, plan)
    if out.get("hidden_states") is not None:
        out["hidden_states"] = tuple(
            x if x is None or x.shape[1] != plan.rows else unmerge(x, plan) for x in out["hidden_states"]
        )
    return out


def _place(positions: Tensor | None, embeds: Tensor | None, start: int, more: int) -> Tensor | None:
    """Positions of later tokens: those that were given, and `more`; where none were, counted from `start`."""
    if positions is not None:
        return positions + more
    if embeds is None:
        return None
    return (torch.arange(embeds.shape[1], device=embeds.device) + start)[None].expand(embeds.shape[0], -1)
