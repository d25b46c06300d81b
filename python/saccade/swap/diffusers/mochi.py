"""Mochi: joint attention of the video and the valid text behind it, with learned frequencies for every head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from saccade.rope import RopeSpec, mochi, mochi_positions
from saccade.swap.attend import sdpa
from saccade.swap.diffusers._joint import JointAdapter, JointProcessor, zero_rows
from saccade.swap.diffusers._processor import rotary_reason
from saccade.swap.diffusers._tables import turned_pairs
from saccade.swap.edit import Attribute, Edit
from saccade.swap.tokens import Tokens

__all__ = ["ADAPTERS", "MochiProcessor"]

Tensor = torch.Tensor
_TESTED: dict[str, set[str]] = {
    "MochiAttention.forward": {"dece636a1d11429f"},
    "MochiAttnProcessor2_0.__call__": {"f9eeab827cf0dfd9"},
    "MochiRoPE.forward": {"4b38ac368276b6dc"},
    "MochiRoPE._get_positions": {"8117dd626a227646"},
    "MochiRoPE._create_rope": {"f0c455e24a9b0d79"},
    "MochiRoPE._centers": {"1730346553174983"},
}


class MochiProcessor(JointProcessor):
    """One call for the batch, in which padding is masked as a key; stock calls once for each sample, without padding.

    As in stock, valid text comes first in the output wherever it stood, and the rest is zero before the output layer.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, S, C], encoder_hidden_states [B, N, E], attention_mask [B, N], true for text -> both again."""
        video = hidden_states.shape[1]
        padding, order = (~attention_mask.bool()).to(torch.int8).sort(dim=1, stable=True)
        valid = padding == 0
        text = encoder_hidden_states.gather(1, order[..., None].expand_as(encoder_hidden_states))
        q, k, v = (layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        spec = image_rotary_emb[1] if image_rotary_emb is not None else None
        q, k = self.turn(
            (attn.norm_q, attn.norm_k), q, k, image_rotary_emb, spec if isinstance(spec, RopeSpec) else None
        )
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        eq, ek, ev = (layer(text).unflatten(2, (attn.heads, -1)) for layer in layers)
        eq = eq if attn.norm_added_q is None else attn.norm_added_q(eq)
        ek = ek if attn.norm_added_k is None else attn.norm_added_k(ek)
        q, k, v = (torch.cat(pair, 1) for pair in ((q, eq), (k, ek), (v, ev)))
        key_mask = F.pad(valid, (video, 0), value=True)
        out = self.joint(q, k, v, key_mask, key_mask).flatten(2, 3)
        words = zero_rows(out[:, video:], valid)
        if hasattr(attn, "to_add_out"):
            words = attn.to_add_out(words)
        return attn.to_out[1](attn.to_out[0](out[:, :video])), words

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor, before: int, after: int) -> Tensor:
        """Interleaved pairs of x [B, S, H, D] turned by tables [S, H, D / 2]."""
        return turned_pairs(x.float(), cos, sin).type_as(x)

    def _stock(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, parallel: Any) -> Tensor:
        """Each sample on its own, [B, S, H, D], so that torch may take a kernel without mask; compiled: all, with a mask."""
        assert mask is not None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if torch.compiler.is_compiling():
            return sdpa(q, k, v, mask=mask[:, None, None]).transpose(1, 2)
        parts = []
        for i, length in enumerate(mask.sum(1).tolist()):  # keys that may be seen come first
            part = sdpa(*(x[i : i + 1, :, :length] for x in (q, k, v)))
            parts.append(F.pad(part, (0, 0, 0, q.shape[2] - length)))
        return torch.cat(parts).transpose(1, 2)


class _Positions:
    """In place of MochiRoPE.forward: positions [S, 3] and the spec of the frequencies, instead of cos and sin [S, H, D / 2].

    Frequencies that get no gradient in this call are read once, and again when they change.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._read: tuple[Any, ...] = ()
        self._spec: RopeSpec | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, pos_frequencies: Tensor, num_frames: int, height: int, width: int, device: Any = None, dtype: Any = None
    ) -> tuple[Tensor, RopeSpec]:
        """See the class."""
        grid = (num_frames, height, width)
        positions = mochi_positions(grid, area=self.module.target_area, device=device)
        return positions.t(), self._spec_of(pos_frequencies)

    def _spec_of(self, frequencies: Tensor) -> RopeSpec:
        if torch.is_grad_enabled() and frequencies.requires_grad:
            return mochi(frequencies)
        version = None if frequencies.is_inference() else frequencies._version
        state = (frequencies.data_ptr(), version, frequencies.dtype, frequencies.device)
        if self._spec is None or version is None or state != self._read:
            self._spec, self._read = mochi(frequencies.detach().float().cpu()), state
        return self._spec


class Mochi(JointAdapter):
    """MochiTransformer3DModel."""

    family = "mochi"
    roots = ("MochiTransformer3DModel",)
    grid = (28, 30, 53)  # 163 frames at 480 x 848
    text = 256
    tested = _TESTED
    arguments = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
    processor = MochiProcessor

    def joint(self, root: Any) -> list[tuple[str, Any]]:
        """Of every block."""
        return [(f"transformer_blocks.{i}.attn1", block.attn1) for i, block in enumerate(root.transformer_blocks)]

    def others(self, root: Any) -> list[tuple[str, Any]]:
        """The pooling of the text."""
        return [("time_embed.pooler", root.time_embed.pooler)]

    def spec(self, root: Any) -> None:
        """It comes with each call."""
        return None

    def rotary(self, root: Any) -> tuple[str, nn.Module, str | None]:
        """The module that makes the tables."""
        cls = type(root.rope)
        relied = (getattr(cls, name, None) for name in ("_get_positions", "_create_rope", "_centers"))
        return "rope", root.rope, rotary_reason(root.rope, self.tested, self.versions, *relied)

    def rotary_edits(self, path: str, root: Any) -> list[Edit]:
        """Positions and frequencies in place of tables."""
        return [Attribute(f"{path}rope", root.rope, "forward", _Positions(root.rope))]

    def tokens_of(self, root: Any, given: dict[str, Any]) -> Tokens:
        """The video, then the text with its padding."""
        patch = root.config.patch_size
        t, h, w = given["hidden_states"].shape[2:]
        return Tokens((t, h // patch, w // patch), suffix=given["encoder_hidden_states"].shape[1])


ADAPTERS = [Mochi()]
