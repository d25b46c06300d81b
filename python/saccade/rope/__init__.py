"""Rotary position embeddings for space and time: HoPE and every other variant, as data for one kernel."""

from saccade.rope import _fakes as _fakes
from saccade.rope.apply_rope import apply_rope
from saccade.rope.qk_norm_rope import qk_norm_rope
from saccade.rope.spec import RopeSpec

__all__ = ["RopeSpec", "apply_rope", "qk_norm_rope"]
