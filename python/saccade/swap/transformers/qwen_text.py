"""Text models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: fused M-RoPE, or HoPE's and VideoRoPE's embeddings in its place."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

from torch import nn

from saccade.swap.edit import Attribute, Edit, method
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.source import replaced
from saccade.swap.tokens import Tokens
from saccade.swap.transformers import _qwen_sources as sources
from saccade.swap.transformers import qwen_rotary as rotary
from saccade.swap.transformers._qwen_positions import RopeIndex, other_spec, params_reason

__all__ = ["ADAPTERS", "QwenText"]


class QwenText(Adapter):
    """One of the three. Attention stays stock: its masks, caches and sliding windows are transformers' own."""

    package = "transformers"
    grid = (8, 24, 24)  # patches, as of the vision tower
    text = 128

    def __init__(self, family: str, root: str) -> None:
        self.family, self.roots = family, (root,)

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """2 x 2 patches are one token; text follows."""
        t, h, w = grid or self.grid
        return Tokens((t, h // 2, w // 2), suffix=self.text if text is None else text)

    def _spec(self, root: Any) -> Any:
        return rotary.text_spec(root.config, interleaved=self.family == "qwen3_vl")

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """The rotation, and the attention of each layer, where no kernel can go."""
        at, depth, config = f"{path}." if path else "", len(root.layers), root.config
        shape: dict[str, Any] = {
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": root.layers[0].self_attn.head_dim,
        }
        found = [
            Site(
                f"{at}layers.{i}.self_attn", layer.self_attn, "attention", "text", frozenset(), i, depth,
                tokens=(tokens.length,) * 2, groups=2.0, **shape,
            )
            for i, layer in enumerate(root.layers)
        ]  # fmt: skip
        turning = Site(
            f"{at}rotary_emb", root.rotary_emb, "rotary", "text", frozenset({"rotary"}), reason=self._reason(root),
            tokens=(tokens.length * depth,) * 2, **shape,
        )  # fmt: skip
        return [turning, *found]

    def _reason(self, root: Any) -> str | None:
        reason = sources.reason_of(sources.tower_functions(root, root.rotary_emb), root.rotary_emb)
        for layer in root.layers:
            functions = sources.attention_functions(layer.self_attn, rotary.TEXT)
            reason = reason or sources.reason_of(functions, layer.self_attn)
        if reason is not None:
            return reason
        try:
            return rotary.frequencies_reason(root.rotary_emb, self._spec(root))
        except ValueError as error:
            return str(error)

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """A forward for the rotary module and for each attention; with other positions, also the method that computes them."""
        at = f"{path}." if path else ""
        choice = next((choice for choice in choices if choice.site.kind == "rotary"), None)
        if choice is None:
            return []
        params = choice.rules[0].params
        choice.reason = params_reason(params, self.family)
        if choice.reason is not None:
            return []
        spec = self._spec(root)
        edits: list[Edit] = []
        positions = params.get("positions", "mrope")
        choice.change = "q and k turned in one pass, no tables"
        if positions != "mrope":
            owner, choice.reason = _owner(extra.model, root)
            if owner is None:
                return []
            spec = other_spec(spec, positions, root.config.rope_parameters["rope_theta"])
            index = types.MethodType(RopeIndex(positions, params.get("gamma")), owner[1])
            edits.append(Attribute(owner[0], owner[1], "get_rope_index", index))
            choice.change = f"positions and frequencies of {positions}, q and k turned in one pass"
        edits.append(rotary.positions_edit(choice.site.path, root.rotary_emb, rotary.TEXT))
        turn = rotary.by_spec(spec)
        for i, layer in enumerate(root.layers):
            forward = rotary.rotating(sources.forward_of(layer.self_attn), rotary.TEXT, turn)
            edits.append(
                Attribute(f"{at}layers.{i}.self_attn", layer.self_attn, "forward", method(forward, layer.self_attn))
            )
        return edits


def _owner(model: Any, root: nn.Module) -> tuple[tuple[str, nn.Module] | None, str | None]:
    """(path and module that compute the positions of a text model, None), or (None, why there is none)."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if getattr(module, "language_model", None) is root and hasattr(type(module), "get_rope_index"):
            reason = sources.reason_of(sources.model_functions(module))
            reason = reason or replaced(module, "get_rope_index")
            return (None, reason) if reason else ((path, module), None)
    return None, "positions: the model that computes them is not here; give the whole model"


ADAPTERS = [
    QwenText("qwen2_vl", "Qwen2VLTextModel"),
    QwenText("qwen2_5_vl", "Qwen2_5_VLTextModel"),
    QwenText("qwen3_vl", "Qwen3VLTextModel"),
]
