"""Wan 2.1 and 2.2: self-attention over the video, with q/k norm over the row and the rotation fused before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from saccade.rope import RopeSpec, wan
from saccade.swap.attend import Attend
from saccade.swap.diffusers._merging import MASKED, MergingProcessor
from saccade.swap.diffusers._processor import indices, project, rotary_reason
from saccade.swap.diffusers._tables import turned_pairs
from saccade.swap.diffusers._video import VideoAdapter
from saccade.swap.site import Site
from saccade.swap.tokens import Tokens

__all__ = ["ADAPTERS", "WanProcessor"]

Tensor = torch.Tensor
_VERSIONS = "diffusers 0.36 to 0.42"
_TESTED: dict[str, set[str]] = {
    "WanAttention.forward": {"53bed7eebf54db8e"},
    "WanAttnProcessor.__call__": {"7e9933416313d030", "d17c7e8a8982927c"},
    "WanRotaryPosEmbed.forward": {"fa128a5910d271ad"},
}
_ARGUMENTS = ("hidden_states", "timestep", "encoder_hidden_states")
_TEXT = 512


class WanProcessor(MergingProcessor):
    """Self-attention of a Wan block."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, S, C] -> [B, S, C]."""
        if encoder_hidden_states is not None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)  # type: ignore[no-any-return]
        rows = self.rows(hidden_states, None if attention_mask is None else MASKED)
        q, k, v = project(attn, rows.hidden)
        norms = self.norms(attn, q)
        if norms is None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, S, H, D]
        if self.spec is not None and rotary_emb is not None:
            positions = rows.positions(rotary_emb[0][0, :, 0].t())  # [3, S], or [3, B, M] of merged rows
            q, k = self.rotate(q, k, positions, norms, "row")
        elif rotary_emb is not None:
            cos, sin = rows.tables(rotary_emb, 1)  # [1 or B, S, 1, D], each angle twice
            q, k = (turned_pairs(x, cos[..., 0::2], sin[..., 1::2]).type_as(x) for x in (q, k))
        out = self.among(rows, q, k, v) if attention_mask is None else self.masked(q, k, v, attention_mask)
        return rows.back(attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(q))))


def _positions(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """In place of (cos, sin), each [1, S, 1, D]: the positions [1, S, 1, 3], twice. Context parallelism splits them as it does tables."""
    grid = _grid(hidden_states, self.patch_size)
    positions = indices(grid, hidden_states.device).t()[None, :, None]
    return positions, positions


def _grid(hidden: Tensor, patch: Sequence[int]) -> tuple[int, int, int]:
    t, h, w = (size // edge for size, edge in zip(hidden.shape[2:], patch, strict=True))
    return t, h, w


class Wan(VideoAdapter):
    """Text-to-video, image-to-video, both experts of Wan 2.2, VACE and Animate. Cross-attention (text, image, face) stays stock."""

    family = "wan"
    roots = ("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel")
    grid = (21, 30, 52)  # 81 frames at 480 x 832
    tested, versions, arguments = _TESTED, _VERSIONS, _ARGUMENTS
    positions = _positions

    def blocks(self, root: Any) -> Iterator[tuple[str, Any, int]]:
        """VACE's control blocks come before the blocks whose numbers they have."""
        for i, block in enumerate(getattr(root, "vace_blocks", ())):
            yield f"vace_blocks.{i}", block, root.config.vace_layers[i]
        for i, block in enumerate(root.blocks):
            yield f"blocks.{i}", block, i

    def processor(self, stock: Any, attend: Attend, spec: RopeSpec | None) -> WanProcessor:
        """Of any block."""
        return WanProcessor(stock, attend, spec)

    def spec(self, root: Any) -> RopeSpec:
        """Of the head's width alone."""
        return wan(root.config.attention_head_dim)

    def rotary_reason(self, root: Any, stock: Any) -> str | None:
        """An unknown source, or tables that are not those of the config."""
        return rotary_reason(root.rope, _TESTED, _VERSIONS) or self._table_reason(root)

    def _table_reason(self, root: Any) -> str | None:
        table: Any = root.rope.freqs_cos
        angles = torch.tensor(self.spec(root).inv_freq, dtype=torch.float64)
        if table.is_meta:
            return None
        expected = angles.cos().repeat_interleave(2).to(table.dtype)
        if table.shape[1:] != expected.shape or not torch.allclose(table[1].cpu(), expected, rtol=0, atol=1e-6):
            return "its frequencies are not those of Wan's config"
        return None

    def tokens_of(self, root: Any, given: dict[str, Any]) -> Tokens:
        """From the shape of the latents."""
        return Tokens(_grid(given["hidden_states"], root.config.patch_size))

    def others(self, name: str, block: Any, common: dict[str, Any], video: int) -> Iterator[Site]:
        """Cross-attention to the text."""
        yield Site(f"{name}.attn2", block.attn2, "attention", "cross", tokens=(video, _TEXT), **common)

    def outside(self, at: str, root: Any) -> Iterator[Site]:
        """Animate's attention to the face."""
        for i, face in enumerate(getattr(root, "face_adapter", ())):
            yield Site(f"{at}face_adapter.{i}", face, "attention", "cross")


ADAPTERS = [Wan()]
