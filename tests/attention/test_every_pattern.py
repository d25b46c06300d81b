"""Every pattern through sparse_attention: head dims, dtypes and odd lengths, outputs, LSE and gradients against the masked reference."""

from __future__ import annotations

import pytest
import torch
from attention.attention_cases import DTYPES
from attention.test_sparse_attention import check

from saccade.attention import patterns as P

GRID = (3, 5, 7)  # 105 tokens: no tile, window or block divides it
TOKENS = 105

# name -> (layout of a block size, tokens)
PATTERNS = {
    "dense": (lambda b: P.dense(TOKENS, block=b), TOKENS),
    "causal": (lambda b: P.causal(TOKENS, block=b), TOKENS),
    "packed": (lambda b: P.packed(torch.tensor([0, 40, 41, 105]), TOKENS, block=b), TOKENS),
    "sliding_tile": (lambda b: P.sliding_tile(GRID, (2, 4, 4), (1, 1, 1), suffix=9, block=b), TOKENS + 9),
    "sliding_tile per head": (
        lambda b: P.sliding_tile(GRID, (1, 4, 4), [(1, 1, 1), (3, 1, 1), (1, 3, 1), (3, 3, 3)], prefix=3, block=b),
        TOKENS + 3,
    ),
    "neighborhood": (lambda b: P.neighborhood(GRID, (3, 3, 3), prefix=5, block=b), TOKENS + 5),
    "neighborhood strided, dilated, causal": (
        lambda b: P.neighborhood(GRID, (2, 3, 3), stride=(1, 2, 2), dilation=(1, 1, 2), causal=(True, False, False), block=b),
        TOKENS,
    ),
    "window": (lambda b: P.window(GRID, (2, 3, 3), block=b), TOKENS),
    "window shifted": (lambda b: P.window(GRID, (2, 3, 3), shift=(1, 1, 1), prefix=2, block=b), TOKENS + 2),
    "spatial": (lambda b: P.spatial(GRID, prefix=5, block=b), TOKENS + 5),
    "temporal": (lambda b: P.temporal(GRID, prefix=5, block=b), TOKENS + 5),
    "radial": (lambda b: P.radial(GRID, suffix=6, block=b), TOKENS + 6),
    "frame_causal": (lambda b: P.frame_causal(GRID, prefix=4, block=b), TOKENS + 4),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inside_the_budget(implementation, name, dtype):
    impl, device = implementation
    make, tokens = PATTERNS[name]
    for seed, (block, head_dim, heads, kv_heads) in enumerate(((64, 64, 4, 2), (128, 80, 4, 4), (64, 128, 4, 1))):
        check(
            impl, device, make(block), (1, heads, kv_heads, tokens, tokens, head_dim), dtype, seed=seed, strides="bshd"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_media_time(implementation, dtype):
    """Text queries and media keys of different lengths; text before the first medium sees nothing."""
    impl, device = implementation
    places = torch.full((1, 90), False)
    places[0, [10, 50]] = True
    layout = P.media_time(places, 2, 61)
    assert not layout.to_mask()[0, 0, :10].any()
    check(impl, device, layout, (1, 2, 2, 90, 122, 72), dtype)
