"""Rotary embeddings as `nn.Module`s: a `RopeSpec`, the op that applies it, and the positions that belong to it.

    q, k = rope(q, k, positions)         q [B, H, S, D], k [B, Hk, S, D] or None, positions [A, S] or [A, B, S]

Positions are made once per batch by the module's `positions` (or any function of `saccade.rope.positions`) and shared
by all layers. Nothing is cached: no tables of cos and sin, and no buffers, so layers may share a module too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from saccade._arguments import items, number, whole
from saccade.rope import positions as place
from saccade.rope import presets
from saccade.rope.spec import RopeSpec

__all__ = [
    "CogVideoXRoPE",
    "CosmosRoPE",
    "FluxRoPE",
    "HoPE",
    "HunyuanVideoRoPE",
    "LTX2RoPE",
    "LTXRoPE",
    "MRoPE",
    "MRoPEInterleaved",
    "MochiRoPE",
    "QwenVisionRoPE",
    "RotaryEmbedding",
    "VideoRoPE",
    "WanRoPE",
]

_Segments = Sequence[int | Sequence[int]]
GAMMAS = (0.5, 0.75, 1.0, 1.25, 1.5)  # arXiv 2505.20444, sec. 4.2


class RotaryEmbedding(nn.Module):
    """Applies `spec` to q [B, H, S, D] and k [B, Hk, S, D].

    Example:
        >>> RotaryEmbedding(presets.vanilla(64, 10000.0)).spec.pairs
        32
    """

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__()
        if not isinstance(spec, RopeSpec):
            raise TypeError(f"spec: expected a RopeSpec, got {type(spec).__name__}")
        self._spec = spec

    @property
    def spec(self) -> RopeSpec:
        """What `forward` applies."""
        return self._spec

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        positions: torch.Tensor,
        *,
        inplace: bool = False,
        impl: str = "auto",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q and k turned by positions [A, S] or [A, B, S]; see `saccade.rope.apply_rope`."""
        from saccade.rope.apply_rope import apply_rope

        turned: tuple[torch.Tensor, torch.Tensor | None] = apply_rope(
            q, k, positions, self.spec, inplace=inplace, impl=impl
        )
        return turned

    def extra_repr(self) -> str:
        """head_dim and pairing, for print."""
        return f"head_dim={self.spec.head_dim}, pairs={self.spec.pairs}, pairing={self.spec.pairing!r}"


class MRoPE(RotaryEmbedding):
    """M-RoPE of Qwen2-VL and Qwen2.5-VL (`presets.mrope`).

    Example:
        >>> MRoPE(128, 1e6, (16, 24, 24)).positions([1, (1, 1, 2)])[1]
        3
    """

    def __init__(self, head_dim: int, base: float, sections: Sequence[int]) -> None:
        super().__init__(presets.mrope(head_dim, base, sections))

    def positions(self, segments: _Segments, **options: Any) -> tuple[torch.Tensor, int | float]:
        """Positions [3, S] and the next one (rule "mrope", or "mrope_time" where tokens_per_second is given)."""
        rule = "mrope_time" if options.get("tokens_per_second") is not None else "mrope"
        return place.multimodal_positions(segments, rule=rule, **options)


class MRoPEInterleaved(MRoPE):
    """Interleaved M-RoPE of Qwen3-VL (`presets.mrope_interleaved`); give every frame its own grid with T = 1.

    Example:
        >>> MRoPEInterleaved(128, 5e6, (24, 20, 20)).spec.axis[:4]
        (0, 1, 2, 0)
    """

    def __init__(self, head_dim: int, base: float, sections: Sequence[int], *, rotary_dim: int | None = None) -> None:
        RotaryEmbedding.__init__(self, presets.mrope_interleaved(head_dim, base, sections, rotary_dim=rotary_dim))


class VideoRoPE(RotaryEmbedding):
    """VideoRoPE (`presets.videorope`), temporal stride 2 unless told otherwise.

    Example:
        >>> VideoRoPE(128, 1e6).positions([(2, 1, 1)])[0][0]
        tensor([0, 2])
    """

    def __init__(self, head_dim: int, base: float, *, temporal: int | None = None) -> None:
        super().__init__(presets.videorope(head_dim, base, temporal=temporal))

    def positions(self, segments: _Segments, **options: Any) -> tuple[torch.Tensor, int | float]:
        """Positions [3, S] and the next one: `multimodal_positions` with rule "videorope"."""
        return place.multimodal_positions(segments, rule="videorope", **options)


