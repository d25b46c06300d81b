"""LTX-2: self-attention over the video, gated and perturbed variants too. What touches audio stays stock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from saccade.rope import RopeSpec, ltx2
from saccade.swap.attend import Attend
from saccade.swap.diffusers._merging import MASKED, MergingProcessor, Rows
from saccade.swap.diffusers._processor import project, rotary_reason
from saccade.swap.diffusers._video import VideoAdapter
from saccade.swap.diffusers.ltx import query_mask, width_reason
from saccade.swap.site import Site
from saccade.swap.tokens import Tokens

__all__ = ["ADAPTERS", "LTX2PerturbedProcessor", "LTX2Processor"]

Tensor = torch.Tensor
_VERSIONS = "diffusers 0.37 to 0.42"
_TESTED: dict[str, set[str]] = {
    "LTX2Attention.forward": {"3a2a0f6444a152f0"},
    "LTX2AudioVideoAttnProcessor.__call__": {"3d8fd43030313682", "406095cbf2585897"},
    "LTX2PerturbedAttnProcessor.__call__": {"82fd45b627d414c9"},
    "LTX2AudioVideoRotaryPosEmbed.forward": {"6bc2ab402b1251b1"},
    "apply_interleaved_rotary_emb": {"b5be12fed5f825b9"},
    "apply_split_rotary_emb": {"c208f62acabf7cf0"},
}
_ARGUMENTS = (
    "hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states", "timestep",
    "audio_timestep", "sigma", "audio_sigma", "encoder_attention_mask", "audio_encoder_attention_mask", "num_frames",
    "height", "width",
)  # fmt: skip
# attention modules of a block that stay stock -> their role
_OTHERS = {
    "audio_attn1": "audio", "attn2": "cross", "audio_attn2": "cross", "audio_to_video_attn": "cross",
    "video_to_audio_attn": "cross",
}  # fmt: skip


class LTX2Processor(MergingProcessor):
    """Video self-attention of an LTX-2 block."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        kinds = ("interleaved", "split")
        self._turn = {kind: self.of_stock(f"apply_{kind}_rotary_emb") for kind in kinds}

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, S, C] -> [B, S, C]."""
        if encoder_hidden_states is not None:
            return self.stock(  # type: ignore[no-any-return]
                attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb
            )
        rows = self.rows(hidden_states, None if attention_mask is None else MASKED)
        out, _ = self._attention(attn, rows, attention_mask, query_rotary_emb)
        return rows.back(_finished(attn, rows.hidden, out))

    def _attention(
        self, attn: Any, rows: Rows, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """What attention gives, and the values, both [B, M, C] of the rows."""
        q, k, v = project(attn, rows.hidden)
        norms = self.norms(attn, q)
        if norms is None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if self.spec is None and rotary is not None:
            turn, tables = (
                self._turn[attn.rope_type],
                rows.tables(rotary, rotary[0].ndim - 2),
            )  # [B, S, C], [B, H, S, D / 2]
            q, k = turn(q, tables), turn(k, tables)
        values = v
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, S, H, D]
        if self.spec is not None and rotary is not None:
            q, k = self.rotate(q, k, rows.positions(rotary[0].permute(2, 0, 1)), norms, "row")  # [3, B, S]
        if mask is None:
            out = self.among(rows, q, k, v)
        else:
            out = self.masked(q, k, v, query_mask(attn, mask, *rows.hidden.shape[:2]))
        return out.flatten(2, 3).to(q.dtype), values


class LTX2PerturbedProcessor(LTX2Processor):
    """The same, where guidance replaces attention by the values in some samples of the batch."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
    ) -> Tensor:
        """hidden_states [B, S, C] -> [B, S, C]."""
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and bool(torch.all(perturbation_mask == 0))
        if encoder_hidden_states is not None or all_perturbed:  # all perturbed: there is no attention
            return self.stock(  # type: ignore[no-any-return]
                attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb,
                perturbation_mask, all_perturbed,
            )  # fmt: skip
        blocked = None if attention_mask is None else MASKED
        if perturbation_mask is not None and perturbation_mask.ndim > 1 and perturbation_mask.shape[-2] != 1:
            blocked = "the perturbation differs from token to token"
        rows = self.rows(hidden_states, blocked)
        out, values = self._attention(attn, rows, attention_mask, query_rotary_emb)
        if perturbation_mask is not None:
            out = torch.lerp(values, out, perturbation_mask)
        return rows.back(_finished(attn, rows.hidden, out))


