"""What models share whose self-attention sees the video alone: their sites, and the edits that carry out a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from saccade.rope import RopeSpec
from saccade.swap.attend import Attend
from saccade.swap.diffusers._merging import merge_site
from saccade.swap.diffusers._place import place
from saccade.swap.diffusers._processor import Processor, Watch, processor_reason
from saccade.swap.edit import Attribute, Edit, method
from saccade.swap.recipe import ATTENTION
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.tokens import Tokens

__all__ = ["VideoAdapter"]


class VideoAdapter(Adapter):
    """A root with a module `rope` and blocks whose `attn1` is the video's self-attention. Subclasses say what differs.

    Attributes:
        tested, versions: sources that are known.
        arguments: of the root's forward, in order.
        positions: takes the place of `rope.forward` where the rotation is fused.
    """

    package = "diffusers"
    tested: ClassVar[dict[str, set[str]]]
    versions: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]
    positions: ClassVar[Callable[..., Any]]

    def blocks(self, root: Any) -> Iterator[tuple[str, Any, int]]:
        """(path from the root, block, layer)."""
        for i, block in enumerate(root.transformer_blocks):
            yield f"transformer_blocks.{i}", block, i

    def processor(self, stock: Any, attend: Attend, spec: RopeSpec | None) -> Processor:
        """What takes the place of a stock processor."""
        raise NotImplementedError

    def spec(self, root: Any) -> RopeSpec:
        """Of the rotation."""
        raise NotImplementedError

    def rotary_reason(self, root: Any, stock: Any) -> str | None:
        """Why the rotation cannot be fused, or None; `stock` is a processor of the root."""
        raise NotImplementedError

    def tokens_of(self, root: Any, given: dict[str, Any]) -> Tokens | None:
        """Of a call of the root, or None."""
        raise NotImplementedError

    def others(self, name: str, block: Any, common: dict[str, Any], video: int) -> Iterator[Site]:
        """The attention modules of a block that stay stock; `common` has heads, widths and layer, `video` is its tokens."""
        raise NotImplementedError

    def outside(self, at: str, root: Any) -> Iterator[Site]:
        """Attention modules outside of the blocks."""
        return iter(())

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """No text among the video's tokens."""
        return Tokens(grid or self.grid)

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """The rotation, all attention modules of each block, and merging around the video's own."""
        at = f"{path}." if path else ""
        heads, width = root.config.num_attention_heads, root.config.attention_head_dim
        shape: dict[str, Any] = {"heads": heads, "kv_heads": heads, "head_dim": width}
        blocks = list(self.blocks(root))
        depth = 1 + max((layer for _, _, layer in blocks), default=-1)
        found: list[Site] = []
        reasons, video = [], (tokens.length, tokens.length)
        for name, block, layer in blocks:
            common: dict[str, Any] = {**shape, "layer": layer, "depth": depth}
            own, reason = f"{at}{name}.attn1", processor_reason(block.attn1, self.tested, self.versions)
            reasons += [reason] if reason else []
            found.append(Site(own, block.attn1, "attention", "self", ATTENTION, reason=reason, tokens=video, **common))
            found.append(merge_site(own, block.attn1, tokens.length, layer, depth, reason))
            found += self.others(f"{at}{name}", block, common, tokens.length)
        found += self.outside(at, root)
        stock = blocks[-1][1].attn1.processor if blocks else None
        reason = reasons[0] if reasons else self.rotary_reason(root, stock)
        turned = (tokens.length * len(blocks),) * 2
        name, kernels = f"{at}rope", frozenset({"rotary"})
        return [Site(name, root.rope, "rotary", "self", kernels, reason=reason, tokens=turned, **shape), *found]

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """A processor for each chosen self-attention; all of them where the rotation is fused."""
        at = f"{path}." if path else ""
        positions = method(type(self).positions, root.rope)
        return place(
            path, root, choices, extra, self.processor,
            [(f"{at}{name}.attn1", block.attn1) for name, block, _ in self.blocks(root)],
            spec_of=lambda: self.spec(root),
            rotary_edits=lambda: [Attribute(f"{at}rope", root.rope, "forward", positions)],
            watch=lambda context, _: Watch(context, self.tokens_of, self.arguments, extra.pipeline),
        )  # fmt: skip
