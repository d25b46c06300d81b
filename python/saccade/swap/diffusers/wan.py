"""Wan 2.1 and 2.2: self-attention over the video, with q/k norm over the row and the rotation fused before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from saccade.rope import RopeSpec, grid_positions, wan
from saccade.swap.attend import Context, attends
from saccade.swap.diffusers._processor import Processor, Watch, plain_rms_norm, processor_reason, project
from saccade.swap.edit import Attribute, Edit, PreHook, method
from saccade.swap.recipe import ATTENTION
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.source import fingerprint
from saccade.swap.tokens import Tokens

__all__ = ["ADAPTERS", "WanProcessor"]

Tensor = torch.Tensor
_VERSIONS = "diffusers 0.42"
_TESTED: dict[str, set[str]] = {
    "WanAttention.forward": {"53bed7eebf54db8e"},
    "WanAttnProcessor.__call__": {"7e9933416313d030"},
    "WanRotaryPosEmbed.forward": {"fa128a5910d271ad"},
}
_ARGUMENTS = ("hidden_states", "timestep", "encoder_hidden_states")


class WanProcessor(Processor):
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
        if encoder_hidden_states is not None or attention_mask is not None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)  # type: ignore[no-any-return]
        q, k, v = project(attn, hidden_states)
        fused = self.spec is not None and plain_rms_norm(attn.norm_q) and plain_rms_norm(attn.norm_k)
        if not fused:
            q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, S, H, D]
        if self.spec is not None and rotary_emb is not None:
            positions = rotary_emb[0][0, :, 0].t()  # [3, S]
            q, k = self.rotate(q, k, positions, (attn.norm_q, attn.norm_k) if fused else None, "row")
        elif rotary_emb is not None:
            q, k = _turned(q, *rotary_emb), _turned(k, *rotary_emb)
        out = self.attention(q, k, v).flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs of x [B, S, H, D] turned by tables [1, S, 1, D] in which each angle stands twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def _positions(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """In place of (cos, sin), each [1, S, 1, D]: the positions [1, S, 1, 3], twice. Context parallelism splits them as it does tables."""
    grid = _grid(hidden_states, self.patch_size)
    positions = grid_positions(grid, device=hidden_states.device).t()[None, :, None]
    return positions, positions


def _grid(hidden: Tensor, patch: Sequence[int]) -> tuple[int, int, int]:
    t, h, w = (size // edge for size, edge in zip(hidden.shape[2:], patch, strict=True))
    return t, h, w


def _tokens_of(root: Any, given: dict[str, Any]) -> Tokens:
    return Tokens(_grid(given["hidden_states"], root.config.patch_size))


class Wan(Adapter):
    """WanTransformer3DModel, in text-to-video, image-to-video and both experts of Wan 2.2."""

    family = "wan"
    roots = ("WanTransformer3DModel",)
    grid = (21, 30, 52)  # 81 frames at 480 x 832

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """No text among the video's tokens."""
        return Tokens(grid or self.grid)

    def sites(self, path: str, root: Any, tokens: Tokens) -> list[Site]:
        """The rotation, and self- and cross-attention of each block."""
        at = f"{path}." if path else ""
        heads, width = root.config.num_attention_heads, root.config.attention_head_dim
        shape: dict[str, Any] = {"heads": heads, "kv_heads": heads, "head_dim": width}
        depth = len(root.blocks)
        found, reasons = [], []
        for i, block in enumerate(root.blocks):
            common: dict[str, Any] = {**shape, "layer": i, "depth": depth}
            reason = processor_reason(block.attn1, _TESTED, _VERSIONS)
            reasons += [reason] if reason else []
            found.append(
                Site(
                    f"{at}blocks.{i}.attn1",
                    block.attn1,
                    "attention",
                    "self",
                    ATTENTION,
                    reason=reason,
                    tokens=(tokens.length,) * 2,
                    **common,
                )
            )
            text = 512
            found.append(
                Site(f"{at}blocks.{i}.attn2", block.attn2, "attention", "cross", tokens=(tokens.length, text), **common)
            )
        reason = reasons[0] if reasons else _rope_reason(root.rope, wan(width))
        rotary = Site(
            f"{at}rope",
            root.rope,
            "rotary",
            "self",
            frozenset({"rotary"}),
            reason=reason,
            tokens=(tokens.length * depth,) * 2,
            **shape,
        )
        return [rotary, *found]

    def edits(self, path: str, root: Any, choices: Sequence[Choice], extra: Extra) -> list[Edit]:
        """A processor for each chosen self-attention; all of them where the rotation is fused."""
        context = Context()
        edits: list[Edit] = []
        rotary = next((choice for choice in choices if choice.site.kind == "rotary"), None)
        chosen = {choice.site.path: choice for choice in choices if choice.site.kind == "attention"}
        spec = None if rotary is None else wan(root.config.attention_head_dim)
        at = f"{path}." if path else ""
        if rotary is not None:
            rotary.change = "norm and rotation of q and k in one pass, no tables"
            edits.append(Attribute(rotary.site.path, root.rope, "forward", method(_positions, root.rope)))
        for i, block in enumerate(root.blocks):
            name = f"{at}blocks.{i}.attn1"
            choice = chosen.get(name)
            if choice is None and spec is None:
                continue
            attend = attends(context, choice.rules if choice else (), i)
            edits.append(Attribute(name, block.attn1, "processor", WanProcessor(block.attn1.processor, attend, spec)))
            if choice is not None:
                choice.change = "processor"
        if edits:
            extra.contexts.append(context)
            edits.append(PreHook(path, root, Watch(context, _tokens_of, _ARGUMENTS, extra.pipeline)))
        return edits


def _rope_reason(module: nn.Module, spec: RopeSpec) -> str | None:
    found = fingerprint(type(module).forward)
    if found not in _TESTED["WanRotaryPosEmbed.forward"]:
        return f"WanRotaryPosEmbed.forward has an untested source ({found}); tested: {_VERSIONS}"
    if "forward" in vars(module):
        return "its forward was replaced by someone else"
    table: Any = module.freqs_cos
    angles = torch.tensor(spec.inv_freq, dtype=torch.float64)
    if table.is_meta:
        return None
    expected = angles.cos().repeat_interleave(2).to(table.dtype)
    if table.shape[1:] != expected.shape or not torch.allclose(table[1].cpu(), expected, rtol=0, atol=1e-6):
        return "its frequencies are not those of Wan's config"
    return None


ADAPTERS = [Wan()]
