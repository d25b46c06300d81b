"""All presets: every published rotary embedding as a function that returns its `RopeSpec`."""

from saccade.rope.presets_diffusion import (
    cogvideox,
    cosmos,
    flux,
    hunyuan_video,
    ltx,
    ltx2,
    mochi,
    seedance,
    wan,
)
from saccade.rope.presets_language import (
    hope,
    mhrope,
    mmrope,
    mrope,
    mrope_interleaved,
    qwen_vision,
    tad,
    v2pe,
    vanilla,
    videorope,
)

__all__ = [
    "cogvideox",
    "cosmos",
    "flux",
    "hope",
    "hunyuan_video",
    "ltx",
    "ltx2",
    "mhrope",
    "mmrope",
    "mochi",
    "mrope",
    "mrope_interleaved",
    "qwen_vision",
    "seedance",
    "tad",
    "v2pe",
    "vanilla",
    "videorope",
    "wan",
]
