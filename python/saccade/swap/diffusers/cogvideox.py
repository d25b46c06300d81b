"""CogVideoX 1.0 and 1.5: joint attention of the text and the video behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from saccade.rope import RopeSpec, cogvideox, cogvideox_crop, cogvideox_positions
from saccade.swap.attend import Context
from saccade.swap.diffusers._joint import JointAdapter, JointProcessor
from saccade.swap.diffusers._processor import Watch
from saccade.swap.edit import Edit
from saccade.swap.recipe import Rule
from saccade.swap.site import Choice
from saccade.swap.tokens import Tokens

__all__ = ["ADAPTERS", "CogVideoXProcessor"]

Tensor = torch.Tensor
_TESTED: dict[str, set[str]] = {
    "Attention.forward": {"4fe1d81dfdbb4de0"},
    "CogVideoXAttnProcessor2_0.__call__": {"dc6bd6bda05f25b9"},
    "FusedCogVideoXAttnProcessor2_0.__call__": {"e5b462c95944eaf8"},
}


class CogVideoXProcessor(JointProcessor):
    """Joint attention of a block; the text has no padding that is masked."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, S, C], encoder_hidden_states [B, N, C] -> both again."""
        text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        if type(self.stock).__name__.startswith("Fused"):
            q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        positions = image_rotary_emb is not None and self.spec is not None and image_rotary_emb[0].shape[-1] == 3
        norms = (attn.norm_q, attn.norm_k)
        q, k = self.turn(norms, q, k, image_rotary_emb, self.spec if positions else None, before=text)
        if attention_mask is not None:
            batch, length = x.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        out = self.joint(q, k, v, None, attention_mask).flatten(2, 3)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]


class _Watch(Watch):
    """Also puts positions [S, 3] in the place of the tables that the pipeline made, where they are those of the grid.

    Tables are compared when they are first seen: once for a generation.
    """

    def __init__(self, adapter: CogVideoX, context: Context, pipeline: Any, spec: RopeSpec | None, rule: Rule | None):
        super().__init__(context, adapter.tokens_of, adapter.arguments, pipeline)
        self.spec, self.rule = spec, rule
        self.seen: Tensor | None = None
        self.positions: Tensor | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See the class."""
        super().__call__(root, args, kwargs)
        name = "image_rotary_emb"
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tables = given.get(name)
        if self.spec is None or self.rule is None or tables is None:
            return None
        if tables[0] is not self.seen:
            self.positions = _positions_of(root, self.context.tokens, self.spec, *tables)
            self.seen = tables[0]
        if self.positions is None:
            self.context.unserved(self.rule, "the tables are not those of the grid", ran="they were used")
            return None
        swapped = (self.positions, self.positions)
        if name in kwargs:
            return args, {**kwargs, name: swapped}
        at = self.names.index(name)
        return (*args[:at], swapped, *args[at + 1 :]), kwargs


def _positions_of(root: Any, tokens: Tokens | None, spec: RopeSpec, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Positions [S, 3] whose tables [S, D] these are: of 1.0, fitted into the size of training, or of 1.5, counted; or None."""
    if tokens is None or cos.shape != (tokens.video, spec.head_dim) or sin.shape != cos.shape:
        return None
    config = root.config
    crop = None
    if config.patch_size_t is None:
        base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        crop = cogvideox_crop(tokens.grid[1:], base)
    positions = cogvideox_positions(tokens.grid, crop=crop)
    angles = positions.double().t() @ torch.tensor(spec.dense(), dtype=torch.float64)[:, 0]  # [S, R]
    for table, wanted in ((cos, angles.cos()), (sin, angles.sin())):
        # 1e-4: an angle of 100 radians in fp32 is known to 8e-6; a shift by a hundredth of a token is seen.
        if not torch.allclose(table.double().cpu(), wanted.repeat_interleave(2, dim=1), rtol=0, atol=1e-4):
            return None
    return positions.to(cos.device).t()


class CogVideoX(JointAdapter):
    """CogVideoXTransformer3DModel, 1.0 and 1.5, text to video and image to video."""

    family = "cogvideox"
    roots = ("CogVideoXTransformer3DModel",)
    grid = (13, 30, 45)  # 49 frames at 480 x 720
    text = 226
    tested = _TESTED
    arguments = (
        "hidden_states", "encoder_hidden_states", "timestep", "timestep_cond", "ofs", "image_rotary_emb"
    )  # fmt: skip
    processor = CogVideoXProcessor
    rotary_change = "rotation of q and k in one pass, no tables"

    def tokens(self, grid: tuple[int, int, int] | None, text: int | None) -> Tokens:
        """The text comes first."""
        return Tokens(grid or self.grid, prefix=self.text if text is None else text)

    def joint(self, root: Any) -> list[tuple[str, Any]]:
        """Of every block."""
        return [(f"transformer_blocks.{i}.attn1", block.attn1) for i, block in enumerate(root.transformer_blocks)]

    def others(self, root: Any) -> list[tuple[str, Any]]:
        """None."""
        return []

    def spec(self, root: Any) -> RopeSpec:
        """Of the tables that pipelines make."""
        return cogvideox(root.config.attention_head_dim)

    def rotary(self, root: Any) -> tuple[str, nn.Module, str | None] | None:
        """No module makes the tables; all blocks get them. CogVideoX-2b has none."""
        if not root.config.use_rotary_positional_embeddings:
            return None
        try:
            self.spec(root)
        except ValueError as error:
            return "transformer_blocks", root.transformer_blocks, str(error)
        return "transformer_blocks", root.transformer_blocks, None

    def rotary_edits(self, path: str, root: Any) -> list[Edit]:
        """The root's hook does it."""
        return []

    def tokens_of(self, root: Any, given: dict[str, Any]) -> Tokens:
        """The text, then the video: latents [B, F, C, H, W]."""
        frames, _, height, width = given["hidden_states"].shape[1:]
        patch, patch_t = root.config.patch_size, root.config.patch_size_t or 1
        grid = ((frames + patch_t - 1) // patch_t, height // patch, width // patch)
        return Tokens(grid, prefix=given["encoder_hidden_states"].shape[1])

    def watch(self, root: Any, context: Context, rotary: Choice | None, pipeline: Any) -> Watch:
        """The hook that also sees the tables."""
        if rotary is None:
            return super().watch(root, context, rotary, pipeline)
        return _Watch(self, context, pipeline, self.spec(root), rotary.rules[0])


ADAPTERS = [CogVideoX()]