class HoPE(RotaryEmbedding):
    """HoPE (`presets.hope`): a temporal stride gamma drawn per video in training, named by the caller at inference.

    Draws come from the module's own generator, never from a global one; its state is part of the state_dict, so a
    resumed run, or the ranks of one model when seeded alike, draw the same.

    Args:
        gammas: what training draws from.
        seed: of the generator.

    Example:
        >>> rope = HoPE(128, 1e6).eval()
        >>> rope.positions([2, (2, 1, 1)], gamma=0.75)
        (tensor([[0.0000, 1.0000, 2.0000, 2.7500],
                [0.0000, 1.0000, 2.0000, 2.7500],
                [0.0000, 1.0000, 2.0000, 2.7500]], dtype=torch.float64), 3.75)
    """

    def __init__(
        self,
        head_dim: int,
        base: float,
        *,
        zeroed: int | None = None,
        gammas: Sequence[float] = GAMMAS,
        seed: int = 0,
    ) -> None:
        super().__init__(presets.hope(head_dim, base, zeroed=zeroed))
        self.gammas = tuple(float(number(g, f"gammas[{i}]", 0.0)) for i, g in enumerate(items(gammas, "gammas")))
        if not self.gammas:
            raise ValueError("gammas: expected at least one number, got none")
        self.generator = torch.Generator().manual_seed(whole(seed, "seed"))

    def sample(self, videos: int) -> list[float]:
        """One gamma per video, drawn with the module's generator."""
        drawn = torch.randint(len(self.gammas), (whole(videos, "videos", 0),), generator=self.generator)
        return [self.gammas[i] for i in drawn.tolist()]

    def positions(
        self,
        segments: _Segments,
        *,
        gamma: float | Sequence[float] | None = None,
        start: float = 0,
        device: torch.device | str | None = None,
    ) -> tuple[torch.Tensor, int | float]:
        """Positions [3, S] and the next one (rule "hope"); gamma=None draws in training, fails in evaluation."""
        if gamma is None and self.training:
            gamma = self.sample(sum(isinstance(segment, Sequence) for segment in items(segments, "segments")))
        return place.multimodal_positions(segments, rule="hope", gamma=gamma, start=start, device=device)

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """State of the generator."""
        return {"generator": self.generator.get_state()}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `get_extra_state` gave."""
        self.generator.set_state(state["generator"].cpu())


class QwenVisionRoPE(RotaryEmbedding):
    """Two-dimensional rotary embedding of Qwen's vision towers (`presets.qwen_vision`).

    Example:
        >>> QwenVisionRoPE(80).positions([(1, 2, 2)])
        tensor([[0, 0, 1, 1],
                [0, 1, 0, 1]])
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__(presets.qwen_vision(head_dim, base))

    def positions(self, grids: Sequence[Sequence[int]], **options: Any) -> torch.Tensor:
        """`qwen_vision_positions`, [2, N]."""
        return place.qwen_vision_positions(grids, **options)


