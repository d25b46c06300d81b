"""Saccade: video models that look only where it matters.

`saccade.rope` has rotary embeddings for space and time. `saccade.explain(op, *args)` says which implementation runs.
"""

from saccade import rope
from saccade._dispatch import Explanation, explain

__version__ = "0.1.0"
__all__ = ["Explanation", "explain", "rope"]
