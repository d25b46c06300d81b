"""Patterns of sparse attention: which queries see which keys, as a `BlockLayout` that is exact for every pair of tokens.

A grid is (T, H, W), tokens t-major, with `prefix` text tokens before and `suffix` text tokens behind it. Unless a pattern says
otherwise text sees everything and every query sees it. `top_k`, `top_p`, `threshold` and `from_scores` choose blocks from the queries and
keys of a call.
"""

from saccade.attention.patterns.bands import spatial, temporal
from saccade.attention.patterns.frames import frame_causal
from saccade.attention.patterns.radial import radial
from saccade.attention.patterns.sequence import causal, dense, media_time, packed
from saccade.attention.patterns.svg import svg, svg_errors
from saccade.attention.patterns.windows import neighborhood, sliding_tile, window
from saccade.attention.plan import from_scores, threshold, top_k, top_p

__all__ = [
    "causal",
    "dense",
    "frame_causal",
    "from_scores",
    "media_time",
    "neighborhood",
    "packed",
    "radial",
    "sliding_tile",
    "spatial",
    "svg",
    "svg_errors",
    "temporal",
    "threshold",
    "top_k",
    "top_p",
    "window",
]
