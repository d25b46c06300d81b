"""Swaps: kernels of Saccade put into models of other libraries, instance by instance, and taken out again."""

from saccade.swap.engine import accelerate, accelerated, plan, restore
from saccade.swap.presets import preset, presets
from saccade.swap.recipe import Recipe, Rule
from saccade.swap.report import Report
from saccade.swap.source import SwapRefused
from saccade.swap.transformers.names import register_transformers

__all__ = [
    "Recipe",
    "Report",
    "Rule",
    "SwapRefused",
    "accelerate",
    "accelerated",
    "plan",
    "preset",
    "presets",
    "register_transformers",
    "restore",
]
