"""HunyuanVideo: joint attention of the video and the text behind it, in blocks of two streams and of one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from saccade.rope import RopeSpec, grid_positions, hunyuan_video
from saccade.swap.diffusers._joint import JointAdapter, JointProcessor, key_mask_of, table_reason
from saccade.swap.edit import Attribute, Edit, method
from saccade.swap.tokens import Tokens

__all__ = ["ADAPTERS", "HunyuanVideoProcessor", "grid_of", "positions_in_place_of_tables"]

Tensor = torch.Tensor
_TESTED: dict[str, set[str]] = {
    "Attention.forward": {"4fe1d81dfdbb4de0"},
    "HunyuanVideoAttnProcessor2_0.__call__": {"1da76ddbb27710e0"},
    "HunyuanVideoRotaryPosEmbed.forward": {"992297c42dfa205a"},
}


class HunyuanVideoProcessor(JointProcessor):
    """Joint attention of both kinds of blocks: with linear layers of its own for the text, and with shared ones.

    Padded text is masked as a key. As a query it attends like any other token, as in stock.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, S, C], encoder_hidden_states [B, N, C], attention_mask bool [B, 1, 1, S + N] -> both again."""
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        shared = attn.add_q_proj is None and encoder_hidden_states is not None
        x = torch.cat([hidden_states, encoder_hidden_states], 1) if shared else hidden_states  # type: ignore[list-item]
        q, k, v = (layer(x).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        norms = (attn.norm_q, attn.norm_k)
        q, k = self.turn(norms, q, k, image_rotary_emb, self._spec_of(image_rotary_emb), after=text if shared else 0)
        if encoder_hidden_states is not None and not shared:
            added = self.added(attn, encoder_hidden_states)
            q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), added, strict=True))
        out = self.under(q, k, v, attention_mask).flatten(2, 3)
        if encoder_hidden_states is None:
            return out, None
        video, words = out[:, : out.shape[1] - text], out[:, out.shape[1] - text :]
        return self.leave(attn, video, words, attention_mask)

    def _spec_of(self, rotary: tuple[Tensor, Tensor] | None) -> RopeSpec | None:
        """The spec where positions [S, 3] came; None where tables did, as when a block is called on its own."""
        return self.spec if rotary is not None and self.spec is not None and rotary[0].shape[-1] == 3 else None

    def added(self, attn: Any, text: Tensor) -> list[Tensor]:
        """q, k and v [B, N, H, D] of the text."""
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q, k, v = (layer(text).unflatten(2, (attn.heads, -1)) for layer in layers)
        q = q if attn.norm_added_q is None else attn.norm_added_q(q)
        k = k if attn.norm_added_k is None else attn.norm_added_k(k)
        return [q, k, v]

    def under(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention [B, S + N, H, D] under the mask that the block was given."""
        return self.joint(q, k, v, key_mask_of(mask, q.shape[0]), mask)

    def leave(self, attn: Any, video: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output layers, where the block has them."""
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def _positions(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """In place of (cos, sin), each [S, D]: the positions [S, 3], twice."""
    t, h, w = hidden_states.shape[2:]
    grid = (t // self.patch_size_t, h // self.patch_size, w // self.patch_size)
    positions = grid_positions(grid, device=hidden_states.device).t()
    return positions, positions


def positions_in_place_of_tables(at: str, root: Any) -> list[Edit]:
    """The edit of the module that makes the tables."""
    return [Attribute(f"{at}rope", root.rope, "forward", method(_positions, root.rope))]


def grid_of(root: Any, hidden: Tensor) -> tuple[int, int, int]:
    """(T, H, W) tokens of latents [B, C, T, H, W]."""
    t, h, w = hidden.shape[2:]
    patch = root.config.patch_size
    return t // root.config.patch_size_t, h // patch, w // patch


class HunyuanVideo(JointAdapter):
    """HunyuanVideoTransformer3DModel: text to video, and image to video by more channels or by a replaced first frame."""

    family = "hunyuan_video"
    roots = ("HunyuanVideoTransformer3DModel",)
    grid = (33, 45, 80)  # 129 frames at 720 x 1280
    text = 256
    tested = _TESTED
    arguments: ClassVar[tuple[str, ...]] = (
        "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "guidance"
    )  # fmt: skip
    processor: ClassVar[type[JointProcessor]] = HunyuanVideoProcessor

    def joint(self, root: Any) -> list[tuple[str, Any]]:
        """Blocks of two streams, then of one."""
        kinds = ("transformer_blocks", "single_transformer_blocks")
        return [(f"{kind}.{i}.attn", block.attn) for kind in kinds for i, block in enumerate(getattr(root, kind))]

    def others(self, root: Any) -> list[tuple[str, Any]]:
        """The token refiner."""
        name = "context_embedder.token_refiner.refiner_blocks"
        return [(f"{name}.{i}.attn", block.attn) for i, block in enumerate(root.get_submodule(name))]

    def spec(self, root: Any) -> RopeSpec:
        """Of the module that makes the tables."""
        return hunyuan_video(root.config.attention_head_dim, base=root.rope.theta, sections=root.rope.rope_dim)

    def rotary(self, root: Any) -> tuple[str, nn.Module, str | None]:
        """The module that makes the tables."""
        return "rope", root.rope, table_reason(root.rope, self.tested, self.versions, lambda: self.spec(root))

    def rotary_edits(self, path: str, root: Any) -> list[Edit]:
        """See `positions_in_place_of_tables`."""
        return positions_in_place_of_tables(path, root)

    def tokens_of(self, root: Any, given: dict[str, Any]) -> Tokens:
        """The video, then the text with its padding."""
        return Tokens(grid_of(root, given["hidden_states"]), suffix=given["encoder_hidden_states"].shape[1])


ADAPTERS = [HunyuanVideo()]
