"""Swaps: kernels of Saccade put into models of other libraries, instance by instance, and taken out again."""

from saccade.swap.instance import Site, Swap, SwapRefused
from saccade.swap.timm import Merged, merge_tokens, restore

__all__ = ["Merged", "Site", "Swap", "SwapRefused", "merge_tokens", "restore"]
