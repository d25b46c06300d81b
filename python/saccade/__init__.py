"""Saccade: video models that look only where it matters.

`saccade.rope` has rotary embeddings for space and time, `saccade.merge` token merging. `saccade.explain(op, *args)` says which
implementation runs.
"""

import torch as _torch

from saccade import _dispatch, merge, rope
from saccade._dispatch import Explanation, explain

if _dispatch.has_triton() and (_dispatch.interpreting() or _torch.cuda.device_count() > 0):
    # Now, not at the first call: torch.compile must find the ops. Elsewhere no Triton kernel can run, and its import is saved.
    from saccade._triton.register import register as _register
    from saccade.merge._fakes import FAKES as _FAKES

    _register(_FAKES)

__version__ = "0.1.0"
__all__ = ["Explanation", "explain", "merge", "rope"]