def _finished(attn: Any, hidden: Tensor, out: Tensor) -> Tensor:
    """Gates of the heads, where the model has them, and the output projection."""
    gate = getattr(attn, "to_gate_logits", None)
    if gate is not None:
        gates = 2.0 * torch.sigmoid(gate(hidden))  # [B, S, H]
        out = (out.unflatten(2, (attn.heads, -1)) * gates[..., None]).flatten(2, 3)
    return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]


def _positions(self: Any, coords: Tensor, device: Any = None) -> tuple[Tensor, Tensor]:
    """In place of (cos, sin): the positions [B, S, 3] in float64, twice. coords: bounds [B, 3, S, 2], or [B, 3, S]."""
    places = coords.double().mean(-1) if coords.ndim == 4 else coords.double()
    bases = (self.base_num_frames, self.base_height, self.base_width)
    positions = torch.stack([places[:, i] / base for i, base in enumerate(bases)], dim=-1).to(device or coords.device)
    return positions * 2 - 1, positions * 2 - 1


class LTX2(VideoAdapter):
    """LTX2VideoTransformer3DModel. Audio, text and audio-video attention stays stock: those sequences are short."""

    family = "ltx2"
    roots = ("LTX2VideoTransformer3DModel",)
    grid = (16, 16, 24)  # 121 frames at 512 x 768
    text = 1024
    audio = 126
    tested, versions, arguments = _TESTED, _VERSIONS, _ARGUMENTS
    positions = _positions

    def processor(self, stock: Any, attend: Attend, spec: RopeSpec | None) -> LTX2Processor:
        """Of any block, perturbed ones too."""
        perturbed = "perturbation_mask" in type(stock).__call__.__code__.co_varnames
        return (LTX2PerturbedProcessor if perturbed else LTX2Processor)(stock, attend, spec)

    def spec(self, root: Any) -> RopeSpec:
        """Pairs over all heads, interleaved or split."""
        config, rope = root.config, root.rope
        return ltx2(config.attention_head_dim, config.num_attention_heads, layout=rope.rope_type, base=rope.theta)

    def rotary_reason(self, root: Any, stock: Any) -> str | None:
        """An unknown source of the tables or of what turns by them; or another width."""
        scope = type(stock).__call__.__globals__
        turns = [scope.get(f"apply_{kind}_rotary_emb") for kind in ("interleaved", "split")]
        return rotary_reason(root.rope, _TESTED, _VERSIONS, *turns) or width_reason(root)

    def tokens_of(self, root: Any, given: dict[str, Any]) -> Tokens | None:
        """Tokens beyond the grid are keyframes and references: pipelines append them."""
        sizes: list[Any] = [given.get(name) for name in ("num_frames", "height", "width")]
        if not all(isinstance(size, int) for size in sizes):
            return None
        edges = (root.config.patch_size_t, root.config.patch_size, root.config.patch_size)
        t, h, w = (-(-size // edge) for size, edge in zip(sizes, edges, strict=True))
        more = given["hidden_states"].shape[1] - t * h * w
        return Tokens((t, h, w), suffix=more) if more >= 0 else None

    def others(self, name: str, block: Any, common: dict[str, Any], video: int) -> Iterator[Site]:
        """The five that touch text or audio."""
        for other, role in _OTHERS.items():
            attn = getattr(block, other)
            size = {"heads": attn.heads, "kv_heads": attn.heads, "head_dim": attn.head_dim}
            lengths = self._lengths(other, video)
            yield Site(f"{name}.{other}", attn, "attention", role, tokens=lengths, **{**common, **size})

    def _lengths(self, name: str, video: int) -> tuple[int, int]:
        queries = self.audio if name in ("audio_attn1", "audio_attn2", "video_to_audio_attn") else video
        keys = {"attn2": self.text, "audio_attn2": self.text, "video_to_audio_attn": video}.get(name, self.audio)
        return queries, keys


ADAPTERS = [LTX2()]