class WanRoPE(RotaryEmbedding):
    """Wan 2.1 and 2.2 (`presets.wan`).

    Example:
        >>> WanRoPE().positions((1, 1, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, head_dim: int = 128, *, base: float = 10000.0) -> None:
        super().__init__(presets.wan(head_dim, base=base))

    def positions(self, grid: Sequence[int], **options: Any) -> torch.Tensor:
        """`grid_positions`, [3, S]."""
        return place.grid_positions(grid, **options)


class HunyuanVideoRoPE(RotaryEmbedding):
    """HunyuanVideo (`presets.hunyuan_video`); text tokens follow the video: `positions(grid, suffix=text)`.

    Example:
        >>> HunyuanVideoRoPE().positions((1, 1, 2), suffix=3).shape
        torch.Size([3, 5])
    """

    def __init__(self, head_dim: int = 128, *, base: float = 256.0, sections: Sequence[int] | None = None) -> None:
        super().__init__(presets.hunyuan_video(head_dim, base=base, sections=sections))

    def positions(self, grid: Sequence[int], **options: Any) -> torch.Tensor:
        """`grid_positions`, [3, S]."""
        return place.grid_positions(grid, **options)


class CogVideoXRoPE(RotaryEmbedding):
    """CogVideoX (`presets.cogvideox`); text tokens come first: `positions(grid, prefix=text)`.

    Example:
        >>> CogVideoXRoPE().positions((1, 1, 2), prefix=3).shape
        torch.Size([3, 5])
    """

    def __init__(self, head_dim: int = 64, *, base: float = 10000.0) -> None:
        super().__init__(presets.cogvideox(head_dim, base=base))

    def positions(self, grid: Sequence[int], **options: Any) -> torch.Tensor:
        """`cogvideox_positions`, [3, S]."""
        return place.cogvideox_positions(grid, **options)


class CosmosRoPE(RotaryEmbedding):
    """Cosmos 1 (`presets.cosmos`).

    Example:
        >>> CosmosRoPE().positions((2, 1, 1), fps=12)[0]
        tensor([0, 2])
    """

    def __init__(self, head_dim: int = 128, *, scale: Sequence[float] = (2.0, 1.0, 1.0), base: float = 10000.0) -> None:
        super().__init__(presets.cosmos(head_dim, scale=scale, base=base))

    def positions(self, grid: Sequence[int], **options: Any) -> torch.Tensor:
        """`cosmos_positions`, [3, S]."""
        return place.cosmos_positions(grid, **options)


class LTXRoPE(RotaryEmbedding):
    """LTX-Video (`presets.ltx`), frequencies per head.

    Example:
        >>> LTXRoPE().positions((1, 1, 2), scale=(0.32, 32, 32)).shape
        torch.Size([3, 2])
    """

    def __init__(self, head_dim: int = 64, heads: int = 32, *, base: float = 10000.0) -> None:
        super().__init__(presets.ltx(head_dim, heads, base=base))

    def positions(self, grid: Sequence[int], **options: Any) -> torch.Tensor:
        """`ltx_positions`, [3, S]."""
        return place.ltx_positions(grid, **options)


class LTX2RoPE(RotaryEmbedding):
    """LTX-2 (`presets.ltx2`), frequencies per head; axes=1 for audio.

    Example:
        >>> LTX2RoPE().positions((1, 1, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self, head_dim: int = 128, heads: int = 32, *, axes: int = 3, layout: str = "interleaved", base: float = 10000.0
    ) -> None:
        super().__init__(presets.ltx2(head_dim, heads, axes=axes, layout=layout, base=base))

    def positions(self, grid: Any, **options: Any) -> torch.Tensor:
        """`ltx2_positions` of a grid, [3, S], or with axes=1 `ltx2_audio_positions` of a length, [1, S]."""
        return (place.ltx2_audio_positions if self.spec.axes == 1 else place.ltx2_positions)(grid, **options)


class FluxRoPE(RotaryEmbedding):
    """FLUX (`presets.flux`).

    Example:
        >>> FluxRoPE().positions(2, (1, 3)).shape
        torch.Size([3, 5])
    """

    def __init__(self, axes_dim: Sequence[int] = (16, 56, 56), *, base: float = 10000.0) -> None:
        super().__init__(presets.flux(axes_dim, base=base))

    def positions(self, text: int, size: Sequence[int], **options: Any) -> torch.Tensor:
        """`flux_positions`, [A, text + H*W]."""
        return place.flux_positions(text, size, axes=self.spec.axes or 3, **options)


class MochiRoPE(RotaryEmbedding):
    """Mochi (`presets.mochi`): holds the learned frequencies [3, heads, head_dim / 2] as a parameter, zero at first.

    Example:
        >>> MochiRoPE(128, 24).frequencies.shape
        torch.Size([3, 24, 64])
    """

    def __init__(self, head_dim: int = 128, heads: int = 24) -> None:
        pairs = presets.vanilla(head_dim, 10000.0).pairs
        frequencies = nn.Parameter(torch.zeros(3, whole(heads, "heads", 1), pairs))
        super().__init__(presets.mochi(frequencies))
        self.frequencies = frequencies
        self._version = -1

    @property
    def spec(self) -> RopeSpec:
        """The spec of the frequencies as they are now."""
        given = self.frequencies
        if given.requires_grad:
            if self._spec.inv_freq is not given:
                self._spec = presets.mochi(given)
        elif self._spec.learned or self._version != given._version:
            self._spec, self._version = presets.mochi(given), given._version
        return self._spec

    def positions(self, grid: Sequence[int], **options: Any) -> torch.Tensor:
        """`mochi_positions`, [3, S]."""
        return place.mochi_positions(grid, **options)
