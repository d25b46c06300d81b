"""LTX-Video: self-attention over the video, with q/k norm over the row and the rotation, whose pairs run over the row, fused before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from saccade.rope import RopeSpec, ltx
from saccade.swap.attend import Attend
from saccade.swap.diffusers._merging import MASKED, MergingProcessor
from saccade.swap.diffusers._processor import indices, project, rotary_reason
from saccade.swap.diffusers._video import VideoAdapter
from saccade.swap.site import Site
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


def width_reason(root: Any) -> str | None:
    """Why pairs that run over the row cannot be turned by heads: the tables are of another width; or None."""
    width = root.config.num_attention_heads * root.config.attention_head_dim
    return None if root.rope.dim == width else "its width is not that of the heads"


class LTX(VideoAdapter):
    """LTXVideoTransformer3DModel. Cross-attention, with the prompt's mask, stays stock."""

    family = "ltx"
    roots = ("LTXVideoTransformer3DModel",)
    grid = (21, 16, 22)  # 161 frames at 512 x 704
    text = 128
    tested, versions, arguments = _TESTED, _VERSIONS, _ARGUMENTS
    positions = _positions

    def processor(self, stock: Any, attend: Attend, spec: RopeSpec | None) -> LTXProcessor:
        """Of any block."""
        return LTXProcessor(stock, attend, spec)

    def spec(self, root: Any) -> RopeSpec:
        """Pairs over all heads."""
        return ltx(root.config.attention_head_dim, root.config.num_attention_heads, base=root.rope.theta)

    def rotary_reason(self, root: Any, stock: Any) -> str | None:
        """An unknown source of the tables, of the coordinates, or of what turns by them; or another width."""
        turn = type(stock).__call__.__globals__.get("apply_rotary_emb")
        coordinates = type(root.rope)._prepare_video_coords
        return rotary_reason(root.rope, _TESTED, _VERSIONS, turn, coordinates) or width_reason(root)

    def tokens_of(self, root: Any, given: dict[str, Any]) -> Tokens | None:
        """None where the sequence holds more than the video: conditioning frames have coordinates, but no grid."""
        grid = tuple(given.get(name) for name in ("num_frames", "height", "width"))
        if not all(isinstance(size, int) for size in grid):
            return None
        tokens = Tokens(grid)  # type: ignore[arg-type]
        return tokens if tokens.length == given["hidden_states"].shape[1] else None

    def others(self, name: str, block: Any, common: dict[str, Any], video: int) -> Iterator[Site]:
        """Cross-attention to the text."""
        yield Site(f"{name}.attn2", block.attn2, "attention", "cross", tokens=(video, self.text), **common)


ADAPTERS = [LTX()]
