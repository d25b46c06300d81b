"""Wan 2.1 and 2.2: self-attention over the video, with q/k norm over the row and the rotation fused before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from saccade.rope import RopeSpec, wan
from saccade.swap.diffusers._merging import MASKED, MergingProcessor, merge_site
from saccade.swap.diffusers._place import place
from saccade.swap.diffusers._processor import Watch, indices, processor_reason, project, rotary_reason
from saccade.swap.diffusers._tables import turned_pairs
from saccade.swap.edit import Attribute, Edit, method
from saccade.swap.recipe import ATTENTION
from saccade.swap.site import Adapter, Choice, Extra, Site
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


def _tokens_of(root: Any, given: dict[str, Any]) -> Tokens:
    return Tokens(_grid(given["hidden_states"], root.config.patch_size))


def _blocks(root: Any) -> Iterator[tuple[str, Any, int]]:
    """(path, block, layer): VACE's control blocks come before the blocks whose numbers they have."""
    for i, block in enumerate(getattr(root, "vace_blocks", ())):
        yield f"vace_blocks.{i}", block, root.config.vace_layers[i]
    for i, block in enumerate(root.blocks):
        yield f"blocks.{i}", block, i


class Wan(Adapter):
    """Text-to-video, image-to-video, both experts of Wan 2.2, VACE and Animate. Cross-attention (text, image, face) stays stock."""

    family = "wan"
    package = "diffusers"
    roots = ("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel")
    grid = (21, 30, 52)  # 81 frames at 480 x 832

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """No text among the video's tokens."""
        return Tokens(grid or self.grid)

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """The rotation, self- and cross-attention of each block, and merging around the former."""
        at = f"{path}." if path else ""
        heads, width = root.config.num_attention_heads, root.config.attention_head_dim
        shape: dict[str, Any] = {"heads": heads, "kv_heads": heads, "head_dim": width}
        depth = len(root.blocks)
        video = (tokens.length, tokens.length)
        found, reasons = [], []
        for name, block, layer in _blocks(root):
            common: dict[str, Any] = {**shape, "layer": layer, "depth": depth}
            name, reason = f"{at}{name}", processor_reason(block.attn1, _TESTED, _VERSIONS)
            reasons += [reason] if reason else []
            common["tokens"] = video
            found.append(Site(f"{name}.attn1", block.attn1, "attention", "self", ATTENTION, reason=reason, **common))
            found.append(merge_site(f"{name}.attn1", block.attn1, tokens.length, layer, depth, reason))
            common["tokens"] = (tokens.length, _TEXT)
            found.append(Site(f"{name}.attn2", block.attn2, "attention", "cross", **common))
        for i, face in enumerate(getattr(root, "face_adapter", ())):
            found.append(Site(f"{at}face_adapter.{i}", face, "attention", "cross"))
        reason = reasons[0] if reasons else rotary_reason(root.rope, _TESTED, _VERSIONS) or _table_reason(root)
        turned = (tokens.length * sum(site.kind == "merge" for site in found),) * 2
        name, kernels = f"{at}rope", frozenset({"rotary"})
        return [Site(name, root.rope, "rotary", "self", kernels, reason=reason, tokens=turned, **shape), *found]

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """A processor for each chosen self-attention; all of them where the rotation is fused."""
        at = f"{path}." if path else ""
        attentions = [(f"{at}{name}.attn1", block.attn1) for name, block, _ in _blocks(root)]
        return place(
            path, root, choices, extra, WanProcessor, attentions,
            spec_of=lambda: _spec(root),
            rotary_edits=lambda: [Attribute(f"{at}rope", root.rope, "forward", method(_positions, root.rope))],
            watch=lambda context, _: Watch(context, _tokens_of, _ARGUMENTS, extra.pipeline),
        )  # fmt: skip


def _spec(root: Any) -> RopeSpec:
    return wan(root.config.attention_head_dim)


def _table_reason(root: Any) -> str | None:
    table: Any = root.rope.freqs_cos
    angles = torch.tensor(_spec(root).inv_freq, dtype=torch.float64)
    if table.is_meta:
        return None
    expected = angles.cos().repeat_interleave(2).to(table.dtype)
    if table.shape[1:] != expected.shape or not torch.allclose(table[1].cpu(), expected, rtol=0, atol=1e-6):
        return "its frequencies are not those of Wan's config"
    return None


ADAPTERS = [Wan()]
