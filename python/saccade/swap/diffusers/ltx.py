"""LTX-Video: self-attention over the video, with q/k norm over the row and the rotation, whose pairs run over the row, fused before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from saccade.rope import ltx
from saccade.swap.diffusers._merging import MASKED, MergingProcessor, merge_site
from saccade.swap.diffusers._place import place
from saccade.swap.diffusers._processor import Watch, indices, processor_reason, project, rotary_reason
from saccade.swap.edit import Attribute, Edit, method
from saccade.swap.recipe import ATTENTION
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.tokens import Tokens

__all__ = ["ADAPTERS", "LTXProcessor"]

Tensor = torch.Tensor
_VERSIONS = "diffusers 0.36 to 0.42"
_TESTED: dict[str, set[str]] = {
    "LTXAttention.forward": {"41ccc60565c968a9"},
    "LTXVideoAttnProcessor.__call__": {"3237b27070331309"},
    "LTXVideoRotaryPosEmbed.forward": {"c32972b1cec24946"},
    "LTXVideoRotaryPosEmbed._prepare_video_coords": {"3af690f97e6113ab"},
    "apply_rotary_emb": {"4c758413cf712c2e"},
}
_ARGUMENTS = (
    "hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "num_frames", "height", "width",
)  # fmt: skip


class LTXProcessor(MergingProcessor):
    """Self-attention of an LTX block."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._turn = self.of_stock("apply_rotary_emb")

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, S, C] -> [B, S, C]."""
        if encoder_hidden_states is not None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)  # type: ignore[no-any-return]
        rows = self.rows(hidden_states, None if attention_mask is None else MASKED)
        q, k, v = project(attn, rows.hidden)
        norms = self.norms(attn, q)
        if norms is None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if self.spec is None and image_rotary_emb is not None:
            tables = rows.tables(image_rotary_emb, 1)  # [B, S, C]
            q, k = self._turn(q, tables), self._turn(k, tables)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, S, H, D]
        if self.spec is not None and image_rotary_emb is not None:
            q, k = self.rotate(q, k, rows.positions(image_rotary_emb[0].permute(2, 0, 1)), norms, "row")  # [3, B, S]
        if attention_mask is None:
            out = self.among(rows, q, k, v)
        else:
            out = self.masked(q, k, v, query_mask(attn, attention_mask, *hidden_states.shape[:2]))
        return rows.back(attn.to_out[1](attn.to_out[0](out.flatten(2, 3).to(q.dtype))))


def query_mask(attn: Any, mask: Tensor, batch: int, tokens: int) -> Tensor:
    """The mask as the model's attention module prepares it, [B, H, Sq, Sk]."""
    mask = attn.prepare_attention_mask(mask, tokens, batch)
    return mask.view(batch, attn.heads, -1, mask.shape[-1])


def _positions(
    self: Any,
    hidden_states: Tensor,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rope_interpolation_scale: Any = None,
    video_coords: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """In place of (cos, sin), each [B, S, C]: the positions [B or 1, S, 3] in float64, twice."""
    bases = (self.base_num_frames, self.base_height, self.base_width)
    if video_coords is not None:
        shares = [video_coords[:, i].double() / base for i, base in enumerate(bases)]
    else:
        assert num_frames is not None and height is not None and width is not None
        grid = indices((num_frames, height, width), hidden_states.device).double()
        shares = list(grid[:, None])
        if rope_interpolation_scale is not None:
            patch = (self.patch_size_t, self.patch_size, self.patch_size)
            shares = [shares[i] * rope_interpolation_scale[i] * patch[i] / bases[i] for i in range(3)]
    positions = torch.stack(shares, dim=-1) * 2 - 1
    return positions, positions


def _tokens_of(root: Any, given: dict[str, Any]) -> Tokens | None:
    """None where the sequence holds more than the video: conditioning frames have coordinates, but no grid."""
    grid = tuple(given.get(name) for name in ("num_frames", "height", "width"))
    if not all(isinstance(size, int) for size in grid):
        return None
    tokens = Tokens(grid)  # type: ignore[arg-type]
    return tokens if tokens.length == given["hidden_states"].shape[1] else None


class LTX(Adapter):
    """LTXVideoTransformer3DModel. Cross-attention, with the prompt's mask, stays stock."""

    family = "ltx"
    package = "diffusers"
    roots = ("LTXVideoTransformer3DModel",)
    grid = (21, 16, 22)  # 161 frames at 512 x 704
    text = 128

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """No text among the video's tokens."""
        return Tokens(grid or self.grid)

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """The rotation, self- and cross-attention of each block, and merging around the former."""
        at = f"{path}." if path else ""
        heads, width = root.config.num_attention_heads, root.config.attention_head_dim
        shape: dict[str, Any] = {"heads": heads, "kv_heads": heads, "head_dim": width}
        depth = len(root.transformer_blocks)
        found, reasons, stock = [], [], None
        for i, block in enumerate(root.transformer_blocks):
            common: dict[str, Any] = {**shape, "layer": i, "depth": depth, "tokens": (tokens.length, tokens.length)}
            name, stock = f"{at}transformer_blocks.{i}", block.attn1.processor
            reason = processor_reason(block.attn1, _TESTED, _VERSIONS)
            reasons += [reason] if reason else []
            found.append(Site(f"{name}.attn1", block.attn1, "attention", "self", ATTENTION, reason=reason, **common))
            found.append(merge_site(f"{name}.attn1", block.attn1, tokens.length, i, depth, reason))
            common["tokens"] = (tokens.length, self.text)
            found.append(Site(f"{name}.attn2", block.attn2, "attention", "cross", **common))
        reason = reasons[0] if reasons else _rope_reason(root, stock)
        name, turned = f"{at}rope", (tokens.length * depth,) * 2
        kernels = frozenset({"rotary"})
        return [Site(name, root.rope, "rotary", "self", kernels, reason=reason, tokens=turned, **shape), *found]

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """A processor for each chosen self-attention; all of them where the rotation is fused."""
        at = f"{path}." if path else ""
        blocks = enumerate(root.transformer_blocks)
        attentions = [(f"{at}transformer_blocks.{i}.attn1", block.attn1) for i, block in blocks]
        config = root.config

        def spec() -> Any:
            return ltx(config.attention_head_dim, config.num_attention_heads, base=root.rope.theta)

        return place(
            path, root, choices, extra, LTXProcessor, attentions, spec,
            rotary_edits=lambda: [Attribute(f"{at}rope", root.rope, "forward", method(_positions, root.rope))],
            watch=lambda context, _: Watch(context, _tokens_of, _ARGUMENTS, extra.pipeline),
        )  # fmt: skip


def _rope_reason(root: Any, stock: Any) -> str | None:
    turn = type(stock).__call__.__globals__.get("apply_rotary_emb")
    coordinates = type(root.rope)._prepare_video_coords
    reason = rotary_reason(root.rope, _TESTED, _VERSIONS, turn, coordinates)
    if reason is None and root.rope.dim != root.config.num_attention_heads * root.config.attention_head_dim:
        reason = "its width is not that of the heads"
    return reason


ADAPTERS = [LTX()]
