"""Vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one attention call for all frames or windows, and fused rotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saccade.swap.attend import Context
from saccade.swap.edit import Attribute, Edit, PreHook, method
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.tokens import Tokens
from saccade.swap.transformers import _qwen_sources as sources
from saccade.swap.transformers import qwen_rotary as rotary
from saccade.swap.transformers._qwen_packed import Offsets, Packed, PackedSite, packed_forward, packing

__all__ = ["ADAPTERS", "QwenVision"]


class QwenVision(Adapter):
    """One of the three towers. Its tokens are patches, before 2 x 2 of them become one token of the language model."""

    package = "transformers"
    grid = (8, 24, 24)

    def __init__(self, family: str, root: str) -> None:
        self.family, self.roots = family, (root,)

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """No text among the patches."""
        return Tokens(grid or self.grid)

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """The rotation, and the attention of each block."""
        at = f"{path}." if path else ""
        depth, heads = len(root.blocks), root.blocks[0].attn.num_heads
        shape: dict[str, Any] = {"heads": heads, "kv_heads": heads, "head_dim": root.blocks[0].attn.head_dim}
        offsets = sources.reason_of(sources.offset_functions(root))
        found = []
        for i, block in enumerate(root.blocks):
            reason = offsets or sources.reason_of(sources.attention_functions(block.attn, None), block.attn)
            found.append(
                Site(
                    f"{at}blocks.{i}.attn", block.attn, "attention", "vision", frozenset({"dense"}), i, depth, reason,
                    tokens=(tokens.video,) * 2, groups=_groups(root, i, tokens), **shape,
                )
            )  # fmt: skip
        turning = Site(
            f"{at}rotary_pos_emb", root.rotary_pos_emb, "rotary", "vision", frozenset({"rotary"}), reason=_rotary_reason(root),
            tokens=(tokens.video * depth,) * 2, **shape,
        )  # fmt: skip
        return [turning, *found]

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """A forward for each chosen attention; for all of them where the rotation is fused."""
        at = f"{path}." if path else ""
        edits: list[Edit] = []
        turn = None
        for choice in choices:
            if choice.site.kind != "rotary":
                continue
            if choice.rules[0].params:
                choice.reason = "positions and gamma are of the text; give that rule role='text'"
                continue
            turn = rotary.by_spec(rotary.vision_spec(root))
            choice.change = "q and k turned in one pass, no tables"
            edits.append(rotary.positions_edit(choice.site.path, root.rotary_pos_emb, rotary.VISION))
        context = Context()
        packed = Packed(context)
        chosen = {c.site.path: c for c in choices if c.site.kind == "attention" and c.swapped}
        for i, block in enumerate(root.blocks):
            name, forward = f"{at}blocks.{i}.attn", sources.forward_of(block.attn)
            if turn is not None:
                forward = rotary.rotating(forward, rotary.VISION, turn)
            if name in chosen:
                chosen[name].change = "one call for all frames or windows"
                site = PackedSite(packed, chosen[name].rules[0], forward, packing(forward))
                edits.append(Attribute(name, block.attn, "_saccade_packed", site))
                edits.append(Attribute(name, block.attn, "forward", method(packed_forward, block.attn)))
            elif turn is not None:
                edits.append(Attribute(name, block.attn, "forward", method(forward, block.attn)))
        if chosen:
            extra.contexts.append(context)
            edits.append(PreHook(path, root, Offsets(packed)))
        return edits


def _groups(root: Any, layer: int, tokens: Tokens) -> float:
    """Attention sees one frame, or one window of it."""
    full = getattr(root, "fullatt_block_indexes", None)
    if full is None or layer in full:
        return float(tokens.grid[0])
    edge = root.window_size // root.patch_size
    return float(tokens.grid[0] * -(-tokens.grid[1] // edge) * -(-tokens.grid[2] // edge))


def _rotary_reason(root: Any) -> str | None:
    """Every consumer of the positions must be known: the tower, and the attention of each block."""
    reason = sources.reason_of(sources.tower_functions(root, root.rotary_pos_emb), root.rotary_pos_emb)
    for block in root.blocks:
        reason = reason or sources.reason_of(sources.attention_functions(block.attn, rotary.VISION), block.attn)
    if reason is not None:
        return reason
    try:
        return rotary.frequencies_reason(root.rotary_pos_emb, rotary.vision_spec(root))
    except ValueError as error:
        return str(error)


ADAPTERS = [
    QwenVision("qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
    QwenVision("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel"),
    QwenVision("qwen3_vl", "Qwen3VLVisionModel"),
]
