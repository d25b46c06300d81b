"""Estimates of what a site does before and after a swap."""

from __future__ import annotations

import functools

from saccade.swap.attend import fixed_layout, is_fixed
from saccade.swap.recipe import Rule
from saccade.swap.site import Cost, Site
from saccade.swap.tokens import Tokens

__all__ = ["estimate"]

_SIZE = 2  # bytes of a bf16 value


@functools.lru_cache(maxsize=64)
def _fixed_density(key: tuple[object, ...], tokens: Tokens) -> float:
    return float(fixed_layout(_RULES[key], tokens).density)


_RULES: dict[tuple[object, ...], Rule] = {}


def _density(rule: Rule, tokens: Tokens) -> float | None:
    """The share of pairs that a kernel looks at; None where it follows from the data."""
    if rule.kernel in ("stock", "dense"):
        return 1.0
    if is_fixed(rule):
        key = (rule.kernel, repr(sorted(rule.params.items())))
        _RULES.setdefault(key, rule)
        return _fixed_density(key, tokens)
    keep = rule.params.get("keep", 0.25)
    if rule.kernel == "top_k" and isinstance(keep, float):
        return keep
    return None


def estimate(site: Site, rules: tuple[Rule, ...], tokens: Tokens) -> tuple[Cost, Cost] | None:
    """(before, after) of an attention or rotary site; of several rules the last, which holds for the most steps, counts."""
    queries, keys = site.tokens
    if not site.heads or not queries:
        return None
    if site.kind == "rotary":
        values = (site.heads * queries + site.kv_heads * keys) * site.head_dim
        # Stock: cast to fp32, rotated half, two products, a sum, cast back; fused: read once, written once.
        return Cost(3.0 * values, values * (8 * 4 + 2 * _SIZE)), Cost(3.0 * values, values * 2 * _SIZE)
    if site.kind != "attention":
        return None
    flops = 4.0 * site.heads * queries * keys * site.head_dim / site.groups
    moved = float((2 * site.heads * queries + 2 * site.kv_heads * keys) * site.head_dim * _SIZE)
    before = Cost(flops, moved)
    if not rules:
        return before, before
    try:
        density = _density(rules[-1], tokens)
    except ValueError:  # the pattern does not fit the assumed grid; the model's own may
        return None
    return None if density is None else (before, Cost(flops * density, moved))
