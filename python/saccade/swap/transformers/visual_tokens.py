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

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from saccade.swap.edit import Attribute, Edit, PreHook, method
from saccade.swap.merging import lacking
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.source import replaced, untested
from saccade.swap.tokens import Tokens
from saccade.swap.transformers import _qwen_sources as sources
from saccade.swap.transformers._text import text_sites
from saccade.swap.transformers._visual_merging import STATE, VisualMerging, language_forward, plan_visual

__all__ = ["ADAPTERS", "VisualMerging", "plan_visual"]

_VERSIONS = "transformers 5.24"
# What hands embeddings, positions and mask to the language model, and the language model itself; of the Qwen-VL families see _qwen_sources.
_TESTED: dict[str, set[str]] = {
    "LlavaModel.forward": {"74bcff29a3f74464"},
    "LlavaNextModel.forward": {"e35c725512b4894b"},
    "LlavaNextVideoModel.forward": {"025e3a854bebe88e"},
    "LlavaOnevisionModel.forward": {"44a3f426cda27d9d"},
    "VideoLlavaModel.forward": {"b4146608c5ea4e3e"},
    "InternVLModel.forward": {"9c3f7eb238f31ddb"},
    "Qwen2Model.forward": {"9b71eb018eef118f"},
    "LlamaModel.forward": {"3ccd880c41f6c4ba"},
}


class VisualTokens(Adapter):
    """Captioners whose language model takes embeddings, positions and a mask, and nothing else that counts visual tokens."""

    package = "transformers"

    def __init__(self, family: str, roots: tuple[str, ...]) -> None:
        self.family, self.roots = family, roots

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """The language model, for merging, and its attention, where no adapter of its own lists it."""
        name = ".".join(filter(None, (path, "language_model")))
        model = root.language_model
        reason = _reason(root, model)
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
        if (reason := lacking(rule.params)) is not None:
            choice.reason = f"{reason}; between tower and language model it is keep"
            return []
        names = tuple(inspect.signature(inspect.unwrap(type(root).forward)).parameters)[1:]
        state = VisualMerging(rule, self._ids(root), names)
        choice.change = (
            f"{rule.params['keep']:.0%} of the visual tokens enter the language model; outputs keep their length"
        )
        extra.contexts.append(state)
        model = choice.site.module
        return [
            Attribute(choice.site.path, model, STATE, state),
            Attribute(choice.site.path, model, "forward", method(language_forward, model)),
            PreHook(path, root, state),
        ]


def _reason(root: nn.Module, model: nn.Module) -> str | None:
    if hasattr(type(root), "compute_3d_position_ids"):
        return sources.reason_of(sources.merging_functions(root), model)
    for module in (root, model):
        name = f"{type(module).__name__}.forward"
        reason = untested(name, type(module).forward, _TESTED, _VERSIONS)
        if reason is not None:
            return reason
    return replaced(model)


ADAPTERS = [
    VisualTokens("qwen2_vl", ("Qwen2VLModel",)),
    VisualTokens("qwen2_5_vl", ("Qwen2_5_VLModel",)),
    VisualTokens(
        "llava", ("LlavaModel", "LlavaNextModel", "LlavaNextVideoModel", "LlavaOnevisionModel", "VideoLlavaModel")
    ),
    VisualTokens("internvl", ("InternVLModel",)),
]
