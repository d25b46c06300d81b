"""Sparse VideoGen's choice of a band for every head, against the same in float64 with masks."""

from __future__ import annotations

import pytest
import torch
from attention import brute_masks as brute
from attention.exact import check_exact

from saccade.attention import patterns

GRID = (6, 4, 5)


def masks(grid, width, sink, prefix, suffix):
    return [
        brute.video_mask(grid, prefix, suffix, brute.band(grid, width, sink, by_token)) for by_token in (False, True)
    ]


def inputs(grid, prefix, suffix, heads, kv_heads, batch=1, head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    length = prefix + grid[0] * grid[1] * grid[2] + suffix
    q = torch.randn(batch, heads, length, head_dim, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, length, head_dim, generator=generator).unbind()
    return q, k, v


def codes(grid, prefix, suffix, axis):
    """[S, 16]: tokens of one frame (axis 0), or of one place (axis 1), have the same direction."""
    generator = torch.Generator().manual_seed(9)
    names = [
        0 if p is None else p[0] if axis == 0 else 1000 + p[1] * grid[2] + p[2]
        for p in brute.places(grid, prefix, suffix)
    ]
    table = {n: torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0) for n in sorted(set(names))}
    return torch.stack([table[n] for n in names]) * 8


@pytest.mark.parametrize(
    ("prefix", "suffix", "sink", "heads", "kv_heads"), [(0, 0, False, 4, 4), (5, 3, True, 4, 2), (70, 0, True, 2, 1)]
)
def test_errors_and_choice(prefix, suffix, sink, heads, kv_heads):
    q, k, v = inputs(GRID, prefix, suffix, heads, kv_heads, batch=2)
    around = {"sink": sink, "prefix": prefix, "suffix": suffix}
    errors = patterns.svg_errors(q, k, v, GRID, 0.6, rows=7, offset=11, **around)
    count = GRID[0] * GRID[1] * GRID[2]
    rows = [prefix + ((2 * n + 1) * count // 14 + 11) % count for n in range(7)]
    group = heads // kv_heads
    scores = q.double() @ k.double().repeat_interleave(group, 1).mT / 4
    values = v.double().repeat_interleave(group, 1)
    full = (scores.softmax(-1) @ values)[:, :, rows]
    both = masks(GRID, 0.6, sink, prefix, suffix)
    for n, mask in enumerate(both):
        out = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values)[:, :, rows]
        wanted = (out - full).square().unflatten(1, (kv_heads, group)).mean((2, 3, 4))
        assert torch.allclose(errors[..., n].double(), wanted, rtol=1e-4)
    layout = patterns.svg(q, k, v, GRID, 0.6, rows=7, offset=11, **around)
    choice = (errors[..., 1] < errors[..., 0]).repeat_interleave(group, 1)
    check_exact(_by_query_head(layout, group), torch.where(choice[..., None, None], both[1], both[0]))


def _by_query_head(layout, group):
    """The layout as `to_mask` and the tests read it: the order of keys for every query head."""
    from dataclasses import replace

    return replace(layout, k_order=layout.k_order.repeat_interleave(group, 1))


def test_heads_take_the_band_that_they_need():
    q, k, v = inputs(GRID, 5, 0, 2, 2)
    for head in (0, 1):
        q[:, head] = k[:, head] = codes(GRID, 5, 0, head)
    errors = patterns.svg_errors(q, k, v, GRID, 0.5, prefix=5)
    assert bool(errors[0, 0, 0] < errors[0, 0, 1]) and bool(errors[0, 1, 1] < errors[0, 1, 0])
    layout = patterns.svg(q, k, v, GRID, 0.5, prefix=5)
    spatial, temporal = masks(GRID, 0.5, False, 5, 0)
    assert torch.equal(layout.to_mask(), torch.stack((spatial, temporal))[None])


def test_other_lengths_are_refused():
    q, k, v = inputs(GRID, 0, 0, 2, 2)
    with pytest.raises(ValueError, match=r"q: expected the 125 tokens of 5 \+ 6 x 4 x 5 \+ 0, got 120"):
        patterns.svg(q, k, v, GRID, prefix=5)
