"""TimeSformer: attention over time and over space, fused.

The model cuts its tokens into rows of one place, and into frames, before it calls attention, so what arrives there is dense: the model's
own order of tokens already gives what `axial_attention` would otherwise look up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from saccade.swap.attend import Attend, Context, attends
from saccade.swap.edit import Attribute, Edit, method
from saccade.swap.families import looks_like_attention
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.tokens import Tokens
from saccade.swap.transformers._interface import forward_reason

__all__ = ["ADAPTERS"]

Tensor = torch.Tensor
_VERSIONS = "transformers 5.24"
_STATE = "_saccade_attention"
_TESTED: dict[str, set[str]] = {"TimesformerSelfAttention.forward": {"eba60cd0f18c1392"}}


def _forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
    """hidden_states [B, S, C] -> ([B, S, C],); with attention maps, or dropout in training, as the class has it."""
    attend: Attend = vars(self)[_STATE]
    dropout = self.attn_drop.p if self.training else 0.0
    if output_attentions or dropout:
        attend.decline(
            "attention maps were asked for" if output_attentions else f"attention dropout of {dropout} in training"
        )
        return type(self).forward(self, hidden_states, output_attentions)  # type: ignore[no-any-return]
    batch, tokens, width = hidden_states.shape
    qkv = self.qkv(hidden_states).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # [B, H, S, D]
    return (attend(q, k, v, scale=self.scale).transpose(1, 2).reshape(batch, tokens, width),)


class TimeSformer(Adapter):
    """TimesformerModel, in all three of its attention types."""

    family = "timesformer"
    roots = ("TimesformerModel",)
    package = "transformers"
    grid = (8, 14, 14)

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """The video's tokens alone."""
        return Tokens(grid or self.grid)

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """Every attention: one a layer, or one over time and one over space."""
        at = f"{path}." if path else ""
        frames, places = tokens.grid[0], tokens.video // tokens.grid[0]
        depth = len(root.encoder.layer)
        found = []
        for name, module in root.named_modules():
            if not looks_like_attention(module):
                continue
            match = re.match(r"encoder\.layer\.(\d+)\.(temporal_)?", name)
            layer, over_time = (None, False) if match is None else (int(match[1]), match[2] is not None)
            joint = root.config.attention_type == "joint_space_time"
            # a class token stands in every frame, but for joint attention, which has one, and for attention over time, which has none
            count = tokens.video + (0 if over_time else 1 if joint else frames)
            groups = places if over_time else 1 if joint else frames
            heads = int(module.num_heads)
            found.append(
                Site(
                    at + name, module, "attention", "vision", frozenset({"stock", "dense"}), layer, depth,
                    forward_reason(module, _TESTED, _VERSIONS), heads, heads, root.config.hidden_size // heads,
                    (count, count), float(groups),
                )
            )  # fmt: skip
        return found

    def edits(self, path: str, root: nn.Module, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """A forward on each chosen attention."""
        context = Context()
        edits: list[Edit] = []
        for i, choice in enumerate(choices):
            module, name = choice.site.module, choice.site.path
            choice.change = "fused attention in place of scores, softmax and product"
            edits.append(Attribute(name, module, _STATE, attends(context, choice.rules, i)))
            edits.append(Attribute(name, module, "forward", method(_forward, module)))
        if edits:
            context.begin(None, torch.device("cpu"))
            extra.contexts.append(context)
        return edits


ADAPTERS = [TimeSformer()]
