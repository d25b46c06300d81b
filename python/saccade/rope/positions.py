"""All positions: grids, the coordinates of each generator, and text and video in one sequence."""

from saccade.rope.grids import grid_positions, normalise_positions, qwen_vision_positions
from saccade.rope.multimodal import batch_positions, multimodal_positions
from saccade.rope.positions_diffusion import (
    cogvideox_crop,
    cogvideox_positions,
    cosmos_positions,
    flux_positions,
    ltx2_audio_positions,
    ltx2_positions,
    ltx_positions,
    mochi_positions,
    seedance_positions,
)

__all__ = [
    "batch_positions",
    "cogvideox_crop",
    "cogvideox_positions",
    "cosmos_positions",
    "flux_positions",
    "grid_positions",
    "ltx2_audio_positions",
    "ltx2_positions",
    "ltx_positions",
    "mochi_positions",
    "multimodal_positions",
    "normalise_positions",
    "qwen_vision_positions",
    "seedance_positions",
]
