"""Swaps: kernels of Saccade put into models of other libraries, instance by instance, and taken out again."""

from saccade.swap.instance import Site, Swap, SwapRefused

__all__ = ["Site", "Swap", "SwapRefused"]
