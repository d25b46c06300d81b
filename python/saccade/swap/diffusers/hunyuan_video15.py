"""HunyuanVideo-1.5: joint attention of the video and, behind it, of image and text tokens of which the valid come first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from saccade.swap.diffusers._joint import zero_rows
from saccade.swap.diffusers.hunyuan_video import HunyuanVideo, HunyuanVideoProcessor, grid_of
from saccade.swap.tokens import Tokens

__all__ = ["ADAPTERS", "HunyuanVideo15Processor"]

Tensor = torch.Tensor
_TESTED: dict[str, set[str]] = {
    "Attention.forward": {"4fe1d81dfdbb4de0"},
    "HunyuanVideo15AttnProcessor2_0.__call__": {"1bdd11dcffd854f9"},
    "HunyuanVideo15RotaryPosEmbed.forward": {"32511d5dfc4c7332"},
}


class HunyuanVideo15Processor(HunyuanVideoProcessor):
    """Stock makes a mask [B, 1, S, S] in every block, where padding neither sees nor is seen; here it is a mask [B, S] of keys.

    What padding gets as a query is then set to the zeros that stock's attention gives to a row that sees nothing.
    """

    def under(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention [B, S + N, H, D] under a mask [B, N] of the text."""
        if mask is None:
            return self.joint(q, k, v, None, None)
        key = F.pad(mask.bool(), (q.shape[1] - mask.shape[1], 0), value=True)
        slot = self.attend.rule_now()
        if slot is None or slot.rule.kernel == "stock":
            return self.joint(q, k, v, key, key[:, None, None, :] & key[:, None, :, None])
        return self.joint(q, k, v, key, key[:, None, None])

    def leave(self, attn: Any, video: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output layers."""
        return super().leave(attn, video, text if mask is None else zero_rows(text, mask.bool()), mask)


class HunyuanVideo15(HunyuanVideo):
    """HunyuanVideo15Transformer3DModel: text to video and image to video."""

    family = "hunyuan_video15"
    roots = ("HunyuanVideo15Transformer3DModel",)
    grid = (31, 30, 53)  # 121 frames at 480 x 848
    text = 1985
    tested = _TESTED
    arguments = (
        "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "timestep_r",
        "encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds",
    )  # fmt: skip
    processor = HunyuanVideo15Processor

    def joint(self, root: Any) -> list[tuple[str, Any]]:
        """All blocks have two streams."""
        return [(f"transformer_blocks.{i}.attn", block.attn) for i, block in enumerate(root.transformer_blocks)]

    def tokens_of(self, root: Any, given: dict[str, Any]) -> Tokens:
        """The video, then both texts and the image, with their padding."""
        names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        suffix = sum(given[name].shape[1] for name in names)
        return Tokens(grid_of(root, given["hidden_states"]), suffix=suffix)


ADAPTERS = [HunyuanVideo15()]
