"""Sparse spatio-temporal attention: one form of mask for every pattern, forward and backward."""

from saccade.attention import _fakes, patterns  # noqa: F401
from saccade.attention.axial_attention import axial_attention
from saccade.attention.combine import concat, intersection, union
from saccade.attention.importance import attention_entropy, attention_lse, token_importance
from saccade.attention.layout import BlockLayout, BlockLists
from saccade.attention.learned import LearnedSparseMask, MaskDensity
from saccade.attention.modules import DividedSpaceTime, WindowAttention
from saccade.attention.reuse import PlanCache, attention_recall
from saccade.attention.sparse_attention import sparse_attention

__all__ = [
    "BlockLayout",
    "BlockLists",
    "DividedSpaceTime",
    "LearnedSparseMask",
    "MaskDensity",
    "PlanCache",
    "WindowAttention",
    "attention_entropy",
    "attention_lse",
    "attention_recall",
    "axial_attention",
    "concat",
    "intersection",
    "patterns",
    "sparse_attention",
    "token_importance",
    "union",
]
