"""Saccade: video models that look only where it matters.

`saccade.attention` has sparse attention, `saccade.rope` rotary embeddings for space and time, `saccade.merge` token merging.
`saccade.accelerate(model, recipe)` puts them into a model, `saccade.restore(model)` takes them out again.
`saccade.explain(op, *args)` says which implementation runs.
"""

import torch as _torch

from saccade import _dispatch, attention, merge, rope
from saccade._dispatch import Explanation, explain
from saccade.swap import Recipe, Report, accelerate, accelerated, plan, restore

if _dispatch.has_triton() and (_dispatch.interpreting() or _torch.cuda.device_count() > 0):
    # Now, not at the first call: torch.compile must find the ops. Elsewhere no Triton kernel can run, and its import is saved.
    from saccade._triton.register import register as _register
    from saccade.attention._fakes import FAKES as _ATTENTION
    from saccade.merge._fakes import FAKES as _MERGE

    _register({**_MERGE, **_ATTENTION})

__version__ = "0.1.0"
__all__ = [
    "Explanation", "Recipe", "Report", "accelerate", "accelerated", "attention", "explain", "merge", "plan", "restore", "rope",
]  # fmt: skip
